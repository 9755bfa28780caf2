"""Flags that name a model's text and hook points, and the source of activations they lead to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from wsae.acts.config import HarvestConfig
from wsae.acts.images.config import ImageHarvestConfig
from wsae.acts.names import among
from wsae.cli.flags import (
    Count,
    MaybeCount,
    MaybeName,
    MaybePlace,
    Name,
    Number,
    config_flags,
    config_values,
)
from wsae.core.config import Config
from wsae.core.errors import UserError, understood
from wsae.losses.config import GammaConfig, Rule
from wsae.run import CONFIG, MANIFEST, Run
from wsae.sae.config import JumpReLU, Kind
from wsae.train.config import MemberConfig, TrainConfig, family

if TYPE_CHECKING:
    import numpy as np

    from wsae.acts.images.harvest import Gallery
    from wsae.acts.language import LanguageModel
    from wsae.acts.source import ActivationSource

# Flags that say which SAEs to train and for how long.

TOKENS = 250_000
"""Training tokens where neither --tokens nor the data say how many."""


class PlanFlags(
    config_flags(
        MemberConfig,
        GammaConfig,
        JumpReLU,
        TrainConfig,
        omit=("label", "rule", "kind", "vector", "tokens", "alpha"),
    )
):
    """The SAEs: their shape, their loss weights and their training."""

    k: MaybeCount = None
    """Active latents per sample of the Top-k kinds; default: 32."""
    activation: Kind = "topk"
    """Which latents may be active."""
    gamma: Rule = "variance"
    """What the loss weights follow; "vector" reads --gamma-file."""
    alpha: Annotated[tuple[float, ...], tyro.conf.arg(metavar="A ...")] = (1.0,)
    """Exponents of the weights; each gives one SAE on the same batches."""
    gamma_file: MaybePlace = None
    """A .npy vector of width d_in for --gamma vector."""
    twin: bool = True
    """Train the plain SAE beside them, for comparison."""
    tokens: MaybeCount = None
    """Training rows; default: once through the data, or 250,000 from a live model."""

    def config(self, rows: int | None, seed: int) -> TrainConfig:
        """Return the run these flags describe over `rows` rows of data; raises UserError in one line."""
        members = family([self._member(gamma) for gamma in self._gammas()], self.twin)
        tokens = self.tokens if self.tokens is not None else (rows or TOKENS)
        own = {"members": members, "tokens": tokens, "seed": seed}
        return TrainConfig.parse(config_values(self, TrainConfig) | own, where="flags")

    def _gammas(self) -> list[dict[str, object]]:
        if self.gamma == "none":
            if self.robust != "none":
                raise UserError(
                    f"--robust {self.robust}: the plain loss has no proxy to tame; for the plain loss without outlier "
                    "dimensions use --gamma variance --alpha 0 --robust drop"
                )
            return [{}]
        if not self.alpha:
            raise UserError("--alpha: give at least one number")
        base = config_values(self, GammaConfig) | {"rule": self.gamma, "vector": self._vector()}
        return [{**base, "alpha": alpha} for alpha in self.alpha]

    def _member(self, gamma: dict[str, object]) -> MemberConfig:
        own = {"gamma": gamma, "activation": self._activation()}
        return MemberConfig.parse(config_values(self, MemberConfig) | own, where="flags")

    def _activation(self) -> dict[str, object]:
        kind = self.activation
        jump = config_values(self, JumpReLU)
        for name, value in jump.items():
            if kind != "jumprelu" and value != JumpReLU.model_fields[name].default:
                raise UserError(
                    f"--{name} {value:g}: {kind} has no {name}; leave it out, or use --activation jumprelu"
                )
        if kind not in ("relu", "jumprelu"):
            return {"kind": kind, "k": 32 if self.k is None else self.k}
        if self.k is not None:
            raise UserError(
                f"--k {self.k}: {kind} has no k; leave it out, or use --activation topk"
            )
        return {"kind": kind, **(jump if kind == "jumprelu" else {})}

    def _vector(self) -> tuple[float, ...] | None:
        if self.gamma_file is None:
            return None
        values = read_vector(
            "--gamma-file", self.gamma_file, "fiu", "one number per input dimension"
        )
        return tuple(float(v) for v in values)


def read_vector(flag: str, path: Path, kinds: str, needed: str) -> "np.ndarray":
    """Return the one-dimensional .npy array at `path` with a dtype among `kinds`; raises UserError else."""
    from wsae.core.npy import mapped_npy

    values = mapped_npy(path, f"{flag} {path}")
    if values.ndim != 1 or values.dtype.kind not in kinds:
        raise UserError(
            f"{flag} {path}: shape {values.shape} of {values.dtype}; {needed} is needed"
        )
    return values.copy()


Precision = Literal["float32", "bfloat16"]
TEXT_DEFAULTS = HarvestConfig.parse({})


class LiveFlags(Config):
    """A model's text, and the rows to keep."""

    text: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Text for the model: .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow, also packed (.gz, .zst, .xz, .bz2), a
    directory of these or of save_to_disk, a hub dataset's name, or "builtin"."""
    hook: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...", help_behavior_hint="")
    ] = ()
    """Modules to read: "layers.9", "layers.*", "layers.9.mlp"; several are read in one pass."""
    field: Annotated[str, tyro.conf.arg(metavar="NAME")] = TEXT_DEFAULTS.text.field
    """Key or column that holds the text, a conversation or token ids; dots lead deeper ("data.text")."""
    split: MaybeName = None
    """Split of a hub dataset or of a directory that has several; none means train."""
    subset: MaybeName = None
    """Configuration of a hub dataset that has several."""
    seq_len: Count = TEXT_DEFAULTS.seq_len
    """Tokens per sequence."""
    pack: bool = TEXT_DEFAULTS.pack
    """Join documents and cut every seq-len tokens; --no-pack: one document per sequence."""
    batch_seqs: Count = TEXT_DEFAULTS.batch_seqs
    """Sequences per forward pass."""
    heldout_tokens: Count = TEXT_DEFAULTS.heldout_tokens
    """Rows kept for evaluation, from documents that are not trained on."""
    skip_first: Count = TEXT_DEFAULTS.skip_first
    """Positions dropped at the start of each sequence (the first is an attention sink)."""
    skip_special: bool = TEXT_DEFAULTS.skip_special
    """Drop begin- and end-of-text and other special tokens."""
    sink_norm_ratio: Number = TEXT_DEFAULTS.sink_norm_ratio or 0.0
    """Drop tokens whose norm exceeds this many times the median; 0 keeps them."""

    def given(self) -> bool:
        """Whether the flags name a model's text or hooks, so that the source is a model."""
        return self.text is not None or bool(self.hook)

    def config(self, model: str, **rest: object) -> HarvestConfig:
        """Return the harvest these flags describe; raises UserError in one line."""
        if not self.hook:
            raise UserError('no --hook: name the modules to read, for example --hook "layers.9"')
        if self.text is None:
            raise UserError("no --text: give a file of text, or --text builtin for the shipped one")
        text = {"path": self.text, "field": self.field, "split": self.split, "subset": self.subset}
        plain = ("seq_len", "pack", "batch_seqs", "heldout_tokens", "skip_first", "skip_special")
        data = {name: getattr(self, name) for name in plain} | {
            "model": model,
            "text": text,
            "hooks": self.hook,
            "sink_norm_ratio": self.sink_norm_ratio or None,
            **rest,
        }
        return HarvestConfig.parse(data, where="flags")


