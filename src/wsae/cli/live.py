"""Flags that name a model's text and hook points, and the source of activations they lead to."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from wsae.acts.config import HarvestConfig
from wsae.cli.flags import Count, MaybeName, Number
from wsae.cli.plan import read_vector
from wsae.core.artifact import check_file, read_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError, understood
from wsae.core.files import read_json

if TYPE_CHECKING:
    from wsae.acts.images.gallery import Gallery
    from wsae.acts.language import LanguageModel
    from wsae.acts.source import ActivationSource

Precision = Literal["float32", "bfloat16"]
DEFAULTS = HarvestConfig.parse({})


class LiveFlags(Config):
    """A model's text, and the rows to keep."""

    text: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Text for the model: .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow, also packed (.gz, .zst, .xz, .bz2), a
    directory of these or of save_to_disk, a hub dataset's name, or "builtin"."""
    hook: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...", help_behavior_hint="")
    ] = ()
    """Modules to read: "layers.9", "layers.*", "layers.9.mlp"; several are read in one pass."""
    field: Annotated[str, tyro.conf.arg(metavar="NAME")] = DEFAULTS.text.field
    """Key or column that holds the text, a conversation or token ids; dots lead deeper ("data.text")."""
    split: MaybeName = None
    """Split of a hub dataset or of a directory that has several; none means train."""
    subset: MaybeName = None
    """Configuration of a hub dataset that has several."""
    seq_len: Count = DEFAULTS.seq_len
    """Tokens per sequence."""
    pack: bool = DEFAULTS.pack
    """Join documents and cut every seq-len tokens; --no-pack: one document per sequence."""
    batch_seqs: Count = DEFAULTS.batch_seqs
    """Sequences per forward pass."""
    heldout_tokens: Count = DEFAULTS.heldout_tokens
    """Rows kept for evaluation, from documents that are not trained on."""
    skip_first: Count = DEFAULTS.skip_first
    """Positions dropped at the start of each sequence (the first is an attention sink)."""
    skip_special: bool = DEFAULTS.skip_special
    """Drop begin- and end-of-text and other special tokens."""
    sink_norm_ratio: Number = DEFAULTS.sink_norm_ratio or 0.0
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
        return (path / "manifest.json").exists() or not known
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
    from wsae.acts.arrays import is_folder_of_arrays

    path = Path(source)
    return is_folder_of_arrays(path) if path.is_dir() else is_data(source)


def reopen(run: Path, device: str, elsewhere: str | None = None) -> "ActivationSource":
    """Return the source that a run was trained on, as its config.json describes it, or `elsewhere` in its place."""
    manifest = read_manifest(run, "run", verify=False)
    if "config.json" in manifest.files:
        check_file(run, "config.json", manifest.files["config.json"])
    with understood(run / "config.json"):
        record = read_json(run / "config.json").get("source") or {}
        return reopened(record, str(run), device, elsewhere)


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
    from wsae.acts.images.gallery import Gallery
    from wsae.acts.images.harvest import store_images

    try:
        return Gallery(store_images(source.store))
    except UserError:
        return None
