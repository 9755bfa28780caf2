"""Images: where they come from, the models that see them, and their activations as a store."""
