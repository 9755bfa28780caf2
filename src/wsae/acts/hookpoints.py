"""Hook points of a model: found by name, and proved by a probe before any work.

The probe runs a handful of short inputs. It learns where batch and positions lie in what a hook reads, and refuses what
is not a row for each token: rows that do not depend on their own token, that change with another sequence or with the
padding, or that two passes over the same input give differently.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from wsae.acts.hooknames import HookPlace, Side, canonical_names, match, natural_key, short_name
from wsae.acts.loading import refuse_unloaded
from wsae.core.errors import UserError, is_out_of_memory

Inputs = dict[str, Any]
"""Keyword arguments of a forward pass; the first is the model's main input."""
Item = int | str | None
"""Where in an output or input the tensor lies: an index, a key or field; none: it is the tensor."""

SEES_LATER = "this model sees later tokens; next-token cross-entropy is not measured"
ROUNDED = (
    "this model's weights are quantised; its rows vary a little with the batch they are computed in"
)
_MAIN_KEYS = ("last_hidden_state", "logits")
_TOLERANCE = {torch.float16: 2e-2, torch.bfloat16: 5e-2}
"""Difference of a row, relative to its norm, that another batch's shape may make."""
_QUANTISED = 1e-1
"""The same where weights are quantised: in 8 bits the batch decides which columns stay in 16."""
_THIN = 4096
"""Values kept of each tensor of a long input."""


@runtime_checkable
class RowLayout(Protocol):
    """Where batch and positions lie in a tensor."""

    def rows(self, x: Tensor, size: tuple[int, ...]) -> Tensor | None:
        """Return [batch, positions, width], a view where it can be; none where x does not fit inputs of this size."""
        ...


class Probing(NamedTuple):
    """The inputs of a probe: the same but for one place, and the same again in another batch."""

    first: Inputs
    changed: Inputs
    """`first` with one place changed."""
    at: tuple[int, int | None]
    """Element of the batch, and position, that was changed."""
    other: Inputs
    """The first elements of `first` in a smaller batch; longer, with padding, where there are positions."""
    long: Inputs | None = None
    """An input as long as those to come."""


class Modality(NamedTuple):
    """How a kind of model is called, and how a module's output becomes rows."""

    inputs: Callable[[nn.Module], Probing]
    """Inputs for a probe, on the model's device."""
    layouts: Callable[[Tensor, Tensor, Probing], list[RowLayout]]
    """The layouts that the same tensor in `first` and in `other` allows."""
    wanted: str
    """The shapes that can be, in words."""
    explain: Callable[[nn.Module, Exception, Inputs], UserError]
    """What to say when the model does not take these inputs."""
    length_notes: Callable[[nn.Module, tuple[int, ...], int | None], list[str]]
    """What to note of an input of full length, by its shape and the number of learned positions."""


class HookPoint(NamedTuple):
    """A place that is read: canonical name, full path, width, rank in firing order, and how its tensor is found."""

    name: str
    path: str
    d_in: int
    order: int
    layout: RowLayout
    side: Side = "output"
    item: Item = None
    positions: int = 1
    """Rows that the probe's first input gave per element of the batch."""
    copied: bool = False
    """Whether the model changes the tensor afterwards, so that it has to be copied."""


class Probed(NamedTuple):
    """What a probe found."""

    hooks: list[HookPoint]
    causal: bool | None
    """Whether no output depends on a later token; none where there are no tokens."""
    limit: int | None = None
    """Tokens for which there are learned positions; none where there is no such table."""
    notes: tuple[str, ...] = ()
    """What a user should know before trusting results."""

    def record(self) -> dict[str, Any]:
        """Return what a store keeps of this."""
        layouts = {hook.name: str(hook.layout) for hook in self.hooks}
        found = {"layouts": layouts, "positions": self.limit}
        return {"causal": self.causal, "probe": found, "notes": list(self.notes)}


