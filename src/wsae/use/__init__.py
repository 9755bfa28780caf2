"""An SAE in a running model: read, edited, and asked what it does."""