def is_data(source: str) -> bool:
    """Whether `source` is a store or an array file that exists, rather than a model."""
    path = Path(source)
    if path.is_dir():
        of_model = ("config.json", "adapter_config.json", "model_index.json", "modules.json")
        known = any((path / name).exists() for name in of_model) or any(path.glob("*.gguf"))
        return (path / MANIFEST).exists() or not known
    return path.exists() and path.suffix != ".gguf"


def open_data(
    source: str, live: LiveFlags, seed: int, device: str, rest: dict[str, object]
) -> "ActivationSource":
    """Return the activations of a store or an array, or of a live model on --text."""
    from wsae.acts.source import open_source

    if is_data(source):
        if live.text is not None:
            raise UserError(
                f"--text {live.text}: {source} holds activations already; leave --text out"
            )
        return open_source(source, hooks=live.hook or None)
    if not live.given():
        raise UserError(
            f"{source}: no such store or array; if it is a model, add --text FILE --hook PATTERN"
        )
    cfg = live.config(source, seed=seed, device=device, **rest)
    from wsae.acts.live import LiveSource

    return LiveSource(cfg)


def open_labelled(source: str, labels: Path) -> "ActivationSource":
    """Return the array at `source` with one class per row, for the gamma rule consistency."""
    from wsae.acts.source import ArraySource

    if not _is_array(source):
        raise UserError(
            f"--labels {labels}: goes with an array file, one class per row; {source} is none"
        )
    classes = read_vector("--labels", labels, "iu", "one whole number per row")
    return ArraySource(source, name=Path(source).stem, labels=classes.astype("int64"))