def probe(model: nn.Module, patterns: Iterable[str], modality: Modality) -> Probed:
    """Return the hook points that the patterns name, in natural order, after a few small forward passes.

    Raises UserError when a pattern matches nothing or means several modules, or a place does not run, runs twice or
    does not give the rows that its inputs want.
    """
    names = canonical_names(path for path, _ in model.named_modules())
    groups = [places(model, pattern) for pattern in patterns]
    given = modality.inputs(model)
    wanted = {place for group in groups for place in group}
    passes = _Passes(model, wanted, modality)
    # full length comes first: a short input may change the model's ways for good
    long = None if given.long is None else _run_long(passes, given)
    first = passes.run(given.first)
    running = {place for group in groups for place in _running(group, first.fired)}
    ordered = sorted(running, key=lambda place: (natural_key(place.path), place.side))
    for place in ordered:
        _check_firings(_named(names, place), first.fired[place])
    for place in ordered:
        refuse_unloaded(model, first.fired[place][0].seen, f"hook {_named(names, place)!r}")
    passes.places = running
    runs = _Runs(first, passes.run(given.first), passes.run(given.changed), passes.run(given.other))
    rounded = bool(getattr(model, "is_quantized", False))
    found = _Found(given, modality, runs, _QUANTISED if rounded else None)
    hooks = [found.hook(_named(names, place), place) for place in ordered]
    causal, limit = found.causal(), found.limit()
    notes = [SEES_LATER] if causal is False else []
    notes += [ROUNDED] if rounded else []
    if long is not None:
        notes += modality.length_notes(model, long.size, limit)
        _check_long(hooks, long, passes.run(long.inputs, thin=True, whole=False))
    return Probed(hooks, causal, limit, tuple(notes))


def places(model: nn.Module, pattern: str) -> list[HookPlace]:
    """Return the places of a model that a pattern names, whether they run or not; raises UserError as `match` does."""
    config = text_config(model)
    kind = str(getattr(config, "model_type", ""))
    if getattr(config, "do_layer_norm_before", True) is False:  # some OPT models: not as usual
        kind = ""
    return match(pattern, [path for path, _ in model.named_modules()], kind)


def tensor_in(value: object) -> Item:
    """Return where the activation lies in a module's output or input; raises ValueError where that is not clear.

    The first of a tuple; else `last_hidden_state` or `logits`; else the only tensor of floating point.
    """
    if isinstance(value, Tensor):
        return None
    if isinstance(value, tuple | list) and value and _is_float(value[0]):
        return 0
    parts = _parts(value)
    found: list[Item] = [key for key, part in parts.items() if _is_float(part)]
    chosen = next((key for key in _MAIN_KEYS if key in found), None)
    if chosen is None and len(found) == 1:
        chosen = found[0]
    if chosen is None:
        shown = (
            tuple(p.shape) if isinstance(p, Tensor) else type(p).__name__ for p in parts.values()
        )
        what = ", ".join(f"{key}: {part}" for key, part in zip(parts, shown, strict=True))
        raise ValueError(f"{type(value).__name__} of ({what})" if parts else type(value).__name__)
    return chosen


def taken(value: Any, item: Item) -> Any:
    """Return what lies at `item`."""
    if item is None:
        return value
    return getattr(value, item) if _has_fields(value) and isinstance(item, str) else value[item]


def put_back(value: Any, item: Item, new: Tensor) -> Any:
    """Return `value` with `new` at `item`; the rest is the same."""
    if item is None:
        return new
    if isinstance(item, int):
        parts = [new if i == item else part for i, part in enumerate(value)]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if _has_fields(value):
        return dataclasses.replace(value, **{item: new})
    return type(value)({**value, item: new})


def _parts(value: object) -> dict[Any, object]:
    if isinstance(value, tuple | list):
        return dict(enumerate(value))
    if isinstance(value, Mapping):
        return {**value}
    if _has_fields(value):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}  # pyright: ignore
    return {}


def _has_fields(value: object) -> bool:
    return dataclasses.is_dataclass(value) and not isinstance(value, Mapping | type)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def text_config(model: nn.Module) -> Any:
    """Return the config of the model, or of the language model in it."""
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", None)
    return text() if callable(text) else config


def _named(names: dict[str, str], place: HookPlace) -> str:
    return names[place.path] + (".input" if place.side == "input" else "")


def _running(group: list[HookPlace], fired: dict[HookPlace, list["_Firing"]]) -> list[HookPlace]:
    """Return the places of one pattern, without those of towers that do not run where another does.

    Raises UserError where modules of one short name run in several.
    """
    stacks = {_stack(place.path) for place in group if fired[place]}
    kept = [place for place in group if not stacks or _stack(place.path) in stacks]
    for place in kept:
        same = [p.path for p in kept if short_name(p.path) == short_name(place.path) and fired[p]]
        if len(same) > 1:
            raise UserError(
                f"hook {short_name(place.path)!r}: means {len(same)} modules that run; name one by its full "
                f"path: {', '.join(same[:4])}"
            )
    return kept


