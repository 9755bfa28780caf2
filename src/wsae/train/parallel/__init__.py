"""Training past one process, on torch.distributed: rows, latents and layers shared out over ranks."""