def _is_array(source: str) -> bool:
    """Whether there is an array file, or a folder of them."""
    from wsae.acts.source import is_folder_of_arrays

    path = Path(source)
    return is_folder_of_arrays(path) if path.is_dir() else is_data(source)


def reopen(run: Path, device: str, elsewhere: str | None = None) -> "ActivationSource":
    """Return the source that a run was trained on, as its config.json describes it, or `elsewhere` in its place."""
    opened = Run(run)
    with understood(opened.manifest and run / CONFIG):
        if not opened.single or (elsewhere is None and opened.source):
            return reopened(opened.source, str(run), device, elsewhere)
    about = opened.provenance
    if elsewhere is None:
        raise UserError(
            f"{run}: a single SAE knows no data; name a store or an array with --source (a store is made by: "
            f"wsae harvest {about.model or 'MODEL'} --hook {about.hook or 'HOOK'} --text FILE --out STORE)"
        )
    return at_hook(elsewhere, about.hook)


def at_hook(source: str, hook: str | None) -> "ActivationSource":
    """Return the source with one hook: that of an SAE where there are several."""
    from wsae.acts.source import open_source

    data = open_source(source)
    if len(data.hooks) == 1:
        return data
    mine = among(hook, data.hooks) if hook else None
    if mine is None:
        raise UserError(
            f"{source}: has hooks {', '.join(data.hooks)}, and the SAE is of {hook or 'a hook it does not name'}; "
            "harvest that hook alone, or give an array"
        )
    return open_source(source, hooks=(mine,))


def reopened(
    record: dict[str, Any], run: str, device: str, other: str | None = None, flag: str = "--source"
) -> "ActivationSource":
    """Return the source that a run's record describes, or `other` in its place; `flag` is what else names data.

    An array has no hooks of its own: it takes the name that the run's had.
    """
    from wsae.acts.source import ArraySource, open_source

    hooks = tuple(record.get("hooks", ()))
    if not all(isinstance(hook, str) for hook in hooks):
        raise UserError(f"{run}: the hooks in its config.json are not all names (altered)")
    if other is not None:
        if _is_array(other) and len(hooks) == 1:
            return ArraySource(other, name=hooks[0])
        return open_source(other, hooks=hooks)
    if record.get("kind") == "live":
        from wsae.acts.live import LiveSource

        data = {**record["harvest"], "device": device}
        return LiveSource(HarvestConfig.parse(data, where=run))
    path = record.get("path")
    if path is None:
        raise UserError(f"{run}: was trained on an array in memory; name the data with {flag}")
    if not Path(path).exists():
        raise UserError(f"{path}: the run's data are no longer there; name them with {flag}")
    return open_source(path, hooks=hooks if record.get("kind") == "store" else None)


