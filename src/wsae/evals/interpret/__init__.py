"""Auto-interpretability: what makes a latent fire, told from contexts and tested on others.

A language model that explains and judges is an endpoint (`endpoint`) or a local model (`local`) behind one interface,
`ask(requests) -> answers` (`asking`). Answers are cached on disk by content, budgets are hard stops, and
`requested = parsed + failed + not_asked` in every result.
"""
