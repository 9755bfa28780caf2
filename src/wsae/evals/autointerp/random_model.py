"""The costliest control: an SAE trained the same way on the same text, of a model that learned nothing.

Latents of a randomly initialised transformer can be explained too, since they still see words (Heap et al. 2025); what
they reach is the part of a score that says nothing about the trained model.
"""

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError
from wsae.core.files import digest, read_json, write_json
from wsae.core.progress import Progress
from wsae.core.seeds import seed_for
from wsae.evals.autointerp.controls import NAMES
from wsae.evals.data import HeldOut, Language
from wsae.sae import SparseAutoencoder
from wsae.train.config import TrainConfig
from wsae.train.run import load_run, train_run

if TYPE_CHECKING:
    from wsae.acts.config import HarvestConfig
    from wsae.acts.live import LiveSource

IDENTITY = "identity.json"


class RandomModel(NamedTuple):
    """The control's SAEs by hook, and the held-out rows of the model with random weights."""

    saes: dict[str, SparseAutoencoder]
    source: "LiveSource"


class Recipe(NamedTuple):
    """What is repeated on the model with random weights, and how."""

    source: HeldOut
    """The run's own data: a store or a live model."""
    language: Language | None
    train: TrainConfig
    """The run's training."""
    member: str
    """The member that is trained again."""
    seed: int
    keep_store: bool = False


def random_model(recipe: Recipe, place: Path, progress: Progress) -> RandomModel:
    """Train (or finish, or just open) the control in `place`.

    A run on a store harvests the same text once; that store is removed when training is done unless it is to be kept.
    A run on a live model trains on the live model. Raises UserError where there is no model behind the data.
    """
    from wsae.acts.harvest import harvest
    from wsae.acts.language import LanguageModel
    from wsae.acts.live import LiveSource
    from wsae.acts.reinit import reinitialised
    from wsae.acts.source import StoreSource

    cfg = harvest_config(recipe.source)
    if cfg is None or not isinstance(recipe.language, LanguageModel):
        raise UserError(
            "control random_model: this run's data have no language model behind them; leave it out"
        )
    language = reinitialised(recipe.language, seed_for(recipe.seed, "random model"))
    training = _training(recipe)
    _enter(place, digest([cfg.to_dict(), language.digest, training.to_dict()]))
    live, run, store = LiveSource(cfg, language=language), place / "run", place / "store"
    if not (run / MANIFEST).exists():
        data = live
        if not isinstance(recipe.source, LiveSource):
            rows = cfg.model_copy(update={"heldout_tokens": 0})
            data = StoreSource(harvest(rows, store, progress, language).path, verify=False)
        train_run(training, data, run, progress, resume=True, device=str(language.device))
    if not recipe.keep_store:
        shutil.rmtree(store, ignore_errors=True)
    name = NAMES["random_model"]
    return RandomModel({hook: saes[name] for hook, saes in load_run(run).saes.items()}, live)


def harvest_config(source: HeldOut) -> "HarvestConfig | None":
    """Return how a store or a live source reads its model, for all of its hooks; None for arrays."""
    from wsae.acts.config import HarvestConfig
    from wsae.acts.live import LiveSource
    from wsae.acts.source import StoreSource

    if isinstance(source, LiveSource):
        return source.cfg
    if not isinstance(source, StoreSource):
        return None
    cfg = HarvestConfig.parse(source.store.manifest.config, where=f"{source.store.path}")
    return cfg.model_copy(update={"hooks": tuple(source.hooks)})


def _training(recipe: Recipe) -> TrainConfig:
    """Return the run's training with the one member."""
    members = dict(zip(recipe.train.names(), recipe.train.members, strict=True))
    member = members[recipe.member].model_copy(update={"label": NAMES["random_model"]})
    return recipe.train.model_copy(update={"members": (member,)})


def _enter(place: Path, identity: str) -> None:
    """Begin anew where `place` holds the control of another model, text or training."""
    known = place / IDENTITY
    if place.is_dir() and (not known.is_file() or read_json(known) != identity):
        shutil.rmtree(place)
    write_json(place / IDENTITY, identity)
