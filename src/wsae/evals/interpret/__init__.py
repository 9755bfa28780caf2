"""Auto-interpretability: what makes a latent fire, told from contexts and tested on others."""
