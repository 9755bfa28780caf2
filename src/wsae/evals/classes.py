"""Score SAEs against class labels: a family in memory, or a finished run into RUN/classes.

A member stands against its plain twin, and against the controls, with differences a - b of mean scores:

all       the two sets of scored latents, each resampled on its own
matched   pairs of latents by decoder direction, both scored, resampled together
density   both sets in strata of density (support), so that a shift in density cannot pass for one in consistency
adjusted  the same by a regression on density
within    within classes: means of the latents of each class, classes weighted as both have them on average; what is
          left of `all` is that one has more latents of the classes that are easy to tell
images    all scored latents, leaving out groups of images: both members lose the same ones
control   as all, against a control

One pass over the labelled held-out rows for what the data are, one for each member's table by class. A member at a
time: only one table is in memory, and what a pass reads again is small beside what it encodes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Bool, Float, Float64, Int, Int64
from torch import Tensor

from wsae.acts.source import ArraySource, JoinedSource, StoreSource
from wsae.acts.store import IMAGES
from wsae.acts.stream import HeldOut
from wsae.core.errors import UserError
from wsae.core.files import Json, digest
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.core.tensors import load_tensors
from wsae.evals.config import ClassControl, ClassesConfig
from wsae.evals.control import pca, random_control
from wsae.evals.glossary import CLASS_SCORES, glossary
from wsae.evals.interpret.summary import Sample, density_adjusted, matched_density
from wsae.evals.intervals import (
    Difference,
    estimate,
    mean,
    paired_difference,
    percentiles,
    resampled_means,
    unpaired_difference,
)
from wsae.evals.latents import Entries, LiveDecoder, Matching, match
from wsae.evals.measure import EvaluatedSaes, check_width
from wsae.evals.run import run_subject, write_part
from wsae.run import ARRAYS, CLASSES, CLASSES_PART
from wsae.sae.model import SAE, Encoder
from wsae.stats.classes import (
    Chance,
    ClassTable,
    Hits,
    OverImages,
    by_image,
    chance_levels,
    corrected_information,
    corrected_share,
    jackknife,
    largest_share,
    minibatch_consistency,
    ncl_summary,
    over_images,
    selectivity,
)
from wsae.stats.moments import Covariance

Encode = Callable[[Float[Tensor, "rows d_in"]], Hits]
Labels = Int[np.ndarray, " images"]
"""The class of every image by its number, from 0; a held-out chunk's `seq` holds such numbers."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Labelled:
    """The held-out rows of one hook with their classes."""

    source: HeldOut
    hook: str
    labels: Labels

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield activations, classes and image numbers of about so many rows, those of an image together.

        Raises UserError for a row without a class.
        """
        if self.hook not in self.source.hooks:
            known = ", ".join(self.source.hooks)
            raise UserError(f"the data have no hook {self.hook!r}; they have {known}")
        labels = torch.from_numpy(np.asarray(self.labels, dtype=np.int64))
        for x, image in self._images(size):
            known = image < len(labels)
            classes = torch.where(known, labels[image.clamp_max(len(labels) - 1)], -1)
            if bool((classes < 0).any()):
                first = int(image[classes < 0][0])
                raise UserError(
                    f"held-out image {first} has no class; give every held-out image one, numbered from 0"
                )
            yield x, classes, image

    def _images(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the source's chunks, rows that end an image moved to the chunk in which it begins."""
        x, image = None, torch.zeros(0, dtype=torch.int64)
        for chunk in self.source.heldout(size):
            rows, number = chunk.x[self.hook], chunk.seq.long()
            if x is not None and (cut := int((number == image[-1]).int().cumprod(0).sum())):
                x, image = torch.cat([x, rows[:cut]]), torch.cat([image, number[:cut]])
                rows, number = rows[cut:], number[cut:]
            if len(number):
                if x is not None:
                    yield x, image
                x, image = rows, number
        if x is not None:
            yield x, image

    def permuted(self, ground: "Ground", seed: int) -> "Labelled":
        """Return the same rows with the held-out images' classes in a random order."""
        rng = np.random.default_rng(seed_for(seed, "classes", "shuffled", self.hook))
        labels = np.asarray(self.labels, dtype=np.int64).copy()
        images = ground.images.numpy()
        labels[images] = labels[images][rng.permutation(len(images))]
        return Labelled(self.source, self.hook, labels)


