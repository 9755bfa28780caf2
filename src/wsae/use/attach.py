"""SAEs in a running model: their latents of every pass, and edits of these that act on the rest of the pass.

    h' = h + sum_j (z'_j - z_j) W_dec[j]        with the error term: what the SAE does not explain stays as it is
    h' = z' @ W_dec + b_dec                     without

Where an SAE normalises its rows, W_dec[j] counts by the row's own scale. The sum is over the edited latents, so that
without edits a pass is the model's own to the bit. Tokens that training left out (first, special, padding, attention
sinks; `wsae.acts.flow.SkipRule`) are left alone.
"""

import contextlib
import math
import operator
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor, nn

from wsae.acts.capture import Call, hooks_named, special_ids, splice
from wsae.acts.config import HarvestConfig
from wsae.acts.flow import KEPT, PADDING, REASONS, SkipRule
from wsae.acts.hooknames import among
from wsae.acts.hookpoints import HookPoint
from wsae.acts.language import LanguageModel
from wsae.acts.store import Store
from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError, nearest
from wsae.kernels.eager import SparseCode
from wsae.run import Run
from wsae.sae.model import SAE, Encoder, an_sae


class Codes(NamedTuple):
    """What an SAE found in one pass, a row for every token, in order: [batch, seq]."""

    code: SparseCode
    """The latents of all tokens, sequence after sequence; none where the SAE was left out."""
    d_sae: int
    call: Call
    """The tokens and their positions."""
    reasons: Int[Tensor, "batch seq"]
    """Why a token was left out (`wsae.acts.flow.REASONS`); 0 where it was kept."""

    @property
    def kept(self) -> Bool[Tensor, "batch seq"]:
        """Return where the SAE was applied."""
        return self.reasons == KEPT

    def latent(self, latent: int) -> Float[Tensor, "batch seq"]:
        """Return one latent's activations; raises UserError for one that the SAE does not have."""
        if not 0 <= latent < self.d_sae:
            raise UserError(
                f"latent {latent}: the SAE has {self.d_sae:,} latents, 0 to {self.d_sae - 1}"
            )
        here = self.code.indices == latent
        z = self.code.values.new_zeros(self.reasons.numel())
        z = z.index_put((self.code.rows()[here],), self.code.values[here])
        return z.view(self.reasons.shape)

    def dense(self) -> Float[Tensor, "batch seq d_sae"]:
        """Return all activations: much memory."""
        return self.code.dense(self.d_sae).view(*self.reasons.shape, self.d_sae)


Condition = Callable[[Codes], Bool[Tensor, "batch seq"]]
"""Says of each token whether an edit applies, as `lambda acts: acts.latent(77) > 1`."""


