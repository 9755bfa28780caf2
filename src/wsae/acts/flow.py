"""Text through a model to kept rows, one forward pass at a time: shared by the store's writer and the live source."""

import contextlib
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int8, Int64
from torch import Tensor

from wsae.acts.capture import Capture, token_positions, tokens
from wsae.acts.config import HarvestConfig
from wsae.acts.hookpoints import probe
from wsae.acts.text import START, Packer, Position, TokenSequence, heard
from wsae.core.errors import Buffer, UserError, explained
from wsae.stats.classes import ConsistencyCounts
from wsae.stats.moments import Moments

if TYPE_CHECKING:
    from wsae.acts.language import LanguageModel

REASONS = ("kept", "padding", "special", "first", "norm", "other roles")
"""Codes of `reasons`; a token is counted under the first that applies: padding, special, first, other roles, norm."""
KEPT, PADDING, SPECIAL, FIRST, NORM, ROLE = range(6)
_LOWER = "--batch-seqs or --seq-len"


class SkipRule:
    """Assigns each token a reason; the norm test needs the medians of `calibrate`."""

    def __init__(self, cfg: HarvestConfig, special_ids: Iterable[int]) -> None:
        self._cfg = cfg
        ids = sorted(set(special_ids)) if cfg.skip_special else []
        self._special = torch.tensor(ids, dtype=torch.long)
        self.medians: dict[str, float] | None = None

    def by_token(
        self,
        ids: Int[Tensor, "batch seq"],
        positions: Int64[Tensor, "batch seq"],
        said: Bool[Tensor, "batch seq"] | None = None,
    ) -> Int8[Tensor, "batch seq"]:
        """Return the reasons that ids, positions (-1 at padding) and who speaks give: `said` of the roles asked for."""
        reasons = torch.full(ids.shape, KEPT, dtype=torch.int8, device=ids.device)
        if said is not None:
            reasons[~said] = ROLE
        reasons[positions < self._cfg.skip_first] = FIRST
        if len(self._special):
            reasons[torch.isin(ids, self._special.to(ids.device))] = SPECIAL
        reasons[positions < 0] = PADDING
        return reasons

    def calibrate(
        self, norms: Mapping[str, Float[Tensor, " tokens"]], reasons: Int8[Tensor, " tokens"]
    ) -> None:
        """Fix each hook's median norm from the tokens kept so far; raises UserError when there are none."""
        kept = reasons == KEPT
        if not bool(kept.any()):
            raise UserError(
                "the first batch has no token to calibrate on: all are padding, special or first; "
                "raise seq_len or lower skip_first"
            )
        found = {hook: float(norm[kept].double().median()) for hook, norm in norms.items()}
        self.medians = {**(self.medians or {}), **found}

    def by_norm(
        self, norms: Mapping[str, Float[Tensor, " tokens"]], reasons: Int8[Tensor, " tokens"]
    ) -> Int8[Tensor, " tokens"]:
        """Mark tokens whose norm exceeds sink_norm_ratio times the median at any hook."""
        ratio = self._cfg.sink_norm_ratio
        if ratio is None:
            return reasons
        assert self.medians is not None, "calibrate first"
        reasons = reasons.clone()
        for hook, norm in norms.items():
            reasons[(norm > ratio * self.medians[hook]) & (reasons == KEPT)] = NORM
        return reasons


def count_reasons(reasons: Int8[Tensor, " tokens"]) -> dict[str, int]:
    """Return how many tokens each reason holds, the kept ones included; other roles only where there are any."""
    counts = torch.bincount(reasons.long(), minlength=len(REASONS)).tolist()
    return {r: n for r, n in zip(REASONS, counts, strict=True) if n or r != REASONS[ROLE]}


ONE_PASS = threading.Lock()
"""What a thread holds while it runs a model: the hooks of two passes would mix their outputs."""


@contextlib.contextmanager
def running(hooks: Mapping[str, int], rows: int, lower: str) -> Iterator[None]:
    """Hold the model for one pass that gives so many rows; running out of memory names what did not fit."""
    buffers = [Buffer("activations of one pass", (rows, d), 4, lower) for d in {*hooks.values()}]
    with explained("running the model", lambda: buffers, lower), ONE_PASS:
        yield