@dataclass(frozen=True)
class Ground:
    """What the held-out rows of one hook are, before any member is looked at."""

    rows: int
    totals: Int64[Tensor, " n_classes"]
    """Images of each class; at least two are not 0."""
    images: Int64[Tensor, " images"]
    """The held-out images' numbers, ascending."""
    mean: Float64[Tensor, " d_in"]
    covariance: Float64[Tensor, "d_in d_in"]
    positive: Bool[Tensor, " d_in"]
    """Dimensions that are above 0 on some row."""


def look(data: Labelled, cfg: ClassesConfig) -> Ground:
    """Read the held-out rows once; raises UserError for none, for NaN, and for classes that are all one."""
    covariance, above, images, counts = None, [], [], []
    for x, classes, image in data.batches(cfg.batch_size):
        covariance = covariance or Covariance(x.shape[1])
        covariance.update(x)
        above.append((x > 0).any(0))
        _, classes, image = by_image(Hits.of_dense(x[:0]), classes, image)
        images.append(image)
        counts.append(torch.bincount(classes))
    if covariance is None:
        raise UserError("there are no held-out images to score on; hold out more data")
    totals = torch.nn.utils.rnn.pad_sequence(counts).sum(1)
    if int((totals > 0).sum()) < 2:
        raise UserError(
            f"the held-out images are all of class {len(totals) - 1}; consistency needs two classes or more"
        )
    return Ground(
        rows=covariance.n,
        totals=totals,
        images=torch.cat(images).unique(),
        mean=covariance.mean,
        covariance=covariance.covariance,
        positive=torch.stack(above).any(0),
    )


def latents_of(sae: SAE) -> Encode:
    """Return what gives a batch's active latents."""
    encoder = Encoder(sae)

    def encode(x: Float[Tensor, "rows d_in"]) -> Hits:
        active = Entries(encoder(x.to(sae.W_dec.device)))
        return Hits(active.rows, active.indices, active.values)

    return encode


@torch.inference_mode()
def tally(
    data: Labelled,
    encode: Encode,
    units: int,
    ground: Ground,
    cfg: ClassesConfig,
    progress: Progress = quiet,
) -> ClassTable:
    """Return one member's table by class over all held-out rows."""
    table = ClassTable(units, len(ground.totals), cfg.n_top, cfg.groups)
    with progress("classes", ground.rows, "rows") as tick:
        for x, classes, image in data.batches(cfg.batch_size):
            table.update(encode(x), classes, image)
            tick(len(x))
    return table


@torch.inference_mode()
def one_minibatch(
    data: Labelled, encode: Encode, ground: Ground, cfg: ClassesConfig
) -> float | None:
    """Return NCL's consistency within one random mini-batch of held-out images; None where there are fewer."""
    if not 0 < cfg.minibatch <= len(ground.images):
        return None
    rng = np.random.default_rng(seed_for(cfg.seed, "classes", "minibatch", data.hook))
    picked = rng.choice(len(ground.images), cfg.minibatch, replace=False)
    chosen = ground.images[torch.from_numpy(picked)]
    rows, labels, images = [], [], []
    for x, classes, image in data.batches(cfg.batch_size):
        keep = torch.isin(image, chosen)
        rows.append(x[keep])
        labels.append(classes[keep])
        images.append(image[keep])
    x = torch.cat(rows)
    hits = encode(x).active(len(x))
    hits, classes, _ = by_image(hits, torch.cat(labels), torch.cat(images))
    return minibatch_consistency(hits.row, hits.unit, classes)


@dataclass
class Scored:
    """One member or control: its scores by latent, its means without each group of images, and its summary."""

    name: str
    arrays: dict[str, Tensor]
    images: dict[str, OverImages]
    summary: Json
    sae: SAE | None = None
    """None for the dimensions of the activations."""
    _resampled: dict[str, Float64[np.ndarray, " draws"]] = field(default_factory=dict)

    def values(self, score: str) -> Float64[np.ndarray, " latents"]:
        """Return a score of every latent, NaN where it is not scored."""
        return self.arrays[score].numpy()

    def known(self, score: str) -> Float64[np.ndarray, " scored"]:
        """Return a score of the latents that have it."""
        values = self.values(score)
        return values[~np.isnan(values)]

    def resampled(self, score: str, cfg: ClassesConfig) -> Float64[np.ndarray, " draws"]:
        """Return the mean score of latents drawn with replacement, for every draw; the same each time it is asked."""
        if score not in self._resampled:
            seed = seed_for(cfg.seed, "classes", self.name, score)
            self._resampled[score] = resampled_means(self.known(score), cfg.draws, seed)
        return self._resampled[score]


