"""The two passes over held-out data that measure every member of every hook at once.

Pass 1 (`Survey`): the exact moments of the data, activity of every latent. Between: matching with the twin, choice of
latents to show. Pass 2 (`Errors`): squared errors about that mean, top contexts, the random control. Members share each
chunk, and memory depends on the number of sequences and dimensions, never on the number of tokens.

    fvu = sum_t |x_t - x_hat_t|^2 / sum_t |x_t - mean|^2        mean: over the held-out rows

Not about zero: where the mean is large against the spread (residual streams), sum |x|^2 counts a constant that any bias
explains, and a poor SAE would look near perfect.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.acts.stream import HeldOut, HeldoutRows
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.evals.config import CONTROL, EvalConfig
from wsae.evals.control import FITTED_ROWS, fit_scale, random_control
from wsae.evals.latents import (
    RELATIVE_NORM,
    Entries,
    LatentActivity,
    LiveDecoder,
    Matching,
    TopContexts,
    Wanted,
    decoder_max_cosine,
    match,
    sample_latents,
)
from wsae.kernels.eager import SparseCode
from wsae.sae.config import SourcePart
from wsae.sae.forward import Weights, dimension_weights, weigh
from wsae.sae.model import SAE, Encoder
from wsae.stats.moments import Moments, check_finite


class SequenceSums:
    """Running sums of some columns per sequence, in fp64; grows with the largest sequence number met."""

    def __init__(self, columns: int) -> None:
        self._sums = torch.zeros(0, columns, dtype=torch.float64)
        self.n_seq = 0

    def add(self, seq: Int64[Tensor, " rows"], values: Float64[Tensor, "rows columns"]) -> None:
        """Add each row's values to its sequence."""
        if not len(seq):
            return
        self.n_seq = max(self.n_seq, int(seq.max()) + 1)
        if self.n_seq > len(self._sums):
            grown = values.new_zeros(max(self.n_seq, 2 * len(self._sums)), values.shape[1])
            grown[: len(self._sums)] = self._sums
            self._sums = grown
        self._sums.index_add_(0, seq, values)

    @property
    def sums(self) -> Float64[Tensor, "n_seq columns"]:
        """The sums of sequences 0 .. n_seq - 1."""
        return self._sums[: self.n_seq]


class Survey:
    """First pass over one hook: held-out moments (those of `out` for transcoders), each member's latent activity."""

    def __init__(
        self, hook: str, saes: dict[str, SAE], widths: dict[str, int], out: str | None = None
    ) -> None:
        for name in (hook, out or hook):
            if name not in widths:
                why = "" if out is None else "; a transcoder needs its input and its output"
                raise UserError(
                    f"the data have no hook {name!r}; they have {', '.join(widths)}{why}"
                )
        for name, sae in saes.items():
            check_width(f"{hook}/{name}", sae.cfg.d_in, widths[hook])
            if out is not None:
                check_width(f"{hook}/{name}", sae.cfg.width_out, widths[out], "gives")
        self.hook, self.out = hook, out or hook
        self.saes = saes
        self.moments = Moments(widths[self.out])
        self.activity = {name: LatentActivity(sae.cfg.d_sae) for name, sae in saes.items()}
        self._encoders = {name: Encoder(sae) for name, sae in saes.items()}

    def update(self, rows: dict[str, Float[Tensor, "rows _"]]) -> dict[str, SparseCode]:
        """Add some rows, by hook, and return each member's code of them.

        Raises UserError naming the hook, row and dimension of a NaN or infinity.
        """
        x = rows[self.hook]
        try:
            self.moments.update(rows[self.out])
            if self.out != self.hook:
                check_finite(x, where=self.hook)
        except UserError as error:
            raise UserError(f"held-out data of {self.out}: {error}") from error
        codes = {
            name: encode(x.to(self.saes[name].W_dec.device))
            for name, encode in self._encoders.items()
        }
        for name, code in codes.items():
            self.activity[name].update(Entries(code))
        return codes


def check_width(name: str, sae_width: int, data_width: int, what: str = "takes") -> None:
    """Raise UserError unless the SAE takes (or gives) rows of the data's width."""
    if sae_width != data_width:
        raise UserError(
            f"{name}: this SAE {what} activations of width {sae_width}, "
            f"but the data have width {data_width}; evaluate it on the hook it was trained on"
        )


