"""Contrastive pretraining of image encoders: SimCLR and its non-negative form, NCL."""