def scored(name: str, table: ClassTable, chance: Chance, cfg: ClassesConfig) -> Scored:
    """Return the scores of a table's units with their summary; NaN where a unit is not scored.

    Not scored: never active, on fewer than n samples (top), under the minimum of support.
    """
    positive = table.sums.sum(1) > 0  # on some sample: for codes, all that are active
    support, least = table.support, cfg.min_support
    supported = support >= least
    arrays = {
        "support": support,
        "density": support.double() / int(table.totals.sum()),
        "label": table.counts.argmax(1),
        "consistency_ncl": torch.where(positive, largest_share(table.counts), torch.nan),
        "consistency_top": torch.from_numpy(table.strongest.share()),
        "consistency_corrected": corrected_share(table.counts, chance, least),
        "selectivity": torch.where(supported, selectivity(table.sums, table.totals), torch.nan),
        "information": corrected_information(table.counts, table.totals, chance, least),
    }
    ways = {
        "consistency_ncl": largest_share,
        "consistency_corrected": lambda counts: corrected_share(counts, chance),
    }
    groups = {
        score: over_images(table, way, ~arrays[score].isnan() & (support > 0))
        for score, way in ways.items()
    }
    images = {score: found for score, found in groups.items() if found is not None}
    alive = support > 0
    density = arrays["density"][alive].numpy()
    summary: Json = {
        "scores": {score: _mean(arrays[score], cfg) for score in CLASS_SCORES},
        "over_images": {score: _spread(found, cfg) for score, found in images.items()},
        "ncl": ncl_summary(table.counts, positive)._asdict(),
        "chance_top": float(chance.share[cfg.n_top]) if cfg.n_top < len(chance.share) else None,
        "coverage": {
            "latents": table.units,
            "alive": float(alive.double().mean()),
            "supported": float(supported.double().mean()),
            "top": float(np.mean(table.strongest.full())),
        },
        "l0": table.entries / max(1, table.rows),
        "density": {
            f"{q:g}": float(np.quantile(density, q)) if len(density) else None for q in QUANTILES
        },
    }
    return Scored(name, arrays, images, summary)


def _mean(values: Tensor, cfg: ClassesConfig) -> Json:
    """Return the mean over the scored latents with its bootstrap interval over latents, and their number."""
    known = values[~values.isnan()].numpy()
    return {**estimate(mean(known), cfg.bootstrap())._asdict(), "n": len(known)}


def _spread(found: OverImages, cfg: ClassesConfig) -> Json:
    low, high = jackknife(found, cfg.confidence)
    return {"value": found.value, "low": low, "high": high, "n": len(found.without)}


def labels_of(source: HeldOut) -> Labels | None:
    """Return the class of every image, or row of an array, by number (-1: not held out); none without classes."""
    source = source.whole if isinstance(source, JoinedSource) else source
    if isinstance(source, ArraySource):
        return source.labels
    if not isinstance(source, StoreSource) or source.labels() is None:
        return None
    found = load_tensors(source.store.path / "heldout" / IMAGES)
    images, labels = found["images"].numpy(), found["labels"].numpy()
    out = np.full(int(images.max(initial=-1)) + 1, -1, dtype=np.int64)
    out[images] = labels
    return out


@dataclass(frozen=True)
class ClassScores:
    """Scores by latent of every member and control, and the JSON-ready record."""

    members: dict[str, Scored]
    controls: dict[str, Scored]
    record: Json


