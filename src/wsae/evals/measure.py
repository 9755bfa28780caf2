"""The two passes over held-out data that measure every member of every hook at once.

Pass 1 (survey): moments of the data, activity of every latent. Between: matching with the twin, choice of latents to
show. Pass 2 (errors): squared errors about the exact mean, top contexts, the random control.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from wsae.acts.source import Chunk
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.evals.config import EvalConfig
from wsae.evals.contexts import TopContexts, sample_latents
from wsae.evals.control import CONTROL, random_control
from wsae.evals.data import HeldOut
from wsae.evals.fidelity import Errors, Survey, ev_per_dim
from wsae.evals.latents import Entries, decoder_max_cosine
from wsae.evals.matching import Matching, Side, match
from wsae.losses.weigh import dimension_weights
from wsae.ops import SparseCode
from wsae.sae import SparseAutoencoder
from wsae.sae.encoding import Encoder

Saes = dict[str, SparseAutoencoder]


@dataclass(frozen=True)
class Family:
    """The members trained on one hook, and the plain twin of each weighted one."""

    saes: Saes
    twins: dict[str, str] = field(default_factory=dict)
    """member -> name of the member it is matched and compared with."""


@dataclass
class Measured:
    """One hook's arrays by member, matchings by member, and top contexts by member."""

    survey: Survey
    errors: Errors
    arrays: dict[str, dict[str, Tensor]]
    matching: dict[str, Matching]
    contexts: dict[str, TopContexts]


class Item(NamedTuple):
    """A chunk, and the codes that the first pass found for it, by (hook, member)."""

    chunk: Chunk
    codes: dict[tuple[str, str], SparseCode]

    def size_bytes(self) -> int:
        """Return the memory it holds."""
        tensors = [*self.chunk.x.values(), *(part for code in self.codes.values() for part in code)]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


class Replay:
    """Held-out chunks and their codes, kept in memory up to a limit so that the second pass need not compute them."""

    def __init__(self, source: HeldOut, cfg: EvalConfig) -> None:
        self._source, self._cfg = source, cfg
        self._kept: list[Item] | None = None

    def __iter__(self) -> Iterator[Item]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Item] | None = []
        room = self._cfg.replay_bytes
        for chunk in first_rows(self._source.heldout(self._cfg.batch_size), self._cfg.rows):
            item = Item(chunk, {})
            yield item
            room -= item.size_bytes()
            if kept is not None and room >= 0:
                kept.append(item)
            else:
                kept = None
        self._kept = kept


def first_rows(chunks: Iterator[Chunk], rows: int | None) -> Iterator[Chunk]:
    """Yield chunks until there are `rows` rows, the last one cut; all of them without a limit."""
    for chunk in chunks:
        if rows is not None and len(chunk.seq) >= rows:
            x = {hook: values[:rows] for hook, values in chunk.x.items()}
            yield Chunk(x, chunk.seq[:rows], chunk.pos[:rows])
            return
        rows = None if rows is None else rows - len(chunk.seq)
        yield chunk


class Kept:
    """Which positions of some sequences are held-out rows (the rest are special tokens, sinks, padding)."""

    def __init__(self, sequences: list[int]) -> None:
        self.sequences = sequences
        self._wanted = torch.tensor(sequences, dtype=torch.int64)
        self._found: dict[int, list[Tensor]] = {seq: [] for seq in sequences}

    def update(self, chunk: Chunk) -> None:
        """Note the wanted rows of a chunk."""
        wanted = torch.isin(chunk.seq, self._wanted)
        seq, pos = chunk.seq[wanted], chunk.pos[wanted]
        for number in seq.unique().tolist():
            self._found[number].append(pos[seq == number])

    def mask(self, seq: int, length: int) -> Tensor:
        """Return the kept positions of one sequence as a mask."""
        mask = torch.zeros(length, dtype=torch.bool)
        for pos in self._found[seq]:
            mask[pos] = True
        return mask


@torch.inference_mode()
def measure(
    source: HeldOut,
    families: dict[str, Family],
    cfg: EvalConfig,
    kept: Kept | None = None,
    progress: Progress = quiet,
) -> dict[str, Measured]:
    """Measure every member on the held-out rows of its hook.

    Raises UserError when a hook is not in the source, a width differs, the data hold NaN, or there are no rows.
    """
    items = Replay(source, cfg)
    surveys = {hook: Survey(hook, f.saes, _width(source, hook)) for hook, f in families.items()}
    n_rows = 0
    with progress("survey", None, "rows") as tick:
        for chunk, codes in items:
            for hook, survey in surveys.items():
                found = survey.update(chunk.x[hook])
                codes |= {(hook, name): code for name, code in found.items()}
            if kept is not None:
                kept.update(chunk)
            n_rows += len(chunk.seq)
            tick(len(chunk.seq))
    if not n_rows:
        raise UserError("there are no held-out rows to evaluate on; hold out more data")
    passes = {h: _Pass(surveys[h], family, cfg) for h, family in families.items()}
    with progress("evaluate", n_rows, "rows") as tick:
        for item in items:
            for second in passes.values():
                second.update(item)
            tick(len(item.chunk.seq))
    return {hook: second.measured() for hook, second in passes.items()}


