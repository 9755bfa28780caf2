"""Expected numbers 0-10 at the slots of a text, all at once: the logprob simulator of Bills et al. (2023).

The text holds the word `unknown` in every slot, so that no guess depends on another one. At each slot
E = sum_v v P(v) / sum_v P(v), v = 0 ... 10, with P(v) the probability that the text goes on with the number v there.
Where the tokenizer writes 10 as `1` and `0`, P(10) = P(1) P(0 | 1) and P(1) is lessened by it; the second factor costs
one more token of computation at slots where P(1) is not negligible.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

UNKNOWN = "unknown\n"
_NEGLIGIBLE = 0.005
"""P(1) under which it cannot matter whether a 10 is meant: at most 0.05 of 10."""


def logits_at(model: Any, places: Sequence[int], length: int) -> dict[str, Any]:
    """Return the argument that spares a model the logits of all other places; nothing where it knows no such."""
    if len(places) == length or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    return {"logits_to_keep": torch.tensor(places, dtype=torch.int64)}


class Reader:
    """Reads slots from one forward pass of a causal language model."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self._model, self._tokenizer, self._device = model, tokenizer, device
        self.length = 0
        """Tokens run through the model."""
        self._digits = [self._plain(str(v)) for v in range(11)]

    def expected(self, prompt: list[int], slots: Sequence[str]) -> list[float]:
        """Return E at every slot of the continued prompt."""
        ids, places = list(prompt), []
        for slot in slots:
            ids += self._plain(slot)
            places.append(len(ids) - 1)
            ids += self._plain(UNKNOWN)
        self.length = len(ids)
        out = self._model(
            input_ids=self._tensor(ids), use_cache=True, **logits_at(self._model, places, len(ids))
        )
        logits = out.logits[0] if out.logits.shape[1] == len(places) else out.logits[0, places]
        probabilities = logits.float().softmax(-1).double()
        single = torch.stack([probabilities[:, d[0]] for d in self._digits[:10]], 1)
        ten = self._tens(ids, places, single[:, 1], probabilities, out.past_key_values)
        return _expectation(single, ten, split=self._split)

    @property
    def _split(self) -> bool:
        return len(self._digits[10]) > 1

    def _tens(
        self,
        ids: list[int],
        places: list[int],
        one: Float[Tensor, " slots"],
        probabilities: Float[Tensor, "slots vocabulary"],
        past: Any,
    ) -> Float[Tensor, " slots"]:
        """Return P(10) at every slot."""
        if not self._split:
            return probabilities[:, self._digits[10][0]]
        ten = torch.zeros_like(one)
        first, zero = self._digits[1][0], self._digits[0][0]
        held = len(ids)
        for i in reversed(range(len(places))):  # backwards: the cache is cut shorter and shorter
            if one[i] < _NEGLIGIBLE:
                continue
            past.crop(places[i] + 1 - held)  # negative: so many are removed
            out = self._model(input_ids=self._tensor([first]), past_key_values=past, use_cache=True)
            past, held = out.past_key_values, places[i] + 2
            self.length += 1
            ten[i] = one[i] * out.logits[0, -1].float().softmax(-1).double()[zero]
        return ten

    def _plain(self, text: str) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False)["input_ids"]

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self._device)


def _expectation(
    single: Float[Tensor, "slots 10"], ten: Float[Tensor, " slots"], split: bool
) -> list[float]:
    """Return sum_v v P(v) / sum_v P(v); a split 10 is part of P(1) and taken out of it."""
    mass = torch.cat([single, ten[:, None]], 1)
    if split:
        mass[:, 1] = (mass[:, 1] - ten).clamp_min(0)
    total = mass.sum(1)
    values = mass @ torch.arange(11, dtype=torch.float64, device=mass.device)
    return torch.where(
        total > 0, values / total.clamp_min(torch.finfo(total.dtype).tiny), 0.0
    ).tolist()