@dataclass(frozen=True)
class _Bench:
    """What every member is scored with."""

    data: Labelled
    ground: Ground
    chance: Chance
    cfg: ClassesConfig
    progress: Progress

    def score(self, name: str, encode: Encode, units: int, data: Labelled | None = None) -> Scored:
        data = data or self.data
        table = tally(data, encode, units, self.ground, self.cfg, self.progress)
        found = scored(name, table, self.chance, self.cfg)
        found.summary["ncl"]["minibatch"] = one_minibatch(data, encode, self.ground, self.cfg)
        return found

    def score_sae(self, name: str, sae: SAE, data: Labelled | None = None) -> Scored:
        found = self.score(name, latents_of(sae), sae.cfg.d_sae, data)
        found.sae = sae
        return found

    def control(self, kind: ClassControl, plain: Scored) -> Scored:
        """Score a control made like the plain member."""
        ground, l0 = self.ground, plain.summary["l0"]
        name = f"control-{kind.replace('_', '-')}"
        assert plain.sae is not None
        match kind:
            case "dimensions":
                positive = ground.positive
                return self.score(name, lambda x: Hits.of_dense(x, positive), len(positive))
            case "pca":
                return self.score_sae(name, pca(ground.mean, ground.covariance, l0))
            case "random_sae":
                made = random_control(plain.sae, ground.mean, l0, self.cfg.seed)
                return self.score_sae(name, made)
            case "shuffled":
                return self.score_sae(name, plain.sae, self.data.permuted(ground, self.cfg.seed))


def score_classes(
    family: EvaluatedSaes,
    data: Labelled,
    cfg: ClassesConfig = ClassesConfig(),  # noqa: B008  (frozen)
    progress: Progress = quiet,
) -> ClassScores:
    """Score every member of a family and the controls on held-out rows with classes.

    Returns per-latent arrays (`wsae.evals.glossary.CLASS_SCORES`) and a record with summaries and comparisons. Raises
    UserError for another width, NaN, no rows, a row without a class, or rows of one class.
    """
    if not family.saes:
        raise UserError("there is no member to score")
    for name, sae in family.saes.items():
        if data.hook in data.source.hooks:
            check_width(name, sae.cfg.d_in, data.source.hooks[data.hook])
    ground = look(data, cfg)
    chance = chance_levels(ground.totals.numpy(), len(ground.images), cfg.permutations, cfg.seed)
    bench = _Bench(data, ground, chance, cfg, progress)
    members = {name: bench.score_sae(name, sae) for name, sae in family.saes.items()}
    reference = next(iter(family.twins.values()), next(iter(family.saes)))
    made = [bench.control(kind, members[reference]) for kind in cfg.controls]
    controls = {control.name: control for control in made}
    record = {
        "hook": data.hook,
        "config": cfg.to_dict(),
        "rows": ground.rows,
        "images": len(ground.images),
        "class_totals": ground.totals.tolist(),
        "reference": reference,
        "members": {name: member.summary for name, member in members.items()},
        "controls": {name: control.summary for name, control in controls.items()},
        "comparisons": comparisons(members, controls, family.twins, cfg),
    }
    return ClassScores(members, controls, record)


def score_run(
    run: Path,
    source: HeldOut,
    labels: Labels,
    cfg: ClassesConfig = ClassesConfig(),  # noqa: B008  (frozen)
    progress: Progress = quiet,
) -> Json:
    """Score every member of a finished run into RUN/classes; return the content of classes.json by hook.

    The directory is whole or has no manifest. Raises UserError as `score_classes`, and where `run` is not finished.
    """
    record: Json = {"hooks": {}, "glossary": glossary(CLASS_SCORES)}
    arrays: dict[str, Tensor] = {}
    for hook, family in run_subject(run, source).items():
        found = score_classes(family, Labelled(source, hook, labels), cfg, progress)
        record["hooks"][hook] = found.record
        for name, scores in (found.members | found.controls).items():
            arrays |= {f"{hook}|{name}|{key}": value for key, value in scores.arrays.items()}
    inputs = {"labels": digest(np.asarray(labels).tolist())}
    write_part(run, CLASSES_PART, cfg, {CLASSES: record, ARRAYS: arrays}, inputs)
    return record


