"""Score SAEs against class labels: a family in memory, or a finished run into RUN/classes."""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor

from wsae.acts.source import ArraySource, StoreSource
from wsae.acts.store import IMAGES
from wsae.core.artifact import (
    ARRAYS,
    CLASSES,
    CLASSES_PART,
    MANIFEST,
    write_manifest,
)
from wsae.core.files import digest, locked, write_json
from wsae.core.progress import Progress, quiet
from wsae.core.tensors import load_tensors, save_tensors
from wsae.evals.autointerp.controls import pca
from wsae.evals.classes.comparing import Named, comparisons
from wsae.evals.classes.config import ClassControl, ClassesConfig
from wsae.evals.classes.score import Json, Scored, glossary, scored
from wsae.evals.classes.tally import (
    Encode,
    Ground,
    Labelled,
    Labels,
    check_members,
    dimensions_of,
    latents_of,
    look,
    one_minibatch,
    tally,
)
from wsae.evals.control import random_control
from wsae.evals.data import HeldOut
from wsae.evals.measure import Family
from wsae.evals.run import run_subject
from wsae.run import Run
from wsae.sae import SparseAutoencoder
from wsae.stats.classes import Chance, chance_levels

# Where the classes of held-out rows come from.


def labels_of(source: HeldOut) -> Labels | None:
    """Return the class of every image, or row of an array, by number (-1: not held out); none without classes."""
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

    members: Named
    controls: Named
    record: Json


class _Bench(NamedTuple):
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

    def score_sae(self, name: str, sae: SparseAutoencoder, data: Labelled | None = None) -> Scored:
        found = self.score(name, latents_of(sae), sae.cfg.d_sae, data)
        found.sae = sae
        return found


def score_classes(
    family: Family,
    data: Labelled,
    cfg: ClassesConfig = ClassesConfig(),  # noqa: B008  (frozen)
    progress: Progress = quiet,
) -> ClassScores:
    """Score every member of a family and the controls on held-out rows with classes.

    Returns per-latent arrays (`wsae.evals.classes.score.SCORES`) and a record with summaries and comparisons. Raises
    UserError for another width, NaN, no rows, a row without a class, or rows of one class.
    """
    if data.hook in data.source.hooks:
        check_members(family.saes, data.source.hooks[data.hook])
    ground = look(data, cfg)
    chance = chance_levels(ground.totals.numpy(), ground.rows, cfg.permutations, cfg.seed)
    bench = _Bench(data, ground, chance, cfg, progress)
    members = {name: bench.score_sae(name, sae) for name, sae in family.saes.items()}
    reference = next(iter(family.twins.values()), next(iter(family.saes)))
    controls = _controls(bench, members[reference])
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
    subject = run_subject(run, source)
    record: Json = {"hooks": {}, "glossary": glossary()}
    arrays: dict[str, Tensor] = {}
    for hook, family in subject.families.items():
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


def _controls(bench: _Bench, plain: Scored) -> Named:
    """Return the controls made like the plain member, by name."""
    found = [_control(control, bench, plain) for control in bench.cfg.controls]
    return {control.name: control for control in found}


def _control(control: ClassControl, bench: _Bench, plain: Scored) -> Scored:
    ground, l0 = bench.ground, plain.summary["l0"]
    name = f"control-{control.replace('_', '-')}"
    assert plain.sae is not None
    match control:
        case "dimensions":
            return bench.score(name, dimensions_of(ground), len(ground.positive))
        case "pca":
            made = pca(ground.mean, ground.covariance, l0)
        case "random_sae":
            made = random_control(plain.sae, ground.mean, l0, bench.cfg.seed)
        case "shuffled":
            shuffled = bench.data.permuted(ground, bench.cfg.seed)
            return bench.score_sae(name, plain.sae, shuffled)
    return bench.score_sae(name, made.to(plain.sae.W_dec.device))