class Errors:
    """Second pass over one hook: squared errors about the exact mean, plain and under every member's weights.

    Per sequence there are columns: the plain sum, that under each of `names`, and last a count (rows, or L0). The names
    are "@M" of member M's Gamma, and of a crosscoder "[S]" of source S, whose dimensions alone count.
    """

    def __init__(
        self,
        mean: Float64[Tensor, " d_in"],
        gammas: dict[str, Weights],
        sources: tuple[SourcePart, ...] = (),
    ) -> None:
        self.mean = mean
        widths = torch.tensor([source.width for source in sources], dtype=torch.int64)
        of = torch.arange(len(sources), dtype=torch.int64).repeat_interleave(widths)
        gammas = {f"@{name}": gamma for name, gamma in gammas.items()}
        gammas |= {f"[{s.name}]": (of == number).to(mean) for number, s in enumerate(sources)}
        self.names = list(gammas)
        wide = [gamma.detach().double().cpu() for gamma in gammas.values()]
        squares = [g.square() if g.ndim == 1 else torch.zeros_like(mean) for g in wide]
        self._weights = torch.stack([torch.ones_like(mean), *squares], dim=1)
        self._matrices = {column: g for column, g in enumerate(wide, start=1) if g.ndim == 2}
        """Weightings by a whole matrix, by column; the others share one product."""
        self._data = SequenceSums(len(gammas) + 2)
        self._members: dict[str, SequenceSums] = {}
        self.sse_dim: dict[str, Float64[Tensor, " d_in"]] = {}

    @property
    def rows(self) -> Float64[Tensor, " n_seq"]:
        """Held-out rows of each sequence."""
        return self._data.sums[:, -1]

    def add_rows(self, x: Float64[Tensor, "rows d_in"], seq: Int64[Tensor, " rows"]) -> None:
        """Add the rows' squared distance from the mean."""
        deviation = x - self.mean
        self._add(self._data, seq, deviation, deviation.square(), x.new_ones(len(x)))

    def add_member(
        self,
        name: str,
        error: Float64[Tensor, "rows d_in"],
        l0: Float64[Tensor, " rows"],
        seq: Int64[Tensor, " rows"],
    ) -> None:
        """Add one member's errors x - x_hat; raises UserError when a reconstruction is not finite."""
        square = error.square()
        self.sse_dim[name] = self.sse_dim.get(name, torch.zeros_like(self.mean)) + square.sum(0)
        if not self.sse_dim[name].isfinite().all():
            raise UserError(f"{name}: its reconstruction of the held-out data has NaN or infinity")
        sums = self._members.setdefault(name, SequenceSums(len(self.names) + 2))
        self._add(sums, seq, error, square, l0)

    def _add(
        self, sums: SequenceSums, seq: Tensor, values: Tensor, square: Tensor, count: Tensor
    ) -> None:
        """Add ||Gamma v||^2 of each row under each weighting, and a count."""
        weighted = square @ self._weights
        for column, gamma in self._matrices.items():
            weighted[:, column] = weigh(values, gamma).square().sum(1)
        sums.add(seq, torch.cat([weighted, count[:, None]], dim=1))

    def arrays(self, name: str) -> dict[str, Tensor]:
        """Return the member's per-sequence sums: `seq_sse` and `seq_var`, with each of `names` behind it too."""
        sse, var = self._members[name].sums, self._data.sums
        out = {"seq_rows": var[:, -1], "seq_l0": sse[:, -1]}
        for column, suffix in enumerate(["", *self.names]):
            out |= {f"seq_sse{suffix}": sse[:, column], f"seq_var{suffix}": var[:, column]}
        return {key: value.clone() for key, value in out.items()}


def ev_per_dim(
    sse_dim: Float64[Tensor, " d_in"], input_variance: Float64[Tensor, " d_in"], rows: int
) -> Float64[Tensor, " d_in"]:
    """Return 1 - sum_t (x_ti - x_hat_ti)^2 / sum_t (x_ti - mean_i)^2 per dimension; NaN where x_i is constant."""
    ev = 1 - sse_dim / (input_variance * rows)
    return torch.where(input_variance > 0, ev, torch.nan)


@dataclass(frozen=True)
class EvaluatedSaes:
    """The members trained on one hook, the plain twin of each weighted one, and what results say of a member."""

    saes: dict[str, SAE]
    twins: dict[str, str] = field(default_factory=dict)
    """member -> name of the member it is matched and compared with."""
    about: dict[str, dict[str, Any]] = field(default_factory=dict)
    """member -> fields added to its entry beside the metrics (config, gamma)."""
    out: str | None = None
    """The hook whose activations transcoders are to give."""


