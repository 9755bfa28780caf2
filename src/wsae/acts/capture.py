"""Read hook points during a forward pass that stops at the deepest one, or replace one during a full pass."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from wsae.acts.hooknames import HookPlace
from wsae.acts.hookpoints import (
    BeyondTableError,
    HookPoint,
    Inputs,
    Modality,
    Probing,
    RowLayout,
    places,
    probe,
    put_back,
    taken,
    text_config,
    watch,
)
from wsae.acts.loading import input_device
from wsae.core.errors import UserError, first_line


class TokenLayout(NamedTuple):
    """The axes of batch and positions; where they are one axis, whether the sequences lie one after another."""

    batch: int
    position: int
    by_sequence: bool = True

    def rows(self, x: Tensor, size: tuple[int, ...]) -> Float[Tensor, "batch seq width"] | None:
        """Return the rows as a view where the memory allows it; none where the axes are not of this size."""
        batch, seq = size[0], size[1]
        if x.ndim <= max(self.batch, self.position):
            return None
        if self.batch != self.position:
            if (x.shape[self.batch], x.shape[self.position]) != (batch, seq):
                return None
            return x.movedim((self.batch, self.position), (0, 1)).flatten(2)
        if x.shape[self.batch] != batch * seq:
            return None
        flat = x.movedim(self.batch, 0).flatten(1)
        if self.by_sequence:
            return flat.unflatten(0, (batch, seq))
        return flat.unflatten(0, (seq, batch)).transpose(0, 1)

    def back(self, rows: Float[Tensor, "batch seq width"], like: Tensor) -> Tensor:
        """Return rows arranged as `like`, which may have another number of sequences."""
        axes = {self.batch, self.position}
        rest = [n for axis, n in enumerate(like.shape) if axis not in axes]
        if self.batch != self.position:
            return rows.unflatten(2, rest).movedim((0, 1), (self.batch, self.position))
        ordered = rows if self.by_sequence else rows.transpose(0, 1)
        return ordered.flatten(0, 1).unflatten(1, rest).movedim(0, self.batch)

    def __str__(self) -> str:
        """Return it in words."""
        if self.batch == self.position:
            how = "sequence after sequence" if self.by_sequence else "position after position"
            return f"[tokens, width], {how}"
        if (self.batch, self.position) == (0, 1):
            return "[batch, sequence, width]"
        if (self.batch, self.position) == (1, 0):
            return "[sequence, batch, width]"
        return f"batch on axis {self.batch}, sequence on axis {self.position}"


def tokens(seq_len: int | None = None) -> Modality:
    """Return how language models are probed; `seq_len` is the length of the sequences to come, where it is known."""
    return Modality(
        lambda model: _token_inputs(model, seq_len),
        _token_layouts,
        "[batch, sequence, width]",
        _explain_tokens,
        _length_notes,
    )


def _token_layouts(first: Tensor, other: Tensor, given: Probing) -> list[RowLayout]:
    """Return the layouts under which the axes that changed between two inputs are batch and positions."""
    (b1, s1), (b2, s2) = (next(iter(i.values())).shape for i in (given.first, given.other))
    if first.ndim != other.ndim or first.ndim < 2:
        return []
    pairs = list(zip(first.shape, other.shape, strict=True))
    moved = [axis for axis, (a, b) in enumerate(pairs) if a != b]
    batch, position, both = (
        [axis for axis in moved if pairs[axis] == sizes]
        for sizes in ((b1, b2), (s1, s2), (b1 * s1, b2 * s2))
    )
    if len(moved) == 2 and len(batch) == len(position) == 1 and first.ndim > 2:
        return [TokenLayout(batch[0], position[0])]
    if len(moved) == len(both) == 1:
        return [TokenLayout(both[0], both[0], by) for by in (True, False)]
    return []


def _token_inputs(model: nn.Module, seq_len: int | None) -> Probing:
    """Return three sequences of five tokens, one with its fourth changed, and two of them padded to seven."""
    known = _config_limit(model)
    longer = max(3, min(7, known[1] if known else 7))
    seq = longer - 2
    pos = max(0, seq - 2)
    ids = _some_ids(model, 3 * seq + 1 + 4)
    first = ids[: 3 * seq].view(3, seq)
    changed = first.clone()
    changed[1, pos] = ids[3 * seq]
    other = torch.cat([first[:2], ids[3 * seq + 1 :].view(2, 2)], dim=1)
    mask = (torch.arange(longer) < seq).long().expand(2, longer)
    long = None if seq_len is None else _some_ids(model, seq_len)[None]
    device = input_device(model)

    def call(x: Tensor, attention: Tensor | None = None) -> Inputs:
        attention = None if attention is None else attention.to(device)
        return {"input_ids": x.to(device), "attention_mask": attention, "use_cache": False}

    whole = None if long is None else call(long)
    return Probing(call(first), call(changed), (1, pos), call(other, mask), whole)


def _some_ids(model: nn.Module, n: int) -> Tensor:
    """Return token ids in random order, none special, the first ones all different where there are so many."""
    get = getattr(model, "get_input_embeddings", None)
    table = next(get().parameters(), None) if callable(get) else None  # pyright: ignore
    vocabulary = 64 if table is None else len(table)
    special = special_ids(model)
    ids = [i for i in range(vocabulary) if i not in special] or list(range(vocabulary))
    quarter = len(ids) // 4 if len(ids) > 200 else 0  # the ends are often unused
    ids = torch.tensor(ids[quarter : len(ids) - quarter])
    order = torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))
    return ids[order].repeat(-(-n // len(ids)))[:n]


def special_ids(model: nn.Module) -> set[int]:
    """Return what a model's config calls ids of special tokens, those that stand for images among them."""
    found = set()
    for config in (getattr(model, "config", None), text_config(model)):
        for key, value in vars(config).items() if hasattr(config, "__dict__") else ():
            if key.endswith(("token_id", "token_index", "_index", "token_ids")):
                several = value if isinstance(value, list) else [value]
                found |= {i for i in several if type(i) is int}
    return found


