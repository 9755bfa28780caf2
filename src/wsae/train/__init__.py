"""Families of SAEs trained over the same batches, resumable bit for bit."""