@dataclass
class Measured:
    """One hook's arrays by member, matchings by member, and top contexts by member."""

    survey: Survey
    errors: Errors
    arrays: dict[str, dict[str, Tensor]]
    matching: dict[str, Matching]
    contexts: dict[str, TopContexts]


class ReplayedChunk(NamedTuple):
    """A chunk, and the codes that the first pass found for it, by (hook, member)."""

    chunk: HeldoutRows
    codes: dict[tuple[str, str], SparseCode]

    @property
    def size_bytes(self) -> int:
        """The memory it holds."""
        tensors = [*self.chunk.x.values(), *(part for code in self.codes.values() for part in code)]
        return sum(tensor.nbytes for tensor in tensors)


class Replay:
    """Held-out chunks and their codes, kept in memory up to a limit so that the second pass need not compute them."""

    def __init__(self, source: HeldOut, cfg: EvalConfig) -> None:
        self._source, self._cfg = source, cfg
        self._kept: list[ReplayedChunk] | None = None

    def __iter__(self) -> Iterator[ReplayedChunk]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[ReplayedChunk] | None = []
        room = self._cfg.replay_bytes
        for chunk in first_rows(self._source.heldout(self._cfg.batch_size), self._cfg.rows):
            item = ReplayedChunk(chunk, {})
            yield item
            room -= item.size_bytes
            if kept is not None and room >= 0:
                kept.append(item)
            else:
                kept = None
        self._kept = kept


def first_rows(chunks: Iterator[HeldoutRows], rows: int | None) -> Iterator[HeldoutRows]:
    """Yield chunks until there are `rows` rows, the last one cut; all of them without a limit."""
    for chunk in chunks:
        if rows is not None and len(chunk.seq) >= rows:
            x = {hook: values[:rows] for hook, values in chunk.x.items()}
            yield HeldoutRows(x, chunk.seq[:rows], chunk.pos[:rows])
            return
        rows = None if rows is None else rows - len(chunk.seq)
        yield chunk


class HeldOutPositions:
    """Which positions of some sequences are held-out rows (the rest are special tokens, sinks, padding)."""

    def __init__(self, sequences: list[int]) -> None:
        self.sequences = sequences
        self._wanted = torch.tensor(sequences, dtype=torch.int64)
        self._found: dict[int, list[Tensor]] = {seq: [] for seq in sequences}

    def update(self, chunk: HeldoutRows) -> None:
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
    families: dict[str, EvaluatedSaes],
    cfg: EvalConfig,
    kept: HeldOutPositions | None = None,
    progress: Progress = quiet,
) -> dict[str, Measured]:
    """Measure every member on the held-out rows of its hook.

    Raises UserError when a hook is not in the source, a width differs, the data hold NaN, or there are no rows.
    """
    items = Replay(source, cfg)
    surveys: dict[str, Survey] = {}
    for hook, family in families.items():
        surveys[hook] = Survey(hook, family.saes, source.hooks, family.out)
    read = {name for survey in surveys.values() for name in (survey.hook, survey.out)}
    first: dict[str, list[Tensor]] = {hook: [] for hook in read}
    n_rows = 0
    with progress("survey", None, "rows") as tick:
        for chunk, codes in items:
            for hook, survey in surveys.items():
                found = survey.update(chunk.x)
                codes |= {(hook, name): code for name, code in found.items()}
            for hook in read:
                first[hook].append(chunk.x[hook][: max(0, FITTED_ROWS - n_rows)])
            if kept is not None:
                kept.update(chunk)
            n_rows += len(chunk.seq)
            tick(len(chunk.seq))
    if not n_rows:
        raise UserError("there are no held-out rows to evaluate on; hold out more data")
    rows = {hook: torch.cat(parts) for hook, parts in first.items()}
    passes = {
        hook: _MeasuringPass(surveys[hook], family, rows, cfg) for hook, family in families.items()
    }
    with progress("evaluate", n_rows, "rows") as tick:
        for item in items:
            for second in passes.values():
                second.update(item)
            tick(len(item.chunk.seq))
    return {hook: second.measured() for hook, second in passes.items()}