class Step(NamedTuple):
    """What one forward pass gave: rows aligned between hooks, and the sequences they came from."""

    x: dict[str, Float[Tensor, "rows _"]]
    """Kept rows, float32."""
    skipped: dict[str, Float[Tensor, "skipped _"]]
    """Rows of real tokens that were dropped (padding is in neither)."""
    seq: Int[Tensor, " rows"]
    pos: Int[Tensor, " rows"]
    ids: Int[Tensor, "batch seq"]
    lengths: Int[Tensor, " batch"]
    counts: dict[str, int]
    after: Position
    labels: Int64[Tensor, " rows"] | None = None
    """Class of every kept row, where rows have classes."""

    def head(self, rows: int) -> "Step":
        """Return this step with its first `rows` kept rows only."""
        if rows >= len(self.seq):
            return self
        x = {hook: values[:rows] for hook, values in self.x.items()}
        return self._replace(
            x=x,
            seq=self.seq[:rows],
            pos=self.pos[:rows],
            counts={**self.counts, "kept": rows},
            labels=None if self.labels is None else self.labels[:rows],
        )


class NonFiniteError(UserError):
    """A NaN or infinite activation; `row` counts the kept rows before it in its step, `place` says where it came up."""

    FIX = "; check the model's weights, or run it with --dtype float32"

    def __init__(self, hook: str, place: str, row: int) -> None:
        self.hook, self.place, self.row = hook, place, row
        super().__init__(f"{hook}: NaN or infinite activation at {place}{self.FIX}")


class _Captured(NamedTuple):
    """What the model gave for one batch: rows in float32, and the reasons known without them."""

    acts: dict[str, Float[Tensor, "tokens _"]]
    reasons: Int8[Tensor, " tokens"]
    ids: Int[Tensor, "batch seq"]
    lengths: Int[Tensor, " batch"]