def _stack(path: str) -> str:
    return path.removesuffix(short_name(path))


class _Firing(NamedTuple):
    """One time that a place ran: its rank, and what was seen."""

    order: int
    value: object
    """The output or input; the tensor in it is `seen`."""
    item: Item
    seen: Tensor | None
    """A copy of the tensor as it was."""
    trouble: str
    """Why there is none."""


class _ProbePass(NamedTuple):
    """What one forward pass gave."""

    inputs: Inputs
    fired: dict[HookPlace, list[_Firing]]
    output: object
    tables: list[tuple[Tensor, int]]
    """Indices that were looked up in tables of vectors, and the rows that each table has."""

    @property
    def size(self) -> tuple[int, ...]:
        """Shape of the main input."""
        return tuple(next(iter(self.inputs.values())).shape)


class _Runs(NamedTuple):
    """The passes of a probe."""

    first: _ProbePass
    again: _ProbePass
    changed: _ProbePass
    other: _ProbePass


class BeyondTableError(IndexError):
    """A look-up behind the end of a table of `limit` positions; a GPU would not survive it."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the table of positions ends at {limit}")
        self.limit = limit


class _Lookups(torch.overrides.TorchFunctionMode):
    """Notes every look-up in a table of vectors: learned positions are one. Raises BeyondTableError behind its end."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ARG002
        if func is nn.functional.embedding:
            index, rows = args[0], len(args[1])
            self.seen.append((index, rows))
            if index.numel() and int(index.max()) >= rows:
                raise BeyondTableError(rows - int(index.min()))
        if func in (torch.gather, Tensor.gather) and len(args) > 2:  # positions in some models
            table, dim, index = args[:3]
            if index.numel() and int(index.max()) >= table.shape[dim]:
                raise IndexError(f"index {int(index.max())} in a table of {table.shape[dim]}")
        return func(*args, **(kwargs or {}))


class _AllSeenError(Exception):
    """Ends a pass of which nothing more is wanted."""


class _Passes:
    """Runs a model and notes what its places give."""

    def __init__(self, model: nn.Module, places: set[HookPlace], modality: Modality) -> None:
        self.model, self.places, self.modality = model, places, modality

    def run(self, inputs: Inputs, thin: bool = False, whole: bool = True) -> _ProbePass:
        """Run the model once, or until every place has run; `thin` keeps some values of each tensor only."""
        fired: dict[HookPlace, list[_Firing]] = {place: [] for place in self.places}
        count = 0

        def note(place: HookPlace, value: object) -> None:
            nonlocal count
            count += 1
            fired[place].append(_firing(count, value, thin))
            if not whole and all(fired.values()):
                raise _AllSeenError

        handles = [watch(self.model, place, note) for place in self.places]
        lookups, output = _Lookups(), None
        try:
            with torch.inference_mode(), lookups, contextlib.suppress(_AllSeenError):
                output = self.model(**inputs)
        except UserError:
            raise
        except Exception as error:
            if is_out_of_memory(error):
                raise
            raise self.modality.explain(self.model, error, inputs) from error
        finally:
            for handle in handles:
                handle.remove()
        return _ProbePass(inputs, fired, output, lookups.seen)


def watch(model: nn.Module, place: HookPlace, note: Callable[[HookPlace, Any], Any]) -> Any:
    """Call `note(place, value)` whenever the place runs; returns the handle.

    The value is the output; of an input the positional arguments, or the keyword arguments where none of the positional
    ones is a tensor. What `note` returns, unless none, takes the value's place.
    """
    module = model.get_submodule(place.path)
    if place.side == "output":
        return module.register_forward_hook(lambda _m, _i, out: note(place, out))

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        by_position = any(isinstance(arg, Tensor) for arg in args)
        new = note(place, args if by_position else _Keywords(kwargs))
        if new is None:
            return None
        return (new, kwargs) if by_position else (args, dict(new))

    return module.register_forward_pre_hook(before, with_kwargs=True)


class _Keywords(dict[str, Any]):
    """The keyword arguments of a call, in its order."""


