"""Settings of what is done with an SAE in a running model (torch-free)."""

from typing import Annotated

from pydantic import Field

from wsae.core.config import Config


class SteerConfig(Config):
    """How a steered model continues a prompt."""

    new_tokens: Annotated[int, Field(ge=1)] = 40
    """Tokens to generate, fewer where the text ends."""
    temperature: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    """Of the random choice of tokens; 0: the likeliest each time."""
    seed: int = 0
    """Decides the random choice, the same for every strength."""