def _width(source: HeldOut, hook: str) -> int:
    if hook not in source.hooks:
        raise UserError(f"the data have no hook {hook!r}; they have {', '.join(source.hooks)}")
    return source.hooks[hook]


class _Pass:
    """The second pass over one hook."""

    def __init__(self, survey: Survey, family: Family, cfg: EvalConfig) -> None:
        self.survey, self.family, self.cfg = survey, family, cfg
        mean = survey.moments.mean
        self.errors = Errors(mean, {name: sae.gamma for name, sae in family.saes.items()})
        self.saes = dict(family.saes)
        if cfg.random_control and self.saes:
            name = next(iter(family.twins.values()), next(iter(self.saes)))
            l0 = survey.activity[name].l0
            self.saes[CONTROL] = random_control(self.saes[name], mean, l0, cfg.seed)
        self.encoders = {name: Encoder(sae) for name, sae in self.saes.items()}
        self.matching = {m: self._match(m, twin) for m, twin in family.twins.items()}
        self.contexts = self._contexts() if cfg.n_latents else {}

    def _match(self, member: str, twin: str) -> Matching:
        a, b = (
            Side(self.saes[name].W_dec, self.survey.activity[name].alive) for name in (member, twin)
        )
        return match(a, b, self.cfg.assignment_max, self.cfg.seed)

    def _contexts(self) -> dict[str, TopContexts]:
        """Choose latents of each member by density, and add to each twin those matched with them."""
        hook, cfg = self.survey.hook, self.cfg
        chosen = {
            name: sample_latents(activity.density, cfg.n_latents, cfg.seed, hook, name)
            for name, activity in self.survey.activity.items()
        }
        wanted = {name: [latents] for name, latents in chosen.items()}
        for member, twin in self.family.twins.items():
            partners = self.matching[member].index[chosen[member]]
            wanted[twin].append(partners[partners >= 0])
        return {
            name: TopContexts(torch.cat(parts).unique(), self.saes[name].cfg.d_sae, cfg.n_contexts)
            for name, parts in wanted.items()
        }

    def update(self, item: Item) -> None:
        """Add one chunk of rows."""
        chunk, hook = item.chunk, self.survey.hook
        x = chunk.x[hook]
        wide = x.double().cpu()
        self.errors.add_rows(wide, chunk.seq)
        for name, sae in self.saes.items():
            code = item.codes.get((hook, name))
            code = self.encoders[name](x.to(sae.W_dec.device)) if code is None else code
            entries = Entries(code)
            error = wide - sae.decode_code(code).double().cpu()
            self.errors.add_member(name, error, entries.l0(), chunk.seq)
            if name in self.contexts:
                self.contexts[name].update(entries, chunk.seq, chunk.pos)

    def measured(self) -> Measured:
        """Return everything as arrays."""
        arrays = {name: self._arrays(name) for name in self.saes}
        for member, twin in self.family.twins.items():
            arrays[member] |= _matching_arrays(self.matching[member], twin)
        return Measured(self.survey, self.errors, arrays, self.matching, self.contexts)

    def _arrays(self, name: str) -> dict[str, Tensor]:
        moments = self.survey.moments
        out = self.errors.arrays(name)
        variance = moments.variance
        out["ev_per_dim"] = ev_per_dim(self.errors.members[name].sse_dim, variance, moments.n)
        if name in self.survey.activity:
            activity, sae = self.survey.activity[name], self.saes[name]
            out["input_variance"] = variance
            out |= _gamma_arrays(sae)
            out["density"], out["variance"] = activity.density, activity.variance
            out["decoder_max_cosine"] = decoder_max_cosine(sae.W_dec)
        return out


def _gamma_arrays(sae: SparseAutoencoder) -> dict[str, Tensor]:
    """Return gamma per dimension, and for a matrix also the matrix: two runs may agree in the first alone."""
    gamma = sae.gamma.detach().cpu()
    out = {"gamma": dimension_weights(gamma)}
    return out if gamma.ndim == 1 else {**out, "gamma_matrix": gamma}


def _matching_arrays(matching: Matching, twin: str) -> dict[str, Tensor]:
    pairs = torch.full_like(matching.index, -1)
    pairs[matching.pair_a] = matching.pair_b
    return {
        "match_index": matching.index,
        "match_cosine": matching.cosine,
        f"pair_index@{twin}": pairs,
    }
