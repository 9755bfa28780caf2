"""Evaluate a training run on held-out data into RUN/evaluation, or one SAE on an array."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsae.acts.arrays import as_path, is_folder_of_arrays
from wsae.acts.source import open_source
from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.calls import own_settings
from wsae.core.errors import UserError, understood
from wsae.core.files import locked, read_json, write_json
from wsae.core.progress import Progress, quiet
from wsae.core.tensors import save_tensors
from wsae.evals.assemble import Json, Subject, evaluate_families
from wsae.evals.config import EvalConfig
from wsae.evals.control import CONTROL
from wsae.evals.data import HeldOut, Language, Pictures, Rows
from wsae.evals.measure import Family, measure
from wsae.evals.scores import member_metrics
from wsae.sae import SparseAutoencoder
from wsae.train.config import TrainConfig
from wsae.train.run import load_run

EVALUATION, ARRAYS, CONTEXTS = "evaluation.json", "arrays.safetensors", "contexts.json"
THUMBNAILS = "thumbnails.json"


@own_settings()
def evaluate(
    sae: SparseAutoencoder,
    acts: object,
    cfg: EvalConfig = EvalConfig(n_latents=0),  # noqa: B008  (frozen)
    progress: Progress = quiet,
) -> Json:
    """Measure one SAE on activations it was not trained on: {"metrics": {name: {value, low, high}}, "arrays": {...}}.

    `acts` are numbers [rows, d_in] or [n, seq, d_in] in memory, in a file or a folder of files, of which all rows are
    used; or a store (or its path) or another source with one hook, of which the held-out rows are. Formulas:
    `wsae.evals.glossary`. Raises UserError for another width, NaN, infinity, or no rows.
    """
    if not isinstance(sae, SparseAutoencoder):
        raise UserError(
            f"evaluate: given {type(sae).__name__} in place of an SAE; SparseAutoencoder.load(path)"
        )
    source = _data(acts)
    if len(source.hooks) != 1:
        raise UserError(
            f"the data have {len(source.hooks)} hooks ({', '.join(source.hooks)}); give one"
        )
    (hook,) = source.hooks
    found = measure(source, {hook: Family({"sae": sae})}, cfg, progress=progress)[hook]
    arrays = _as_numpy(found.arrays["sae"])
    out: Json = {"metrics": member_metrics("sae", arrays, cfg), "arrays": arrays}
    if CONTROL in found.arrays:
        control = _as_numpy(found.arrays[CONTROL])
        out["control"] = member_metrics(CONTROL, control, cfg)
    return out


def _as_numpy(arrays: dict[str, Tensor]) -> dict[str, np.ndarray]:
    """Return arrays as NumPy's; it has no bfloat16, in which an SAE's own numbers may be."""
    return {
        key: (value.float() if value.dtype == torch.bfloat16 else value).numpy()
        for key, value in arrays.items()
    }


def _data(acts: object) -> HeldOut:
    path = as_path(acts)
    if path is not None and path.is_dir() and not is_folder_of_arrays(path):
        return open_source(path)
    return acts if isinstance(acts, HeldOut) else Rows(acts)


@own_settings()
def evaluate_run(
    run: Path,
    source: HeldOut,
    cfg: EvalConfig = EvalConfig(),  # noqa: B008  (frozen)
    behind: Language | Pictures | None = None,
    progress: Progress = quiet,
) -> Json:
    """Measure every member of a finished run and write RUN/evaluation; return the content of evaluation.json.

    `behind` is the language model behind the activations (without it, or without tokens, nothing is spliced) or the
    images (without them no latent has pictures). The directory is whole or has no manifest. Raises UserError when `run`
    is not a finished run, or does not fit the source.
    """
    subject = run_subject(run)
    found = evaluate_families(subject, source, cfg, behind, progress)
    notes = [*_training(run).doubts(), *doubts(found.record["hooks"])]
    if notes:
        found.record["notes"] = [*found.record.get("notes", []), *notes]
    out = run / "evaluation"
    with locked(out, top=run):
        (out / MANIFEST).unlink(missing_ok=True)
        write_json(out / EVALUATION, found.record)
        write_json(out / CONTEXTS, found.contexts)
        save_tensors(out / ARRAYS, found.arrays)
        inputs = {
            "run": read_manifest(run, "run", verify=False).digest(),
            **{f"heldout/{hook}": entry["data"] for hook, entry in found.record["hooks"].items()},
        }
        files = [EVALUATION, CONTEXTS, ARRAYS]
        if found.thumbnails:
            write_json(out / THUMBNAILS, found.thumbnails)
            files.append(THUMBNAILS)
        write_manifest(out, "evaluation", cfg.to_dict(), files, inputs=inputs)
    return found.record


def run_subject(run: Path) -> Subject:
    """Return a finished run's families, each weighted member with its plain twin."""
    loaded, train = load_run(run), _training(run)
    gamma = read_json(run / "gamma.json")
    if any(set(saes) != set(train.names()) for saes in loaded.saes.values()):
        raise UserError(f"{run / 'config.json'}: names other members than the run has (altered)")
    twins = find_twins(train)
    members = {n: m.to_dict() for n, m in zip(train.names(), train.members, strict=True)}
    with understood(run / "gamma.json"):
        about = {
            hook: {
                name: {"config": members.get(name), "gamma": gamma[hook].get(name)} for name in saes
            }
            for hook, saes in loaded.saes.items()
        }
    return Subject({hook: Family(saes, twins) for hook, saes in loaded.saes.items()}, about)


def _training(run: Path) -> TrainConfig:
    """Return how a run's SAEs were trained."""
    place = run / "config.json"
    with understood(place):
        return TrainConfig.parse(read_json(place)["train"], where=str(place))


def doubts(hooks: Json) -> list[str]:
    """Return a note on every SAE that is worse than none, of {hook: {"members": {name: {"metrics": ...}}}}."""
    worse = [
        f"{hook}/{name} (FVU {value:.3g})"
        for hook, found in hooks.items()
        for name, entry in found["members"].items()
        if name not in (CONTROL, "random") and (value := _fvu(entry)) is not None and value > 1
    ]
    if not worse:
        return []
    return [
        f"{', '.join(worse)}: worse than the mean of the data alone; the SAE is of another model, hook or scale than "
        "these activations, or is hardly trained"
    ]


def _fvu(entry: Json) -> float | None:
    return entry["metrics"].get("fvu", {}).get("value")


def find_twins(train: TrainConfig) -> dict[str, str]:
    """Return, for each weighted member, the member that differs from it in gamma alone.

    Where there is none, the first unweighted member; a family without one has no twins.
    """
    named = list(zip(train.names(), train.members, strict=True))
    plain = [(name, member) for name, member in named if member.gamma.rule == "none"]
    out = {}
    for name, member in named:
        if member.gamma.rule != "none" and plain:
            wanted = member.model_copy(update={"gamma": None, "label": None})
            same = (
                p for p, m in plain if m.model_copy(update={"gamma": None, "label": None}) == wanted
            )
            out[name] = next(same, plain[0][0])
    return out
