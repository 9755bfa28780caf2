"""A Hugging Face causal language model on this machine, behind the same interface as an endpoint.

Greedy, one request after another. Where a request has slots, the expected numbers 0-10 are read from one forward pass
instead of being written token by token: the logprob simulator of Bills et al. (2023). The text holds the word `unknown`
in every slot, so that no guess depends on another one. At each slot E = sum_v v P(v) / sum_v P(v), v = 0 ... 10, with
P(v) the probability that the text goes on with the number v there. Where the tokenizer writes 10 as `1` and `0`,
P(10) = P(1) P(0 | 1) and P(1) is lessened by it; the second factor costs one more token of computation at slots where
P(1) is not negligible.
"""

import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.acts.language import LanguageModel, load_language
from wsae.acts.loading import refuse_unable_to_continue
from wsae.acts.tokens import ids_behind
from wsae.core.errors import UserError
from wsae.evals.config import LlmConfig
from wsae.evals.interpret.asking import (
    TOP_LOGPROBS,
    Answer,
    AnswerToken,
    ChatMessage,
    Json,
    Llm,
    Request,
)


def open_llm(cfg: LlmConfig) -> Llm:
    """Return the endpoint or local model of the settings; nothing is asked yet.

    Raises UserError in one line: no endpoint, a package that is not installed, a key that cannot be one, no such model.
    """
    if not cfg.endpoint:
        raise UserError(
            "no language model: give --endpoint https://HOST/v1 --model NAME, or --endpoint local:MODEL"
        )
    package, extra = ("httpx", "interp") if cfg.local is None else ("transformers", "lm")
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; run: pip install 'wsae[{extra}]'")
    if cfg.local is not None:
        return LocalModel(cfg)
    from wsae.evals.interpret.endpoint import Endpoint

    return Endpoint(cfg)


UNKNOWN = "unknown\n"
_NEGLIGIBLE = 0.005
"""P(1) under which it cannot matter whether a 10 is meant: at most 0.05 of 10."""


def logits_at(model: Any, places: Sequence[int], length: int) -> dict[str, Any]:
    """Return the argument that spares a model the logits of all other places; nothing where it knows no such."""
    if len(places) == length or "logits_to_keep" not in inspect.signature(model.forward).parameters:
        return {}
    return {"logits_to_keep": torch.tensor(places, dtype=torch.int64)}


class SlotReader:
    """Reads slots from one forward pass of a causal language model."""

    def __init__(self, model: Any, tokenizer: Any, device: torch.device) -> None:
        self._model, self._tokenizer, self._device = model, tokenizer, device
        self.length = 0
        """Tokens run through the model."""
        self._digits = [ids_behind(tokenizer, str(v), "\t") for v in range(11)]

    def expected(self, prompt: list[int], slots: Sequence[str]) -> list[float]:
        """Return E at every slot of the continued prompt."""
        ids, places = list(prompt), []
        for slot in slots:
            ids += ids_behind(self._tokenizer, slot)
            places.append(len(ids) - 1)
            ids += ids_behind(self._tokenizer, UNKNOWN, "\t")
        self.length = len(ids)
        out = self._model(
            input_ids=self._tensor(ids), use_cache=True, **logits_at(self._model, places, len(ids))
        )
        logits = out.logits[0] if out.logits.shape[1] == len(places) else out.logits[0, places]
        probabilities = logits.float().softmax(-1).double()
        mass = torch.stack([probabilities[:, digits[0]] for digits in self._digits], 1)
        if len(self._digits[10]) > 1:  # a split 10 is part of P(1) and taken out of it
            mass[:, 10] = self._tens(places, mass[:, 1], out.past_key_values, held=len(ids))
            mass[:, 1] = (mass[:, 1] - mass[:, 10]).clamp_min(0)
        total = mass.sum(1)
        values = mass @ torch.arange(11, dtype=torch.float64, device=mass.device)
        smallest = torch.finfo(total.dtype).tiny
        return torch.where(total > 0, values / total.clamp_min(smallest), 0.0).tolist()

    def _tens(
        self, places: list[int], one: Float[Tensor, " slots"], past: Any, held: int
    ) -> Float[Tensor, " slots"]:
        """Return P(10) = P(1) P(0 | 1) at every slot, from the cache of `held` tokens."""
        ten = torch.zeros_like(one)
        first, zero = self._digits[1][0], self._digits[0][0]
        for i in reversed(range(len(places))):  # backwards: the cache is cut shorter and shorter
            if one[i] < _NEGLIGIBLE:
                continue
            past.crop(places[i] + 1 - held)  # negative: so many are removed
            out = self._model(input_ids=self._tensor([first]), past_key_values=past, use_cache=True)
            past, held = out.past_key_values, places[i] + 2
            self.length += 1
            ten[i] = one[i] * out.logits[0, -1].float().softmax(-1).double()[zero]
        return ten

    def _tensor(self, ids: list[int]) -> Tensor:
        return torch.tensor([ids], dtype=torch.int64, device=self._device)


_PLAIN = {"system": "", "user": "### Question\n", "assistant": "### Answer\n"}
"""How turns read where the model has no chat template."""


