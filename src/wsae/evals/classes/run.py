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
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from wsae.acts.source import ArraySource, JoinedSource, StoreSource
from wsae.acts.store import IMAGES
from wsae.core.artifact import (
    ARRAYS,
    CLASSES,
    CLASSES_PART,
    MANIFEST,
    write_manifest,
)
from wsae.core.errors import UserError
from wsae.core.files import digest, locked, write_json
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.core.tensors import load_tensors, save_tensors
from wsae.evals.classes.config import ClassControl, ClassesConfig
from wsae.evals.classes.tally import (
    Encode,
    Ground,
    Json,
    Labelled,
    Labels,
    Scored,
    latents_of,
    look,
    one_minibatch,
    scored,
    tally,
)
from wsae.evals.control import random_control
from wsae.evals.data import HeldOut
from wsae.evals.glossary import CLASS_SCORES, glossary
from wsae.evals.interpret.controls import pca
from wsae.evals.interpret.summary import Sample, density_adjusted, matched_density
from wsae.evals.intervals import (
    Difference,
    mean,
    paired_difference,
    percentiles,
    unpaired_difference,
)
from wsae.evals.matching import LiveDecoder, Matching, match
from wsae.evals.measure import EvaluatedSaes, check_width
from wsae.evals.run import run_subject
from wsae.run import Run
from wsae.sae import SAE
from wsae.stats.classes import Chance, Hits, OverImages, chance_levels, jackknife


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
    chance = chance_levels(ground.totals.numpy(), ground.rows, cfg.permutations, cfg.seed)
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
    out = run / CLASSES_PART
    with locked(out, top=run):
        (out / MANIFEST).unlink(missing_ok=True)
        write_json(out / CLASSES, record)
        save_tensors(out / ARRAYS, arrays)
        inputs = {
            "run": Run(run).manifest.digest(),
            "labels": digest(np.asarray(labels).tolist()),
        }
        write_manifest(out, CLASSES_PART, cfg.to_dict(), [CLASSES, ARRAYS], inputs=inputs)
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
    return Difference(difference, *percentiles(draws, cfg.confidence), None, n)