def language_of(source: "ActivationSource", device: str) -> "LanguageModel | None":
    """Return the model behind a source: the live one, that of the store's manifest, or None for arrays and images."""
    live = getattr(source, "language", None)
    store = getattr(source, "store", None)
    if live is not None or store is None or store.of_images:
        return live
    from wsae.acts.language import load_language

    cfg = HarvestConfig.parse(store.manifest.config, where="store")
    return load_language(cfg.model, cfg.dtype, device)


def labelled(source: "ActivationSource", labels: Path | None) -> "ActivationSource":
    """Return the source with the classes in a .npy file, one a row, where one is given; UserError for a store."""
    from wsae.acts.source import ArraySource

    if labels is None:
        return source
    if not isinstance(source, ArraySource):
        raise UserError(f"--labels {labels}: goes with an array file, one class per row")
    classes = read_vector("--labels", labels, "iu", "one whole number per row")
    return source.with_labels(classes.astype("int64"))


def behind(
    source: "ActivationSource", device: str, language: bool = True
) -> "LanguageModel | Gallery | None":
    """Return what evaluation shows or splices: a source's language model, or the images of its store; None for arrays.

    `language`: whether the model is wanted.

    Images that have moved or changed are left out: scores do not need them.
    """
    from wsae.acts.source import StoreSource

    if not isinstance(source, StoreSource) or not source.store.of_images:
        return language_of(source, device) if language else None
    from wsae.acts.images.harvest import Gallery, store_images

    try:
        return Gallery(store_images(source.store))
    except UserError:
        return None


# Flags that name images, and the harvest they lead to.

IMAGE_DEFAULTS = ImageHarvestConfig(model="")
SHARED = ("hook", "split", "subset")
"""Flags of `LiveFlags` that images take too."""


class ImageFlags(Config):
    """Images for a vision model, and the rows to keep."""

    images: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Images for the model, in place of --text: a folder of class folders, .npz, a folder of IDX files, .parquet, a hub
    dataset's name, or "digits"."""
    size: MaybeCount = None
    """Side in pixels; none means the model's own, cut as the model's own preparation does."""
    limit: MaybeCount = None
    """Images read at most, a random choice; none means all."""
    workers: Count = IMAGE_DEFAULTS.images.workers
    """Processes that decode images; 0: the main one."""
    batch_size: Count = IMAGE_DEFAULTS.batch_size
    """Images per forward pass."""
    heldout_fraction: Number = IMAGE_DEFAULTS.heldout_fraction
    """Share of the images kept for evaluation."""
    image_field: Name = IMAGE_DEFAULTS.images.image_field
    """Column of a table that holds the images."""
    label_field: Name = IMAGE_DEFAULTS.images.label_field
    """Column of a table that holds their classes."""
    on_error: Literal["skip", "raise"] = IMAGE_DEFAULTS.images.on_error
    """What an unreadable image does: it is left out, named and counted, or ends the command."""

    def config(self, model: str, live: LiveFlags, **rest: object) -> ImageHarvestConfig:
        """Return the harvest these flags describe; raises UserError in one line, also for flags of text."""
        if live.text is not None:
            raise UserError(f"--images {self.images} and --text {live.text}: give one of them")
        for name, field in LiveFlags.model_fields.items():
            if name not in SHARED and getattr(live, name) != field.default:
                raise UserError(f"--{name.replace('_', '-')}: is for --text, not for --images")
        read = ("size", "workers", "image_field", "label_field", "on_error")
        images = {name: getattr(self, name) for name in read}
        images |= {"path": self.images, "split": live.split, "subset": live.subset}
        own = ("limit", "batch_size", "heldout_fraction")
        data: dict[str, Any] = {name: getattr(self, name) for name in own}
        hooks = {"hooks": live.hook} if live.hook else {}
        return ImageHarvestConfig.parse(
            {**data, **hooks, "model": model, "images": images, **rest}, where="flags"
        )

    def refuse(self) -> None:
        """Raise UserError where a flag of images is given without --images."""
        for name, field in ImageFlags.model_fields.items():
            if getattr(self, name) != field.default:
                raise UserError(f"--{name.replace('_', '-')}: is for --images, which is not given")