class Flow:
    """A model, its hook points and the rule for keeping rows; `steps` runs the text from any position.

    Rows are left on `keep_on`.
    """

    def __init__(
        self, cfg: HarvestConfig, language: "LanguageModel", keep_on: torch.device | str = "cpu"
    ) -> None:
        self.cfg, self.language, self.keep_on = cfg, language, torch.device(keep_on)
        self._first: _Captured | None = None
        probing = [Buffer("activations of a probe", (cfg.seq_len, len(cfg.hooks)), 4, "--seq-len")]
        with explained("running the model", lambda: probing, _LOWER), ONE_PASS:
            self.probed = probe(language.model, cfg.hooks, tokens(cfg.seq_len))
        self.capture = Capture(language.model, self.probed.hooks)
        self.hooks = self.capture.hooks
        self.rule = SkipRule(cfg, language.tokenizer.all_special_ids)

    def calibrate(self, medians: dict[str, float] | None = None) -> dict[str, float]:
        """Fix the median norms: as given, or from the first training batch. Raises UserError when there is no text."""
        if medians is not None:
            self.rule.medians = dict(medians)
        if self.rule.medians is None:
            first = self._run(self._first_kept())
            self.rule.calibrate({hook: _norms(x) for hook, x in first.acts.items()}, first.reasons)
            self._first = first  # training starts with the same batch
        assert self.rule.medians is not None
        return self.rule.medians

    def _first_kept(self) -> tuple[TokenSequence, ...]:
        """Return the first training batch that has a token to keep, or the first; UserError where there is none."""
        packer = Packer(self.cfg, self.language.tokenizer, heldout=False)
        batches = _batched(packer.sequences(), self.cfg.batch_seqs)
        first = next(batches, None)
        if first is None:
            raise UserError(
                f"text {self.cfg.text.path}: no text for training in it; give more documents"
            )
        if self.cfg.roles is None:
            return first
        for batch in chain([first], batches):
            if bool((self.rule.by_token(*stacked(batch)) == KEPT).any()):
                return batch
        roles = " or ".join(self.cfg.roles)
        raise UserError(
            f"text {self.cfg.text.path}: no token to keep is of the role {roles}{heard(packer.roles)}; name others "
            "with --roles"
        )

    def steps(self, heldout: bool, start: Position = START) -> Iterator[Step]:
        """Yield steps from a position on until the text ends; raises NonFiniteError at a NaN or infinity."""
        sequences = Packer(self.cfg, self.language.tokenizer, heldout).sequences(start)
        yield from self.through(_batched(sequences, self.cfg.batch_seqs), start.sequence)

    def through(
        self, batches: Iterable[tuple[TokenSequence, ...]], number: int = 0
    ) -> Iterator[Step]:
        """Yield a step for each batch of sequences of one length; they are numbered from `number` on."""
        for batch in batches:
            yield self._step(batch, number)
            number += len(batch)

    def _run(self, batch: tuple[TokenSequence, ...]) -> _Captured:
        ids, positions, said = stacked(batch)
        mask = positions >= 0
        lengths = mask.sum(1)
        first = self._first
        if first and torch.equal(first.ids, ids) and torch.equal(first.lengths, lengths):
            self._first = None
            return first
        device = self.language.device
        full = bool(mask.all())
        with running(self.hooks, self.cfg.batch_seqs * self.cfg.seq_len, _LOWER):
            acts = self.capture(ids.to(device), None if full else mask.to(device))
            flat = {hook: x.flatten(0, 1).float().to(self.keep_on) for hook, x in acts.items()}
        reasons = self.rule.by_token(ids, positions, said).flatten()
        return _Captured(flat, reasons, ids, lengths)

    def _step(self, batch: tuple[TokenSequence, ...], first_sequence: int) -> Step:
        acts, reasons, ids, lengths = self._run(batch)
        norms = {hook: _norms(x) for hook, x in acts.items()}
        self._check_finite(acts, norms, reasons.view(ids.shape), first_sequence)
        reasons = self.rule.by_norm(norms, reasons)
        kept = (reasons == KEPT).nonzero().squeeze(1)
        skipped = (reasons > PADDING).nonzero().squeeze(1)
        return Step(
            x={hook: x[kept.to(x.device)] for hook, x in acts.items()},
            skipped={hook: x[skipped.to(x.device)] for hook, x in acts.items()},
            seq=kept // ids.shape[1] + first_sequence,
            pos=kept % ids.shape[1],
            ids=ids.int(),
            lengths=lengths.int(),
            counts=count_reasons(reasons),
            after=batch[-1].after,
        )

    def _check_finite(
        self,
        acts: dict[str, Tensor],
        norms: dict[str, Tensor],
        reasons: Int8[Tensor, "batch seq"],
        first: int,
    ) -> None:
        length, reasons = reasons.shape[1], reasons.flatten()
        for hook, norm in norms.items():
            suspects = (~torch.isfinite(norm) & (reasons != PADDING)).nonzero().squeeze(1)
            for token in suspects.tolist():  # a norm may overflow where no value does
                bad = (~torch.isfinite(acts[hook][token])).nonzero()
                if len(bad):
                    seq, pos = divmod(token, length)
                    row = int((reasons[:token] == KEPT).sum())
                    place = f"sequence {first + seq}, position {pos}, dimension {int(bad[0])}"
                    raise NonFiniteError(hook, place, row)


class TokenBatch(NamedTuple):
    """Sequences of one length as tensors: ids, positions (-1 at padding), and which are of the roles asked for."""

    ids: Int64[Tensor, "batch seq"]
    positions: Int64[Tensor, "batch seq"]
    said: Bool[Tensor, "batch seq"] | None


def stacked(batch: Sequence[TokenSequence]) -> TokenBatch:
    """Return sequences of one length as tensors."""
    ids = torch.from_numpy(np.stack([s.ids for s in batch])).long()
    mask = torch.arange(ids.shape[1]) < torch.tensor([s.length for s in batch])[:, None]
    said = [s.said for s in batch if s.said is not None]
    return TokenBatch(
        ids, token_positions(mask), torch.from_numpy(np.stack(said)) if said else None
    )


def _batched(sequences: Iterator[TokenSequence], size: int) -> Iterator[tuple[TokenSequence, ...]]:
    while batch := tuple(islice(sequences, size)):
        yield batch


def _norms(x: Float[Tensor, "tokens d_in"]) -> Float[Tensor, " tokens"]:
    return torch.linalg.vector_norm(x, dim=1).cpu()


