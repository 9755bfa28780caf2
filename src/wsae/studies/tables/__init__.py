"""Tables 1-3 of the paper (auto-interpretability of language-model latents) and the wider study around them."""
