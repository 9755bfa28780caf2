"""Labelled evaluations: how well a few latents tell classes of documents or tokens apart."""
