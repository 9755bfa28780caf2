"""The feature browser: an index of every latent of a run (SQLite), and a small web server that reads it."""
