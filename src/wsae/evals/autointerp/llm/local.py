"""A Hugging Face causal language model on this machine, behind the same interface as an endpoint.

Greedy, one request after another, answers kept on disk like an endpoint's. Where a request has slots, the expected
numbers are read from one forward pass instead of being written token by token.
"""

import importlib.util
import inspect
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.acts.language import LanguageModel, load_language
from wsae.acts.loading import refuse_unable_to_continue
from wsae.core.errors import UserError
from wsae.core.files import digest
from wsae.core.progress import Progress, quiet
from wsae.evals.autointerp.llm.client import Budget, Cache
from wsae.evals.autointerp.llm.config import LlmConfig
from wsae.evals.autointerp.llm.types import Answer, AnswerToken, ChatMessage, Llm, Request

# A language model from its settings.


def open_llm(cfg: LlmConfig) -> Llm:
    """Return the endpoint or local model of the settings; nothing is asked yet.

    Raises UserError in one line: no endpoint, a package that is not installed, a key that cannot be one, no such model.
    """
    if not cfg.endpoint:
        raise UserError(
            "no language model: give --endpoint https://HOST/v1 --model NAME, or --endpoint local:MODEL"
        )
    if cfg.local is not None:
        _need("transformers", "lm")

        return LocalModel(cfg)
    _need("httpx", "interp")
    from wsae.evals.autointerp.llm.client import Endpoint

    return Endpoint(cfg)


