"""Latents against class labels: how consistent each one is, beyond chance and beside controls."""