def _config_limit(model: nn.Module) -> tuple[str, int] | None:
    """Return the name and value of what a config says about positions."""
    config = text_config(model)
    for key in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len"):
        value = getattr(config, key, None)
        if type(value) is int and value > 0:
            return key, value
    return None


def refuse_too_long(model: nn.Module, read: int, written: int = 0) -> None:
    """Raise UserError where a prompt's tokens, with those to write behind it, pass the model's last position."""
    known = _config_limit(model)
    if known and read + written > known[1]:
        more = f" and {written:,} to write" if written else ""
        raise UserError(
            f"prompt: {read:,} tokens{more} are more than the model's {known[1]:,} positions; shorten it"
        )


def _too_long(seq: int, limit: int, why: str) -> UserError:
    return UserError(
        f"--seq-len {seq}: the model has {limit} positions ({why}); give --seq-len {limit} or less"
    )


def _length_notes(model: nn.Module, size: tuple[int, ...], limit: int | None) -> list[str]:
    """Return a note on sequences longer than a model without learned positions was made for."""
    seq, known = size[1], _config_limit(model)
    if limit is None and known and seq > known[1]:
        return [
            f"sequences of {seq} tokens are longer than the model's {known[0]} {known[1]}; "
            "its activations beyond are not those it was trained for"
        ]
    return []


def _explain_tokens(model: nn.Module, error: Exception, inputs: Inputs) -> UserError:
    batch, seq = inputs["input_ids"].shape
    known = _config_limit(model)
    says = f"{known[0]} {known[1]}" if known else "the rows of its table"
    if isinstance(error, BeyondTableError):
        return _too_long(seq, error.limit, says)
    if known and seq > known[1]:
        return _too_long(seq, known[1], says)
    return UserError(
        f"model: does not run on {batch} sequences of {seq} tokens ({type(error).__name__}: {first_line(error)}); "
        "it may not be a language model that reads token ids alone"
    )


class _DeepestReached(Exception):  # noqa: N818  (control flow, not an error)
    """Ends a forward pass whose remaining layers nobody reads."""


