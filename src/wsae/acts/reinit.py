"""The same architecture with weights nobody trained: what a model's activations look like before it has learned."""

import copy
from typing import Any

import torch

from wsae.acts.language import LanguageModel, made_ready
from wsae.core.files import digest


def reinitialised(language: LanguageModel, seed: int) -> LanguageModel:
    """Return a model of the same config, its weights drawn anew by the architecture's own rule; same tokenizer.

    The global random state is left as it was.
    """
    trained = language.model
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = type(trained)._from_config(copy.deepcopy(trained.config))
    model = model.to(language.device, trained.dtype).eval().requires_grad_(False)
    made_ready(model, language.tokenizer, language.name)
    name = f"{language.name} with random weights"
    return LanguageModel(
        model, language.tokenizer, name, digest([language.digest, "random weights", seed])
    )