@dataclass(frozen=True)
class Edit:
    """A change of one latent's activation z; z' is what the kind makes of it and of `value`."""

    latent: int
    value: float
    _: KW_ONLY
    hook: str | None = None
    """The hook whose SAE is meant; none: the only one."""
    positions: int | Sequence[int] | None = None
    """Where, from the start of each sequence, padding not counted; none: everywhere."""
    condition: Condition | None = None

    def __post_init__(self) -> None:
        """Raise UserError for numbers that are not whole, a value that is not finite, a position before the start."""
        try:  # a tensor is a key of its own: of two edits of one latent the first would be lost
            object.__setattr__(self, "latent", operator.index(self.latent))
        except TypeError as error:
            raise UserError(f"{self}: give the latent's number") from error
        try:
            finite = math.isfinite(self.value)
        except (TypeError, ValueError):  # a word, several numbers
            finite = False
        if not finite:
            raise UserError(f"{self}: {self.value!r} is no finite number")
        if any(place < 0 for place in self.places or ()):
            raise UserError(f"{self}: positions count from 0, the start of the sequence")

    def __str__(self) -> str:
        """Name it in a message."""
        return f"edit {type(self).__name__} of latent {self.latent}"

    @property
    def places(self) -> tuple[int, ...] | None:
        """Return the positions as numbers."""
        if self.positions is None:
            return None
        found = np.atleast_1d(np.asarray(self.positions))
        if found.size and found.dtype.kind not in "iu":
            raise UserError(f"{self}: positions {self.positions!r} are no whole numbers")
        return tuple(found.tolist())

    def new(self, z: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """Return z'."""
        raise NotImplementedError


class Set(Edit):
    """z' = value."""

    def new(self, z: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """Return value everywhere."""
        return torch.full_like(z, self.value)


class Add(Edit):
    """z' = z + value."""

    def new(self, z: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """Return z + value."""
        return z + self.value


class Scale(Edit):
    """z' = value z."""

    def new(self, z: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """Return value z."""
        return z * self.value


class Clamp(Edit):
    """z' = min(z, value)."""

    def new(self, z: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """Return z, or value where that is less."""
        return z.clamp(max=self.value)


@dataclass(frozen=True)
class Zero(Edit):
    """z' = 0: the latent is ablated."""

    value: float = field(default=0.0, init=False)

    def new(self, z: Float[Tensor, "batch seq"]) -> Float[Tensor, "batch seq"]:
        """Return 0 everywhere."""
        return torch.zeros_like(z)


class _Site:
    """One SAE at its hook: what it finds in a pass, and what the edits make of the hook's rows.

    A transcoder finds it in the rows of `read`, earlier in the pass.
    """

    def __init__(
        self,
        point: HookPoint,
        sae: SAE,
        rule: SkipRule | None,
        error: bool,
        read: HookPoint | None = None,
    ) -> None:
        self.point, self.sae, self._rule, self._error = point, sae, rule, error
        self.read = read
        self._encoder = Encoder(sae)
        self.codes: Codes | None = None
        self.edits: list[Edit] = []
        self._idle: list[tuple[Edit, dict[int, str]]] = []
        """Positions of edits at which they had no effect yet, and why."""

    def edit(self, edits: list[Edit]) -> None:
        """Put these edits in place of the earlier ones."""
        self.edits = edits
        self._idle = [(e, dict.fromkeys(e.places, "is not there")) for e in edits if e.places]

    def check(self) -> None:
        """Raise UserError for a position at which an edit had no effect in any pass."""
        if self.codes is None:
            return
        for edit, places in self._idle:
            for place, why in places.items():
                last = int(self.codes.call.positions.max())
                raise UserError(f"{edit}: position {place} {why}; the last of the pass was {last}")

    def __call__(self, x: Float[Tensor, "batch seq d_out"], call: Call) -> Tensor | None:
        """Return the rows with the edits, none where nothing changes."""
        device = self.sae.W_dec.device
        rows = x.to(device).flatten(0, 1)
        ids, before = (None if x is None else x.to(device) for x in (call.ids, call.read))
        call = Call(ids, call.positions.to(device), before)
        read = rows if before is None else before.flatten(0, 1)
        seen = {(self.read or self.point).name: read, self.point.name: rows}
        reasons = self._reasons(seen, call)
        kept = (reasons == KEPT).nonzero()[:, 0]
        read = read if len(kept) == len(rows) else read[kept]
        code = self._encode(read)
        shape = call.positions.shape
        codes = Codes(_spread(code, kept, len(rows)), self.sae.cfg.d_sae, call, reasons.view(shape))
        self.codes = codes
        for _, places in self._idle:
            for place in list(places):
                found = codes.reasons[codes.call.positions == place].tolist()
                if KEPT in found:
                    del places[place]
                elif found:
                    places[place] = f"is left alone ({REASONS[found[0]]})"
        new = rows.to(torch.promote_types(rows.dtype, self.sae.W_dec.dtype))
        if not self._error:
            new = new.index_copy(0, kept, self.sae.decode_code(code, read).to(new.dtype))
        if self.edits:
            moves = self._moves(codes)
            factor = self.sae.normalised(rows.to(self.sae.dtype)).factor
            moved = (factor[:, None] * moves.change) @ self.sae.W_dec[moves.latents]
            new = new + moved.to(new.dtype)
            self._refuse_overflow(new.to(x.dtype), rows, moves, call)
        elif self._error:
            return None
        return new.view(x.shape).to(x.device)

    def _reasons(
        self, rows: dict[str, Float[Tensor, "tokens _"]], call: Call
    ) -> Int[Tensor, " tokens"]:
        ids = torch.full_like(call.positions, -1) if call.ids is None else call.ids
        rule = self._rule
        if rule is None:
            return torch.where(call.positions < 0, PADDING, KEPT).flatten()
        reasons = rule.by_token(ids, call.positions).flatten()
        norms = {n: torch.linalg.vector_norm(x.detach().float(), dim=1) for n, x in rows.items()}
        known = rule.medians is not None and norms.keys() <= rule.medians.keys()
        if not known and bool((reasons == KEPT).any()):
            rule.calibrate(norms, reasons)
            known = True
        return rule.by_norm(norms, reasons) if known else reasons

    def _encode(self, rows: Float[Tensor, "kept d_in"]) -> SparseCode:
        if torch.is_grad_enabled():
            return self.sae.encode_code(rows)
        return self._encoder(rows.to(self.sae.W_dec.dtype))

    def _refuse_overflow(
        self,
        new: Float[Tensor, "tokens d_out"],
        old: Float[Tensor, "tokens d_out"],
        moves: "_Moves",
        call: Call,
    ) -> None:
        """Raise UserError for the first row that edits made too large, as the norms see it that models square."""
        bad = ~new.float().square().sum(1).isfinite()
        if not bool(bad.any()):
            return
        row = int(bad.nonzero()[0])
        if bool(old[row].float().square().sum().isfinite()):
            latent = moves.latents[int(moves.change[row].abs().nan_to_num(math.inf).argmax())]
            edit = next(edit for edit in self.edits if edit.latent == latent)
            raise UserError(
                f"{edit}: at position {int(call.positions.flatten()[row])} the activation becomes too large for the "
                f"model (hook {self.point.name}); give a smaller value"
            )

    def _moves(self, codes: Codes) -> "_Moves":
        """Return z'_j - z_j of the edited latents j."""
        old: dict[int, Tensor] = {}
        new: dict[int, Tensor] = {}
        for edit in self.edits:
            if edit.latent not in old:
                old[edit.latent] = new[edit.latent] = codes.latent(edit.latent)
            z, where = new[edit.latent], codes.kept
            if edit.places is not None:
                places = torch.tensor(edit.places, device=where.device)
                where = where & torch.isin(codes.call.positions, places)
            if edit.condition is not None:
                where = where & edit.condition(codes)
            new[edit.latent] = torch.where(where, edit.new(z), z)
        return _Moves([*old], torch.stack([(new[j] - old[j]).flatten() for j in old], dim=1))


class _Moves(NamedTuple):
    """By how much edits move latents at each token."""

    latents: list[int]
    change: Float[Tensor, "tokens latents"]


class Attached:
    """What `attach` gives: `acts[hook]` are the latents of the last pass, `edit` says what the next ones change."""

    def __init__(self, sites: dict[str, _Site]) -> None:
        self._sites = sites

    @property
    def points(self) -> dict[str, HookPoint]:
        """Where the SAEs are."""
        return {name: site.point for name, site in self._sites.items()}

    @property
    def acts(self) -> dict[str, Codes]:
        """The latents of the last pass at each hook that ran."""
        return {name: s.codes for name, s in self._sites.items() if s.codes is not None}

    def edit(self, *edits: Edit) -> None:
        """Put these edits, made in this order, in place of the earlier ones; none: the model is as it was.

        Raises UserError for a hook without SAE, a latent or a value that the SAE cannot have, and a position of an
        earlier edit at which it had no effect.
        """
        self.check()
        chosen: dict[str, list[Edit]] = {name: [] for name in self._sites}
        for edit in edits:
            if not isinstance(edit, Edit):
                raise UserError(f"edit: given {type(edit).__name__}; give edit(Set(5, 8.0), ...)")
            name = hook_meant(str(edit), edit.hook, self._sites)
            sae = self._sites[name].sae
            d_sae, largest = sae.cfg.d_sae, torch.finfo(sae.dtype).max
            if abs(edit.value) > largest:
                raise UserError(f"{edit}: {edit.value:g} is beyond {largest:g}, its SAE's largest")
            if not 0 <= edit.latent < d_sae:
                raise UserError(
                    f"{edit}: the SAE at {name} has {d_sae:,} latents, 0 to {d_sae - 1}"
                )
            chosen[name].append(edit)
        for name, site in self._sites.items():
            site.edit(chosen[name])

    def check(self) -> None:
        """Raise UserError for a position at which an edit had no effect, though a pass was made."""
        for site in self._sites.values():
            site.check()


def hook_meant(edit: str, hook: str | None, hooks: Collection[str]) -> str:
    """Return the hook among those with an SAE that an edit means; raises UserError where it is none, or any of some."""
    if hook is None:
        if len(hooks) != 1:
            raise UserError(f"{edit}: say which hook: {', '.join(hooks) or 'no SAE is given'}")
        return next(iter(hooks))
    name = among(hook, hooks)
    if name is None:
        raise UserError(f"{edit}: no SAE is attached at {hook!r}{nearest(hook, hooks)}")
    return name


Exclude = SkipRule | None | Literal["as in training"]
"""Which tokens are left alone: by a rule (as `wsae harvest` leaves them out, by default), or padding alone (none)."""
_ATTACHED: weakref.WeakSet[nn.Module] = weakref.WeakSet()
"""Models that have SAEs attached."""


@contextlib.contextmanager
def attach(
    model: nn.Module,
    saes: Mapping[str, SAE],
    *,
    error: bool = True,
    exclude: Exclude = "as in training",
    hook_out: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[Attached]:
    """Within the context, every pass of the model has its latents read, and edited as said: {hook: SAE}.

    `error`: add what the SAE does not explain, so that without edits nothing changes; else reconstructions take the
    rows' place. A transcoder is named by the hook that it reads, and changes the rows of `hook_out[hook]`: by default
    of "layers.9.mlp.input" those of "layers.9.mlp". `exclude`: the rule of tokens to leave alone (default: as
    `wsae harvest`, special tokens by the model's config); none: padding alone. The hooks are gone when the context
    ends. Raises UserError for no SAE, a crosscoder, a hook that the model lacks, another width, a model that has SAEs
    attached already, and, at the end, for a position at which an edit had no effect.
    """
    if model in _ATTACHED:
        raise UserError("this model has SAEs attached; give them all to one attach")
    if isinstance(exclude, str) and exclude != "as in training":
        raise UserError(f"exclude {exclude!r}: give 'as in training', a SkipRule, or None")
    if not isinstance(saes, Mapping) or not saes:
        raise UserError("saes: give the SAE at each hook, {'layers.9': sae}")
    rule = SkipRule(HarvestConfig(), special_ids(model)) if isinstance(exclude, str) else exclude
    saes = {name: an_sae(sae, f"hook {name!r}") for name, sae in saes.items()}
    outs = {name: changed_hook(name, sae, hook_out) for name, sae in saes.items()}
    points = hooks_named(model, dict.fromkeys([*saes, *outs.values()]))
    names: dict[tuple[str, str], str] = {}
    sites: dict[str, _Site] = {}
    for name, sae in saes.items():
        read, point = points[name], points[outs[name]]
        for hook, does, width in (
            (read, "takes", sae.cfg.d_in),
            (point, "gives", sae.cfg.width_out),
        ):
            if hook.d_in != width:
                at = name if hook is read else outs[name]
                raise UserError(
                    f"hook {at!r}: {hook.d_in} wide, and its SAE {does} rows {width} wide"
                )
        other = names.setdefault((point.path, point.side), name)
        if other != name:
            raise UserError(f"hook {name!r}: the same place as {other!r}; attach one SAE there")
        sites[name] = _Site(point, sae, rule, error, read if sae.cfg.transcoder else None)
    attached = Attached(sites)
    with contextlib.ExitStack() as stack:
        _ATTACHED.add(model)
        stack.callback(_ATTACHED.discard, model)
        for site in attached._sites.values():
            stack.enter_context(splice(model, site.point, site, site.read))
        yield attached
    attached.check()


def changed_hook(name: str, sae: SAE, hook_out: Mapping[str, str]) -> str:
    """Return the hook whose rows an SAE's edits change; raises UserError where nobody says a transcoder's."""
    if sae.cfg.sources is not None:
        raise UserError(
            f"hook {name!r}: its SAE is a crosscoder, which reads {len(sae.cfg.sources)} hooks together and "
            "is not put into a model; use an SAE of one hook"
        )
    if not sae.cfg.transcoder:
        return name
    out = hook_out.get(name, name.removesuffix(".input"))
    if out == name:
        raise UserError(
            f"hook {name!r}: its SAE is a transcoder, so say what it is to give: hook_out={{{name!r}: HOOK}}"
        )
    return out


def as_trained(run: Run, language: LanguageModel) -> SkipRule:
    """Return the rule by which a run's tokens were left out, the norms of its sinks included where they are known."""
    data, medians = run.source.get("harvest"), None
    if (store := stored(run)) is not None:
        data, medians = store.manifest.config, store.info.get("median_norm")
    cfg = HarvestConfig()
    if isinstance(data, dict) and "text" in data:
        cfg = HarvestConfig.parse(data, where=str(run.path))
    rule = SkipRule(cfg, language.tokenizer.all_special_ids)
    rule.medians = medians
    return rule


def stored(run: Run) -> Store | None:
    """Return the store of a run's activations; none where it has none, or it has moved."""
    place = run.source.get("path") or ""
    there = run.source.get("kind") == "store" and place and (Path(place) / MANIFEST).is_file()
    return Store(Path(place), verify=False) if there else None


def _spread(code: SparseCode, kept: Int64[Tensor, " kept"], tokens: int) -> SparseCode:
    """Return the code of the kept tokens as one of all tokens, the others without entries."""
    if len(kept) == tokens:
        return code
    counts = kept.new_zeros(tokens)
    counts[kept] = code.offsets.diff()
    return SparseCode(code.values, code.indices, torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