assert min(FIRST, NORM, ROLE) > PADDING, "`skipped` takes every reason above padding"


# Statistics of a stream of steps

MOST_CLASSES = 1 << 20
"""A label above would have a name, and sums of every dimension, made for each class below it."""


class SourceStats(NamedTuple):
    """Statistics of one hook's training rows: `kept` set gamma; `all` adds the skipped tokens (padding excepted)."""

    kept: Moments
    all: Moments
    skipped: dict[str, int]
    consistency: Float64[Tensor, " d_in"] | None = None
    """Semantic consistency of each dimension, where the rows are labelled."""

    @classmethod
    def beside(cls, parts: "Sequence[SourceStats]") -> "SourceStats":
        """Return the statistics of rows that hold those of several hooks side by side."""
        kept, every = (Moments.beside(m) for m in zip(*(part[:2] for part in parts), strict=True))
        betas = [part.consistency for part in parts if part.consistency is not None]
        beta = torch.cat(betas) if len(betas) == len(parts) else None
        return cls(kept, every, parts[0].skipped, beta)


class Tally:
    """Running statistics per hook; exact, so their order and grouping do not matter.

    With classes, kept rows bring labels and their consistency is counted.
    """

    def __init__(self, hooks: Mapping[str, int], n_classes: int = 0) -> None:
        self.classes = {
            hook: ConsistencyCounts(d, n_classes) for hook, d in hooks.items() if n_classes
        }
        self.kept = {hook: Moments(d_in) for hook, d_in in hooks.items()}
        self.skipped = {hook: Moments(d_in) for hook, d_in in hooks.items()}
        self.counts: dict[str, int] = dict.fromkeys(REASONS[:ROLE], 0)

    def update(
        self,
        kept: Mapping[str, Float[Tensor, "rows _"]],
        skipped: Mapping[str, Float[Tensor, "skipped _"]],
        counts: Mapping[str, int],
        labels: Int64[Tensor, " labels"] | None = None,
    ) -> None:
        """Add one step's rows and counts, and the kept rows' labels where there are classes."""
        for hook, x in kept.items():
            self.kept[hook].update(x)
            if labels is not None:
                self.classes[hook].update(x, labels)
        for hook, x in skipped.items():
            self.skipped[hook].update(x)
        for reason, n in counts.items():
            self.counts[reason] = self.counts.get(reason, 0) + n

    def result(self) -> dict[str, SourceStats]:
        """Return the statistics so far."""
        counts = {reason: n for reason, n in self.counts.items() if reason != "kept"}
        out = {}
        for hook, kept in self.kept.items():
            every = Moments.from_tensors(kept.tensors())
            every.merge(self.skipped[hook])
            beta = self.classes[hook].consistency() if hook in self.classes else None
            out[hook] = SourceStats(kept, every, counts, beta)
        return out

    def tensors(self) -> dict[str, Tensor]:
        """Return the moments as "<hook>|kept|<name>" and "<hook>|skipped|<name>", class counts as "<hook>|classes"."""
        parts = (("kept", self.kept), ("skipped", self.skipped))
        moments = {
            f"{hook}|{part}|{name}": tensor
            for part, per_hook in parts
            for hook, moments in per_hook.items()
            for name, tensor in moments.tensors().items()
        }
        return moments | {f"{hook}|classes": c.counts for hook, c in self.classes.items()}

    @classmethod
    def restore(
        cls, hooks: Mapping[str, int], tensors: Mapping[str, Tensor], counts: Mapping[str, int]
    ) -> "Tally":
        """Rebuild a tally from `tensors()` and `counts`."""
        tally = cls({})
        tally.kept = {hook: _moments(tensors, f"{hook}|kept|") for hook in hooks}
        tally.skipped = {hook: _moments(tensors, f"{hook}|skipped|") for hook in hooks}
        tally.counts = dict(counts)
        for hook, d_in in hooks.items():
            if (found := tensors.get(f"{hook}|classes")) is not None:
                tally.classes[hook] = ConsistencyCounts(d_in, found.shape[1])
                tally.classes[hook].counts = found.clone()
        return tally


def _moments(tensors: Mapping[str, Tensor], prefix: str) -> Moments:
    return Moments.from_tensors(
        {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    )