class Capture:
    """Activations at several hook points from one forward pass, stopped once the last of them has fired."""

    def __init__(self, model: nn.Module, hooks: Sequence[HookPoint]) -> None:
        self.hooks = {hook.name: hook.d_in for hook in hooks}
        self._model = model
        self._points = list(hooks)
        self._deepest = max(hooks, key=lambda hook: hook.order).name

    def __call__(
        self, ids: Int[Tensor, "batch seq"], mask: Bool[Tensor, "batch seq"] | None = None
    ) -> dict[str, Float[Tensor, "batch seq _"]]:
        """Return each hook's rows on tokens; `mask` is false at padding (none: no padding, a little faster)."""
        attention = None if mask is None else mask.long()
        return self.read({"input_ids": ids, "attention_mask": attention, "use_cache": False})

    @torch.inference_mode()
    def read(self, inputs: Mapping[str, Any]) -> dict[str, Float[Tensor, "batch positions _"]]:
        """Return each hook's rows when the model is called with these keyword arguments, its main input first."""
        seen: dict[str, Tensor] = {}
        size = tuple(next(iter(inputs.values())).shape)

        def keep(hook: HookPoint, value: Any) -> None:
            rows = rows_of(hook, value, size)
            seen[hook.name] = rows.clone() if hook.copied else rows
            if hook.name == self._deepest:
                raise _DeepestReached

        with contextlib.ExitStack() as watched, contextlib.suppress(_DeepestReached):
            for hook in self._points:
                watched.enter_context(replaced(self._model, hook, partial(keep, hook)))
            self._model(**inputs)
        for name in self.hooks:
            if name not in seen:
                raise UserError(f"hook {name!r}: did not run on this batch; name another module")
        return {name: seen[name] for name in self.hooks}


def rows_of(
    hook: HookPoint, value: Any, size: tuple[int, ...]
) -> Float[Tensor, "batch positions _"]:
    """Return the rows in a module's output or input; raises UserError where they are not as in the probe."""
    x = taken(value, hook.item)
    rows = hook.layout.rows(x, size) if isinstance(x, Tensor) else None
    if rows is None:
        shape = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise UserError(
            f"hook {hook.name!r}: its {hook.side} is {shape} for an input of {size}, where {hook.layout} "
            "was found before; name another module"
        )
    return rows


def token_positions(
    real: Bool[Tensor, "batch seq"], start: Int64[Tensor, "batch 1"] | int = 0
) -> Int64[Tensor, "batch seq"]:
    """Return the places of real tokens in their sequences, counted from `start`; -1 at padding."""
    return (real.cumsum(1) - 1 + start).masked_fill(~real, -1)


class Call(NamedTuple):
    """One call of a model on tokens."""

    ids: Int[Tensor, "batch seq"] | None
    """The tokens; none where the model was given their vectors."""
    positions: Int64[Tensor, "batch seq"]
    """Places from the start of each sequence, what a cache holds counted and padding left out; -1 at padding."""
    read: Float[Tensor, "batch seq _"] | None = None
    """The rows of another hook that are read where those of one are replaced; none: they are the same."""

    @classmethod
    def of(cls, inputs: Mapping[str, Any], past: Int64[Tensor, "batch 1"] | int = 0) -> "Call":
        """Read the keyword arguments of a call; positional ones must have been named.

        `past` are the tokens that a state has read which does not count them; a cache does.
        """
        ids, vectors = inputs.get("input_ids"), inputs.get("inputs_embeds")
        given = ids if isinstance(ids, Tensor) else vectors
        assert isinstance(given, Tensor), "a model is called with tokens, or with their vectors"
        batch, seq = given.shape[:2]
        cache = inputs.get("past_key_values")
        past = past if cache is None else int(cache.get_seq_length())
        mask, given_places = inputs.get("attention_mask"), inputs.get("position_ids")
        if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= seq:
            counted = token_positions(mask != 0, past if mask.shape[1] == seq else 0)[:, -seq:]
        elif isinstance(given_places, Tensor) and given_places.ndim == 2:
            counted = given_places.expand(batch, seq)
        else:
            counted = (past + torch.arange(seq, device=given.device)).expand(batch, seq)
        return cls(ids if isinstance(ids, Tensor) else None, counted.to(given.device))


class _Calls:
    """The call of a model that runs now."""

    def __init__(self, model: nn.Module) -> None:
        names = [name for name in inspect.signature(model.forward).parameters if name != "args"]
        self._names = names or ["input_ids"]
        self.now: Call | None = None
        self._state: object = None
        """What a recurrent model (Mamba, RWKV) gave to go on from; it has read `_past` tokens of each sequence."""
        self._past: Tensor | int = 0

    def begin(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self._names, args, strict=False)), **kwargs}
        state = inputs.get("cache_params", inputs.get("state"))
        goes_on = state is not None and state is self._state
        self.now = Call.of(inputs, self._past if goes_on else 0)

    def end(self, _module: nn.Module, _args: object, output: object) -> None:
        if self.now is not None:
            self._state = getattr(output, "cache_params", getattr(output, "state", None))
            self._past = self.now.positions.amax(1, keepdim=True) + 1
        self.now = None


Swap = Callable[[Float[Tensor, "batch seq d_in"], Call], Tensor | None]
"""What to put in place of a hook's rows, of as many sequences as it likes; none leaves them as they are."""


