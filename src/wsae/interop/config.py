"""The formats' names. No torch here."""

from typing import Literal, get_args

FormatName = Literal["saelens", "sparsify", "dictionary_learning", "circuit_tracer", "crosscoder"]
INDEX = "wsae.json"
"""The list of SAEs at the top of a shared folder."""
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
"""What SAEs are written as, and read from."""
SourceName = Literal[FormatName, "gemma_scope", "llama_scope", "llama_scope_r1", "torch"]
"""What SAEs are read from."""
