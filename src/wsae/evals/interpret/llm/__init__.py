"""Latents explained and judged by a language model that follows instructions.

An endpoint (`client`) or a local model (`local`) behind one interface: `ask(requests) -> answers`. Answers are cached
on disk by content, budgets are hard stops, and `requested = parsed + failed + not_asked` in every result.
"""