class LocalModel(Llm):
    """A causal language model that answers by greedy decoding."""

    def __init__(self, cfg: LlmConfig) -> None:
        self.language: LanguageModel = load_language(cfg.local or "", cfg.dtype, cfg.device)
        refuse_unable_to_continue(self.language.model)
        super().__init__(cfg, self.language.name)

    def question(self, request: Request) -> Json:
        """Return the model's files, messages and parameters."""
        return {
            "local": self.language.digest,
            "dtype": str(self.language.model.dtype),
            "messages": [message._asdict() for message in request.messages],
            "max_tokens": request.max_tokens + self.cfg.thinking_tokens,
            "logprobs": request.logprobs,
            # numbers were once read as a text of their own
            "slots": ["in place", *request.slots] if request.slots else [],
        }

    @torch.inference_mode()
    def answer_new(
        self, requests: Mapping[str, Request], done: Callable[[str, Answer], None]
    ) -> None:
        """Answer one after another."""
        longest = getattr(self.language.model.config, "max_position_embeddings", None)
        for key, request in requests.items():
            prompt = self._prompt(request.messages)
            cap = 0 if request.slots else request.max_tokens + self.cfg.thinking_tokens
            need = len(prompt) + cap
            if longest and need > longest:
                reason = f"longer than the model's {longest} positions"
                done(key, Answer("failed", reason=reason))
            elif not self.budget.take(need):
                done(key, Answer("not asked", reason="budget"))
            else:
                answer = (
                    self._read(prompt, request.slots)
                    if request.slots
                    else self._write(prompt, cap, request.logprobs)
                )
                self.budget.settle(need, answer.prompt_tokens + answer.completion_tokens)
                self.cache.save(key, self.question(request), answer)
                done(key, answer)

    def _prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a conversation up to where the model's turn begins."""
        tokenizer = self.language.tokenizer
        if tokenizer.chat_template is None:
            turns = [f"{_PLAIN[turn.role]}{turn.content}\n\n" for turn in messages]
            return tokenizer("".join(turns) + _PLAIN["assistant"])["input_ids"]

        def templated(messages: Sequence[ChatMessage]) -> list[int]:
            turns = [message._asdict() for message in messages]
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
            assert isinstance(text, str)
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        try:
            return templated(messages)
        except Exception as error:  # templates are programs: some refuse a system turn
            head, *rest = messages
            if head.role == "system" and rest:
                rest[0] = ChatMessage(rest[0].role, f"{head.content}\n\n{rest[0].content}")
            else:
                rest = messages
            try:
                return templated(rest)
            except Exception:
                raise UserError(
                    f"model {self.name}: its chat template refuses our turns ({type(error).__name__})"
                ) from error

    def _ids(self, ids: list[int]) -> Int64[Tensor, "1 length"]:
        return torch.tensor([ids], dtype=torch.int64, device=self.language.device)

    def _write(self, prompt: list[int], cap: int, logprobs: bool) -> Answer:
        """Continue greedily to an end token or the cap."""
        model, tokenizer = self.language.model, self.language.tokenizer
        listed = [getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id]
        ends = {end for ends in listed for end in (ends if isinstance(ends, list) else [ends])}
        written: list[int] = []
        tokens: list[AnswerToken] = []
        ids, past, finish = self._ids(prompt), None, "length"
        for _ in range(cap):
            last = logits_at(model, [ids.shape[1] - 1], ids.shape[1])
            out = model(input_ids=ids, past_key_values=past, use_cache=True, **last)
            past = out.past_key_values
            likely = out.logits[0, -1].float().log_softmax(-1)
            best = int(likely.argmax())
            if best in ends:
                finish = "stop"
                break
            written.append(best)
            if logprobs:
                tokens.append(self._token(best, likely))
            ids = self._ids([best])
        text = tokenizer.decode(written, skip_special_tokens=True)
        assert isinstance(text, str)
        if not text.strip():
            return Answer("failed", "", finish, "empty content", len(prompt), len(written))
        return Answer("answered", text, finish, "", len(prompt), len(written), tuple(tokens))

    def _token(self, chosen: int, logprobs: Float[Tensor, " vocabulary"]) -> AnswerToken:
        values, ids = logprobs.topk(min(TOP_LOGPROBS, len(logprobs)))
        top: dict[str, float] = {}
        for value, i in zip(values.tolist(), ids.tolist(), strict=True):
            text = str(self.language.tokenizer.decode([i]))
            top[text] = float(np.logaddexp(top[text], value)) if text in top else value
        text = str(self.language.tokenizer.decode([chosen]))
        return AnswerToken(text, top, len(text.encode()))

    def _read(self, prompt: list[int], slots: Sequence[str]) -> Answer:
        """Read the expected number at each slot."""
        reader = SlotReader(self.language.model, self.language.tokenizer, self.language.device)
        values = reader.expected(prompt, slots)
        text = "".join(f"{slot}{UNKNOWN}" for slot in slots)
        return Answer("answered", text, "stop", values=tuple(values), prompt_tokens=reader.length)
