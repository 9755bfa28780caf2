"""Prompts from their data files: turns after a line `@system`, `@user` or `@assistant`, with {{names}} to fill."""

import functools
import re
from importlib import resources
from typing import Literal

from wsae.evals.autointerp.llm.types import Message, Role

Prompt = Literal["explain", "detection", "fuzzing", "simulation", "simulation_json"]
_ROLES: dict[str, Role] = {"system": "system", "user": "user", "assistant": "assistant"}
_TURN = re.compile(r"^@(system|user|assistant)\n", re.MULTILINE)
_NAME = re.compile(r"\{\{(\w+)\}\}")


@functools.cache
def turns(prompt: Prompt) -> tuple[Message, ...]:
    """Return a prompt's turns, unfilled."""
    file = resources.files("wsae.evals.autointerp.llm") / "prompts" / f"{prompt}.txt"
    parts = _TURN.split(file.read_text(encoding="utf-8"))[1:]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return tuple(Message(_ROLES[role], text.rstrip("\n")) for role, text in pairs)


def filled(prompt: Prompt, **texts: str) -> tuple[Message, ...]:
    """Return a prompt with every {{name}} replaced at once: braces inside the texts are left alone."""
    return tuple(
        Message(turn.role, _NAME.sub(lambda name: texts[name[1]], turn.content))
        for turn in turns(prompt)
    )