@contextlib.contextmanager
def splice(
    model: nn.Module, hook: str | HookPoint, replace: Swap, read: HookPoint | None = None
) -> Iterator[None]:
    """Within the context, `replace(x, call)` takes the place of the hook's rows x in every pass on tokens.

    The rest of an output or input passes unchanged; the result is cast to the dtype of x. A hook that is named is
    probed first. With `read`, that hook's rows, which come up earlier in the pass, are `call.read`. Raises UserError
    when no module, or more than one, has this name, and inside when the module runs outside a call of `model`, or
    before the one that is read.
    """
    point = hook if isinstance(hook, HookPoint) else one_hook(model, hook)
    calls = _Calls(model)

    def swap(value: Any) -> Any:
        if (call := calls.now) is None:
            raise UserError(f"hook {point.name!r}: ran outside a call of its model; call that one")
        x = rows_of(point, value, tuple(call.positions.shape))
        if read is not None and call.read is None:
            raise UserError(
                f"hook {point.name!r}: runs before {read.name!r}; name them the other way round"
            )
        new = replace(x, call)
        if new is None:
            return None
        assert new.shape[1:] == x.shape[1:], f"{tuple(new.shape)} in place of {tuple(x.shape)}"
        assert isinstance(point.layout, TokenLayout), "rows of tokens"
        return put_back(
            value, point.item, point.layout.back(new.to(x.dtype), taken(value, point.item))
        )

    def keep(value: Any) -> None:
        if (call := calls.now) is not None and read is not None:
            calls.now = call._replace(read=rows_of(read, value, tuple(call.positions.shape)))

    with contextlib.ExitStack() as stack:
        if read is not None:
            stack.enter_context(replaced(model, read, keep))
        first = model.register_forward_pre_hook(calls.begin, with_kwargs=True, prepend=True)
        stack.callback(first.remove)
        stack.callback(model.register_forward_hook(calls.end, always_call=True).remove)
        stack.enter_context(replaced(model, point, swap))
        yield


_PROBE_TOKENS = 32
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Largest difference of logits allowed to the widened pass, relative to the largest logit."""


@torch.no_grad()
def logits_by_row(model: nn.Module, hook: HookPoint, ids: Int64[Tensor, " length"]) -> int:
    """Return the number of logits per token where a batch may be made at the hook, and reach the logits row by row.

    The layers before it then run on one sequence for all. 0 where several sequences do not give a plain pass's logits.
    """
    ids = ids[:_PROBE_TOKENS].to(input_device(model))
    plain = model(input_ids=ids[None], use_cache=False).logits
    try:
        with splice(model, hook, lambda x, _call: x.repeat(2, 1, 1)):
            wide = model(input_ids=ids[None], use_cache=False).logits
    except (
        RuntimeError,
        ValueError,
        IndexError,
        AssertionError,
    ):  # shapes do not broadcast: one by one always works
        return 0
    if wide.shape != (2, *plain.shape[1:]):
        return 0
    tolerance = _PROBE_TOLERANCE.get(plain.dtype, 1e-3) * float(plain.abs().max())
    return plain.shape[-1] if float((wide - plain).abs().max()) <= tolerance else 0


def one_hook(model: nn.Module, name: str) -> HookPoint:
    """Return the one hook point that a name or pattern means, probed; raises UserError where it means several."""
    return hooks_named(model, [name])[name]


def hooks_named(model: nn.Module, names: Iterable[str]) -> dict[str, HookPoint]:
    """Return the one hook point of each name, all probed at once; raises UserError where one means several."""
    names = list(names)
    known = {HookPlace(hook.path, hook.side): hook for hook in probe(model, names, tokens()).hooks}
    found = {}
    for name in names:
        hooks = [known[place] for place in places(model, name) if place in known]
        if len(hooks) > 1:
            few = ", ".join(hook.name for hook in hooks[:3])
            raise UserError(f"hook {name!r}: names {len(hooks)} modules ({few}, ...); name one")
        found[name] = hooks[0]
    return found


@contextlib.contextmanager
def replaced(model: nn.Module, hook: HookPoint, swap: Callable[[Any], Any]) -> Iterator[None]:
    """Within the context, `swap(value)` takes the place of what the module gives, or takes, unless it is none."""
    handle = watch(model, HookPlace(hook.path, hook.side), lambda _place, value: swap(value))
    try:
        yield
    finally:
        handle.remove()