class _MeasuringPass:
    """The second pass over one hook."""

    def __init__(
        self,
        survey: Survey,
        family: EvaluatedSaes,
        first: dict[str, Float[Tensor, "rows _"]],
        cfg: EvalConfig,
    ) -> None:
        self.survey, self.family, self.cfg = survey, family, cfg
        mean = survey.moments.mean
        sources = next((sae.cfg.sources for sae in family.saes.values()), None)
        gammas = {name: sae.gamma for name, sae in family.saes.items()}
        self.errors = Errors(mean, gammas, sources or ())
        self.saes = dict(family.saes)
        if cfg.random_control and self.saes:
            name = next(iter(family.twins.values()), next(iter(self.saes)))
            l0 = survey.activity[name].l0
            like, x = self.saes[name], first[survey.hook]
            read = x.mean(0).double() if like.cfg.transcoder else mean
            control = self.saes[CONTROL] = random_control(like, read, l0, cfg.seed)
            assert control.b_dec is not None
            control.b_dec.copy_(mean)
            fit_scale(control, x, first[survey.out])
        self.encoders = {name: Encoder(sae) for name, sae in self.saes.items()}
        self.matching: dict[str, Matching] = {}
        for member, twin in family.twins.items():
            a, b = (
                LiveDecoder(self.saes[name].directions, survey.activity[name].alive)
                for name in (member, twin)
            )
            self.matching[member] = match(a, b, cfg.assignment_max, cfg.seed)
        self.contexts = self._contexts() if cfg.n_latents else {}

    def _contexts(self) -> dict[str, TopContexts]:
        """Choose latents of each member by density, and add to each twin those matched with them."""
        hook, cfg = self.survey.hook, self.cfg
        sizes = Wanted(cfg.n_contexts, cfg.window_tokens)
        chosen = {
            name: sample_latents(activity.density, cfg.n_latents, cfg.seed, hook, name)
            for name, activity in self.survey.activity.items()
        }
        wanted = {name: [latents] for name, latents in chosen.items()}
        for member, twin in self.family.twins.items():
            partners = self.matching[member].index[chosen[member]]
            wanted[twin].append(partners[partners >= 0])
        return {
            name: TopContexts(torch.cat(parts).unique(), self.saes[name].cfg.d_sae, sizes)
            for name, parts in wanted.items()
        }

    def update(self, item: ReplayedChunk) -> None:
        """Add one chunk of rows."""
        chunk, hook = item.chunk, self.survey.hook
        x = chunk.x[hook]
        wide = chunk.x[self.survey.out].double().cpu()
        self.errors.add_rows(wide, chunk.seq)
        for name, sae in self.saes.items():
            code = item.codes.get((hook, name))
            here = x.to(sae.W_dec.device)
            code = self.encoders[name](here) if code is None else code
            entries = Entries(code)
            error = wide - sae.decode_code(code, here).double().cpu()
            self.errors.add_member(name, error, entries.l0(), chunk.seq)
            if name in self.contexts:
                self.contexts[name].update(entries, chunk.seq, chunk.pos)

    def measured(self) -> Measured:
        """Return everything as arrays."""
        arrays = {name: self._arrays(name) for name in self.saes}
        for member, twin in self.family.twins.items():
            found = self.matching[member]
            pairs = torch.full_like(found.index, -1)
            pairs[found.pair_a] = found.pair_b
            arrays[member] |= {"match_index": found.index, "match_cosine": found.cosine}
            arrays[member][f"pair_index@{twin}"] = pairs
        return Measured(self.survey, self.errors, arrays, self.matching, self.contexts)

    def _arrays(self, name: str) -> dict[str, Tensor]:
        moments, sae = self.survey.moments, self.saes[name]
        out = self.errors.arrays(name)
        variance = moments.variance
        out["ev_per_dim"] = ev_per_dim(self.errors.sse_dim[name], variance, moments.n)
        if name in self.survey.activity:
            activity, gamma = self.survey.activity[name], sae.gamma.detach().cpu()
            out["input_variance"] = variance
            out["gamma"] = dimension_weights(gamma)
            if gamma.ndim == 2:  # two runs may agree per dimension alone
                out["gamma_matrix"] = gamma
            out["density"], out["variance"] = activity.density, activity.variance
            out["decoder_max_cosine"] = decoder_max_cosine(sae.directions)
            if sae.cfg.sources is not None:
                for source, share in zip(sae.cfg.sources, sae.relative_norms(), strict=True):
                    out[f"{RELATIVE_NORM}[{source.name}]"] = share.cpu()
        return out