def comparisons(
    members: dict[str, Scored],
    controls: dict[str, Scored],
    twins: dict[str, str],
    cfg: ClassesConfig,
) -> list[Json]:
    """Return the lines: a, b, metric (the score), over, difference, low, high, effect_size, n."""
    out = []

    def add(a: str, b: str, score: str, found: dict[str, Difference]) -> None:
        for over, gap in found.items():
            out.append({"a": a, "b": b, "metric": score, "over": over, **gap._asdict()})

    for member, twin in twins.items():
        a, b = members[member], members[twin]
        pairs = _matched(a, b, cfg)
        for score in CLASS_SCORES:
            add(member, twin, score, _differences(a, b, score, pairs, cfg))
    for name, member in members.items():
        for control, other in controls.items():
            for score in CLASS_SCORES:
                add(name, control, score, {"control": _unpaired(member, other, score, cfg)})
    return out


def _differences(
    a: Scored, b: Scored, score: str, pairs: Matching, cfg: ClassesConfig
) -> dict[str, Difference]:
    """Return a - b of one score over all latents, matched ones, equal density, and over images."""
    bootstrap = cfg.bootstrap()
    x, y = (Sample(side.values("density"), side.values(score)) for side in (a, b))
    left, right = x.score[pairs.pair_a.numpy()], y.score[pairs.pair_b.numpy()]
    both = ~np.isnan(left) & ~np.isnan(right)
    found = {
        "all": _unpaired(a, b, score, cfg),
        "matched": paired_difference(mean(left[both]), mean(right[both]), bootstrap),
        "density": matched_density(x, y, bootstrap),
        "adjusted": density_adjusted(x, y, bootstrap),
        "within": _within(a, b, score, cfg),
    }
    if score in a.images and score in b.images:
        p, q = a.images[score], b.images[score]
        between = OverImages(p.value - q.value, p.without - q.without)
        edges = jackknife(between, cfg.confidence)
        found["images"] = Difference(between.value, *edges, None, len(between.without))
    return found


def _matched(a: Scored, b: Scored, cfg: ClassesConfig) -> Matching:
    """Return which live latent of `a` goes with which of `b`, by decoder direction."""
    assert a.sae is not None
    assert b.sae is not None
    live = [side.arrays["support"].nonzero()[:, 0] for side in (a, b)]
    left, right = LiveDecoder(a.sae.directions, live[0]), LiveDecoder(b.sae.directions, live[1])
    return match(left, right, cfg.assignment_max, cfg.seed)


def _unpaired(a: Scored, b: Scored, score: str, cfg: ClassesConfig) -> Difference:
    """Return the difference of means, each side resampled on its own, once for all comparisons it takes part in."""
    return unpaired_difference(
        a.known(score),
        b.known(score),
        cfg.bootstrap(),
        lambda side: (a, b)[side].resampled(score, cfg),
    )


def _within(a: Scored, b: Scored, score: str, cfg: ClassesConfig) -> Difference:
    """Return the difference of means at the mean mix of classes, each side's latents resampled on their own.

    A latent is of the class it fires on most; classes that one side has no latent of are left out.
    """
    values = [side.known(score) for side in (a, b)]
    labels = [s.arrays["label"].numpy()[~np.isnan(s.values(score))] for s in (a, b)]
    n_classes = 1 + max(int(found.max(initial=0)) for found in labels)
    n = min(map(len, values))

    def at_one_mix(picks: list[np.ndarray] | None = None) -> float | None:
        """Weigh the classes that both have as both have them on average."""
        sides = list(zip(values, labels, strict=True))
        if picks is not None:
            sides = [(v[i], c[i]) for (v, c), i in zip(sides, picks, strict=True)]
        counts = np.stack([np.bincount(c, minlength=n_classes) for _, c in sides])
        sums = np.stack([np.bincount(c, weights=v, minlength=n_classes) for v, c in sides])
        both = (counts > 0).all(0)
        if not both.any():
            return None
        mix = (counts[0] / counts[0].sum() + counts[1] / counts[1].sum())[both]
        means = sums[:, both] / counts[:, both]
        return float((mix / mix.sum() * (means[0] - means[1])).sum())

    difference = at_one_mix()
    if n < 2 or difference is None:
        return Difference(difference, None, None, None, n)
    rng = np.random.default_rng(seed_for(cfg.seed, "within", a.name, b.name, score))
    drawn = (
        at_one_mix([rng.integers(0, len(v), len(v)) for v in values]) for _ in range(cfg.draws)
    )
    draws = np.array([value for value in drawn if value is not None])
    return Difference(difference, *percentiles(draws, cfg.confidence, n), None, n)
