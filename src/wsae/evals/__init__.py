"""Held-out measurements of SAEs, each with a formula (`glossary`), and their paired comparison with intervals."""