def _need(package: str, extra: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{package} is not installed; run: pip install 'wsae[{extra}]'")


# Expected numbers 0-10 at the slots of a text, all at once: the logprob simulator of Bills et al.
# (2023).
#
# The text holds the word `unknown` in every slot, so that no guess depends on another one. At each
# slot E = sum_v v P(v) / sum_v P(v), v = 0 ... 10, with P(v) the probability that the text goes on
# with the number v there. Where the tokenizer writes 10 as `1` and `0`, P(10) = P(1) P(0 | 1) and
# P(1) is lessened by it; the second factor costs one more token of computation at slots where P(1)
# is not negligible.

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


TOP_LOGPROBS = 20
_PLAIN = {"system": "", "user": "### Question\n", "assistant": "### Answer\n"}
"""How turns read where the model has no chat template."""


class LocalModel:
    """A causal language model that answers by greedy decoding."""

    def __init__(self, cfg: LlmConfig, language: LanguageModel | None = None) -> None:
        assert cfg.local is not None or language is not None
        self.cfg = cfg
        self.language = language or load_language(cfg.local or "", cfg.dtype, cfg.device)
        refuse_unable_to_continue(self.language.model)
        self.budget = Budget(cfg.max_requests, cfg.max_tokens)
        self._cache = Cache(Path(cfg.cache))

    @property
    def name(self) -> str:
        """The model's short name."""
        return self.language.name

    def key(self, request: Request) -> str:
        """Return the content hash of a request: the model's files, messages and parameters."""
        return digest(self._asked(request))

    def peek(self, request: Request) -> Answer | None:
        """Return the answer on disk, if there is one."""
        return self._cache.load(self.key(request))[0]

    def ask(
        self, requests: Sequence[Request], task: str = "ask", progress: Progress = quiet
    ) -> list[Answer]:
        """Return one answer per request, in order."""
        out = []
        with progress(task, len(requests), "requests") as tick:
            for request in requests:
                key = self.key(request)
                found, damaged = self._cache.load(key)
                out.append(found if found is not None else self._answer(key, request, damaged))
                tick(1)
        return out

    def _answer(self, key: str, request: Request, damaged: str) -> Answer:
        prompt = self._prompt(request.messages)
        cap = 0 if request.slots else request.max_tokens + self.cfg.thinking_tokens
        need = len(prompt) + cap
        longest = getattr(self.language.model.config, "max_position_embeddings", None)
        if longest and need > longest:
            return Answer(
                "failed", reason=f"longer than the model's {longest} positions", damaged=damaged
            )
        if not self.budget.take(need):
            self.budget.closed = True
            return Answer("not asked", reason="budget", damaged=damaged)
        with torch.inference_mode():
            answer = (
                self._read(prompt, request) if request.slots else self._write(prompt, request, cap)
            )
        self.budget.settle(need, answer.prompt_tokens + answer.completion_tokens)
        self._cache.save(key, self._asked(request), answer)
        return replace(answer, damaged=damaged)

    def _asked(self, request: Request) -> dict[str, Any]:
        return {
            "local": self.language.digest,
            "dtype": str(self.language.model.dtype),
            "messages": [message._asdict() for message in request.messages],
            "max_tokens": request.max_tokens + self.cfg.thinking_tokens,
            "logprobs": request.logprobs,
            "slots": list(request.slots),
        }

    def _prompt(self, messages: Sequence[ChatMessage]) -> list[int]:
        """Return the ids of a conversation up to where the model's turn begins."""
        tokenizer = self.language.tokenizer
        if tokenizer.chat_template is None:
            turns = [f"{_PLAIN[turn.role]}{turn.content}\n\n" for turn in messages]
            return tokenizer("".join(turns) + _PLAIN["assistant"])["input_ids"]
        try:
            text = self._templated(messages)
        except Exception as error:  # templates are programs: some refuse a system turn
            try:
                text = self._templated(_merged(messages))
            except Exception:
                raise UserError(
                    f"model {self.name}: its chat template refuses our turns ({type(error).__name__})"
                ) from error
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def _templated(self, messages: Sequence[ChatMessage]) -> str:
        turns = [message._asdict() for message in messages]
        text = self.language.tokenizer.apply_chat_template(
            turns, tokenize=False, add_generation_prompt=True
        )
        assert isinstance(text, str)
        return text

    def _ids(self, ids: list[int]) -> Int64[Tensor, "1 length"]:
        return torch.tensor([ids], dtype=torch.int64, device=self.language.device)

    def _write(self, prompt: list[int], request: Request, cap: int) -> Answer:
        """Continue greedily to an end token or the cap."""
        model, tokenizer = self.language.model, self.language.tokenizer
        ends = _end_ids(model, tokenizer.eos_token_id)
        written: list[int] = []
        tokens: list[AnswerToken] = []
        ids, past, finish = self._ids(prompt), None, "length"
        for _ in range(cap):
            last = logits_at(model, [ids.shape[1] - 1], ids.shape[1])
            out = model(input_ids=ids, past_key_values=past, use_cache=True, **last)
            past = out.past_key_values
            logprobs = out.logits[0, -1].float().log_softmax(-1)
            best = int(logprobs.argmax())
            if best in ends:
                finish = "stop"
                break
            written.append(best)
            if request.logprobs:
                tokens.append(self._token(best, logprobs))
            ids = self._ids([best])
        text = tokenizer.decode(written, skip_special_tokens=True)
        assert isinstance(text, str)
        if text.strip():
            answer = Answer("answered", text, finish, tokens=tuple(tokens))
        else:
            answer = Answer("failed", finish=finish, reason="empty content")
        return answer.counted(len(prompt), len(written))

    def _token(self, chosen: int, logprobs: Float[Tensor, " vocabulary"]) -> AnswerToken:
        values, ids = logprobs.topk(min(TOP_LOGPROBS, len(logprobs)))
        top: dict[str, float] = {}
        for value, i in zip(values.tolist(), ids.tolist(), strict=True):
            text = str(self.language.tokenizer.decode([i]))
            top[text] = _log_add(top[text], value) if text in top else value
        text = str(self.language.tokenizer.decode([chosen]))
        return AnswerToken(text, top, len(text.encode()))

    def _read(self, prompt: list[int], request: Request) -> Answer:
        """Read the expected number at each slot."""
        reader = SlotReader(self.language.model, self.language.tokenizer, self.language.device)
        values = reader.expected(prompt, request.slots)
        text = "".join(f"{slot}{UNKNOWN}" for slot in request.slots)
        return Answer("answered", text, "stop", values=tuple(values), prompt_tokens=reader.length)


def _log_add(a: float, b: float) -> float:
    return max(a, b) + math.log1p(math.exp(-abs(a - b)))


def _end_ids(model: Any, tokenizer_end: object) -> set[int]:
    listed = [getattr(model.generation_config, "eos_token_id", None), tokenizer_end]
    flat = [i for entry in listed for i in (entry if isinstance(entry, list) else [entry])]
    return {i for i in flat if isinstance(i, int)}


def _merged(messages: Sequence[ChatMessage]) -> list[ChatMessage]:
    """Put the system's words at the head of the first user turn."""
    head, *rest = messages
    if head.role != "system" or not rest:
        return [*messages]
    first, *others = rest
    return [ChatMessage(first.role, f"{head.content}\n\n{first.content}"), *others]