def _firing(order: int, value: object, thin: bool) -> _Firing:
    try:
        item = None if isinstance(value, _Keywords) else tensor_in(value)
    except ValueError as error:
        return _Firing(order, value, None, None, str(error))
    if isinstance(value, _Keywords):
        item = next((key for key, part in value.items() if _is_float(part)), None)
        if item is None:
            trouble = f"keyword arguments {', '.join(value) or 'none'}"
            return _Firing(order, value, None, None, trouble)
    x = taken(value, item)
    if not _is_float(x):
        return _Firing(order, value, item, None, f"of {x.dtype} {tuple(x.shape)}")
    seen = x.detach()
    if thin and x.numel() > _THIN:
        seen = seen.flatten()[:: x.numel() // _THIN][:_THIN].view(-1, 16)
    return _Firing(order, value, item, seen.clone(), "")


def _check_firings(name: str, firings: list[_Firing]) -> None:
    if not firings:
        raise UserError(
            f"hook {name!r}: this module does not run in a forward pass; name one that does"
        )
    if len(firings) > 1:
        raise UserError(
            f"hook {name!r}: this module runs {len(firings)} times in a forward pass; name one that runs once"
        )


def _run_long(passes: _Passes, given: Probing) -> _ProbePass:
    """Run the input of full length; where that fails, a short one tells whether there are too few positions."""
    assert given.long is not None
    try:
        return passes.run(given.long, thin=True)
    except UserError as failed:
        short = passes.run(given.first)
        limit = positions_in(short.tables, short.size[1])
        if limit is None or next(iter(given.long.values())).shape[1] <= limit:
            raise
        beyond = passes.modality.explain(passes.model, BeyondTableError(limit), given.long)
        raise beyond from failed


class _Found:
    """Judges the passes of a probe, one place after another."""

    def __init__(
        self, given: Probing, modality: Modality, runs: _Runs, tolerance: float | None
    ) -> None:
        self.given, self.modality, self.runs, self.tolerance = given, modality, runs, tolerance
        self._sees_later = False

    def hook(self, name: str, place: HookPlace) -> HookPoint:
        """Return the hook point; raises UserError when its rows are not what they should be."""
        side = place.side
        firings = []
        for run in self.runs:
            _check_firings(name, run.fired[place])
            firings.append(run.fired[place][0])
            if firings[-1].seen is None:
                raise UserError(
                    f"hook {name!r}: its {side} is {firings[-1].trouble}, not one activation "
                    f"{self.modality.wanted}; name another module"
                )
        first, again, changed, other = (firing.seen for firing in firings)
        if first.shape != again.shape or (first.ndim and not _same(first, again)):
            raise UserError(not_repeatable(name))
        layout, a = self._arranged(name, side, first, changed, other)
        item, order = firings[0].item, firings[0].order
        self._look_back(a, layout.rows(changed, self.runs.changed.size))
        now = taken(firings[0].value, item)
        copied = not torch.equal(now.nan_to_num(), first.nan_to_num())
        return HookPoint(
            name, place.path, a.shape[-1], order, layout, side, item, a.shape[1], copied
        )

    def _arranged(
        self, name: str, side: Side, first: Tensor, changed: Tensor, other: Tensor
    ) -> tuple[RowLayout, Tensor]:
        """Return the layout that stands the trial, and the first pass's rows."""
        size = self.runs.first.size
        trouble = f", not {self.modality.wanted}"
        if len(size) == 2:
            trouble = f" for {size[0]} sequences of {size[1]} tokens{trouble}"
            if first.ndim == 2 and len(first) < size[0] * size[1]:
                trouble += " (an expert gets only the tokens that are sent to it)"
        for layout in self.modality.layouts(first, other, self.given):
            a = layout.rows(first, self.runs.first.size)
            b = layout.rows(changed, self.runs.changed.size)
            c = layout.rows(other, self.runs.other.size)
            if a is None or b is None or c is None:
                continue
            trouble = self._trouble(a, b, c)
            if not trouble:
                return layout, a
        raise UserError(
            f"hook {name!r}: its {side} is {tuple(first.shape)}{trouble}; name another module, for example the "
            "block it is in"
        )

    def _trouble(self, a: Tensor, b: Tensor, c: Tensor) -> str:
        """Return what is wrong with rows [batch, positions, width], or nothing."""
        if not bool(torch.isfinite(a).all()):  # found and named where rows are written
            return ""
        row, pos = self.given.at
        change = (a - b).nan_to_num().abs().amax(-1)
        others = torch.arange(len(a), device=a.device) != row
        noise, floor = float(change[others].max()), _floor(a)
        moved = _differ(a[others], b[others], self.tolerance)
        if _share(moved) > 0.5 or (pos is not None and bool(moved[:, pos].all())):
            return ", and its rows change with another sequence of the batch: they are not of one token each"
        own = change[row] if pos is None else change[row, pos]
        if float(own.max()) <= max(8 * noise, floor):
            return ", and its rows do not depend on their own token"
        both = c.shape[0], min(a.shape[1], c.shape[1])
        if _share(_differ(a[: both[0], : both[1]], c[: both[0], : both[1]], self.tolerance)) > 0.5:
            return ", and its rows change with the batch or the padding beside them"
        return ""

    def causal(self) -> bool | None:
        """Return whether neither the hooks nor the model's output depend on later tokens."""
        if self.given.at[1] is None:
            return None
        for key in _MAIN_KEYS:
            a, b = (
                run.output.get(key) if isinstance(run.output, Mapping) else None
                for run in (self.runs.first, self.runs.changed)
            )
            if isinstance(a, Tensor) and _is_float(a) and a.shape[:2] == self.runs.first.size:
                self._look_back(a, b)
        return not self._sees_later

    def _look_back(self, a: Tensor, b: Tensor | None) -> None:
        """Note whether rows before the changed place changed."""
        row, pos = self.given.at
        if pos is not None and b is not None:
            apart = (a - b).nan_to_num().abs()
            change = torch.atleast_3d(apart).amax(-1)  # ELECTRA gives a number a token
            others = torch.arange(len(a), device=a.device) != row
            least = max(8 * float(change[others].max()), _floor(a))
            self._sees_later |= bool((change[row, :pos] > least).any())

    def limit(self) -> int | None:
        """Return the tokens that the smallest table of learned positions has rows for."""
        if self.given.at[1] is None:
            return None
        return positions_in(self.runs.first.tables, self.runs.first.size[1])


def not_repeatable(name: str) -> str:
    """Return what to say of a hook whose rows differ between two passes over the same input."""
    return (
        f"hook {name!r}: two passes over the same input give different rows (dropout, a random choice of positions or "
        "projections, or a state that a pass leaves behind); switch that off in the model's config.json, or name a "
        "module before it"
    )


def positions_in(tables: list[tuple[Tensor, int]], seq: int) -> int | None:
    """Return how many tokens the smallest table looked up by position has rows for, none where there is none."""
    found = []
    for index, rows in tables:
        if index.ndim and index.numel() and index.shape[-1] == seq:
            each = index.reshape(-1, seq).long()
            start = int(each[0, 0])
            if bool((each == torch.arange(start, start + seq, device=each.device)).all()):
                found.append(rows - start)
    return min(found, default=None)


def _check_long(hooks: list[HookPoint], first: _ProbePass, again: _ProbePass) -> None:
    """Compare two passes of full length: some models choose positions at random only there."""
    for hook in hooks:
        place = HookPlace(hook.path, hook.side)
        a, b = (run.fired[place][0].seen for run in (first, again))
        value = taken(first.fired[place][0].value, hook.item)
        if hook.layout.rows(value, first.size) is None:
            batch, seq = first.size
            raise UserError(
                f"hook {hook.name!r}: its {hook.side} is {tuple(value.shape)} for {batch} sequence of {seq} tokens, "
                "not a row for each; name another module"
            )
        if a is None or b is None or a.shape != b.shape or not _same(a, b):
            raise UserError(not_repeatable(hook.name))


def _floor(x: Tensor) -> float:
    """Return a difference too small to count: rounding of values of this size."""
    return 0.25 * torch.finfo(x.dtype).eps * float(x.abs().nan_to_num(posinf=0.0).max())


def _differ(
    a: Float[Tensor, "*rows width"], b: Float[Tensor, "*rows width"], tolerance: float | None = None
) -> Bool[Tensor, "*rows"]:
    """Return where rows differ by more than the shape of a batch may make them."""
    if tolerance is None:
        tolerance = _TOLERANCE.get(a.dtype, 1e-3)
    a, b = a.double().nan_to_num(), b.double().nan_to_num()
    size = torch.maximum(a.norm(dim=-1), b.norm(dim=-1))
    return (a - b).norm(dim=-1) > tolerance * size.clamp_min(1e-3 * float(size.mean()) + 1e-300)


def _same(a: Float[Tensor, "*rows width"], b: Float[Tensor, "*rows width"]) -> bool:
    """Return whether two passes over one input agree, but for sums in another order and a few close decisions."""
    return _share(_differ(a, b, 1e-2 if a.dtype in _TOLERANCE else 1e-5)) <= 0.1


def _share(flags: Bool[Tensor, "*rows"]) -> float:
    return float(flags.double().mean()) if flags.numel() else 0.0
