"""Hundreds of small SAEs in one batched computation, each trained exactly as if alone (`wsae.train.bank.run`)."""
