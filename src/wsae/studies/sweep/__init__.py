"""Sweeps on worlds whose truth is known: many worlds, methods and seeds in one batched training, every SAE scored."""
