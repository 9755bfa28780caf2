"""What is known about an SAE beside its weights, and the formats' names. No torch here."""

from typing import Any, Literal, get_args

from wsae.core.config import Config

FormatName = Literal["saelens", "sparsify", "dictionary_learning"]
INDEX = "wsae.json"
"""The list of SAEs at the top of a shared folder."""
FORMATS: tuple[FormatName, ...] = get_args(FormatName)
"""What SAEs are written as, and read from."""
SourceName = Literal[FormatName, "gemma_scope", "llama_scope", "torch"]
"""What SAEs are read from."""


class Provenance(Config):
    """Where an SAE comes from, as far as its run, or the tool that wrote it, says; everything may be missing."""

    model: str | None = None
    """The model whose activations it was trained on."""
    hook: str | None = None
    """The hook point, in the words of whoever trained it."""
    context: int | None = None
    """Tokens per sequence."""
    prepend_bos: bool | None = None
    """Whether sequences began with a begin-of-text token."""
    dataset: str | None = None
    """The text or images behind the activations; of a local path only the last name."""
    tokens: int | None = None
    """Rows it was trained on."""
    member: str | None = None
    """Its name in its run."""
    gamma: dict[str, Any] = {}
    """The rule of its loss weights: rule, alpha, normalise, ..."""
    metrics: dict[str, Any] = {}
    """Scores on held-out data: {name: {value, low, high}}."""
    inputs: dict[str, str] = {}
    """Digests of what it was made from, by name."""
    origin: dict[str, Any] = {}
    """For an SAE of another tool: `format` and what else its files say."""
    notes: tuple[str, ...] = ()
    """What its files leave open, or what to know before its scores are believed."""
    wsae_version: str | None = None
    """The version that trained it, where that was wsae."""
