"""What `corruption.py` damages: artifacts made in seconds, and for each file the command or reader it is for.

A new kind of file: make an artifact in `make_targets` and name its files and its reader.
"""

import contextlib
import io
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.reliability.common import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ("--d-sae", "24", "--k", "4", "--batch-size", "64", "--tokens", "1280", "--alpha", "1")
HARVEST = (
    *("--hook", "layers.1", "--tokens", "600", "--heldout-tokens", "600", "--seq-len", "32"),
    *("--shard-tokens", "300", "--batch-seqs", "4"),
)


class Target(NamedTuple):
    """Files of one artifact and the reader they are for."""

    name: str
    place: Path
    """The whole artifact; a case works on a copy."""
    files: tuple[str, ...]
    """Those to damage, relative to the place."""
    read: Callable[[Path], Any]
    """Reads a copy and returns something comparable; raises UserError."""


class Failed(Exception):
    """A command that ended with another code than done and bad input, or with more than one line."""


def make_targets(at: Path) -> list[Target]:
    """Write every artifact into `at` and return what to damage."""
    _prepare()
    _world(at)
    targets = [*_stores(at), *_runs(at), *_shared(at), *_toys(at), *_vision(at), _answers(at)]
    return [target for target in targets if target.files]


def command(*words: str) -> None:
    """Run a command in this process; raises UserError with its line for code 2, Failed for any other ending."""
    from wsae.cli.main import main
    from wsae.core.errors import UserError

    told = io.StringIO()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(told):
        code = main([*words, "--device", "cpu"])
    line = (told.getvalue().strip().splitlines() or [""])[-1]
    if code == 2 and line.startswith("wsae: error: "):
        raise UserError(line.removeprefix("wsae: error: "))
    if code:
        raise Failed(f"{words[0]} ended with {code}: {line}")


def contents(place: Path, *left_out: str) -> dict[str, bytes]:
    """Return a folder's files but those of these names, the lock and wall times."""
    drop = {".lock", "speed.jsonl", *left_out}
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name not in drop
    }


def files(place: Path, *patterns: str) -> tuple[str, ...]:
    """Return the files of a folder that fit a pattern, relative to it, without locks and wall times."""
    found: Iterable[Path] = (path for pattern in patterns for path in place.glob(pattern))
    names = {str(p.relative_to(place)) for p in found if p.is_file() and p.stat().st_size}
    return tuple(sorted(n for n in names if Path(n).name not in (".lock", "speed.jsonl")))


def _prepare() -> None:
    os.environ.update(ENVIRONMENT)
    sys.path.append(str(ROOT / "tests" / "support"))
    import torch

    torch.set_num_threads(1)


def _world(at: Path) -> None:
    """Write a model, an encoder of sentences and a text."""
    from benchmarks.reliability.world import make

    make(at)


def _interrupted(words: list[str], watched: str, after: int) -> None:
    """Run a command until the task `watched` has done `after` units, then stop it as Ctrl-C does."""
    from wsae.cli.common import UI
    from wsae.train import loop

    done, shown, seconds = [0], UI.progress, loop.CHECKPOINT_SECONDS

    @contextlib.contextmanager
    def counting(_: Any, task: str, *_of: object) -> Any:
        def tick(n: int, **_fields: float | str) -> None:
            done[0] += n if watched in task else 0
            if done[0] > after:
                raise KeyboardInterrupt

        yield tick

    screen: Any = UI
    screen.progress, loop.CHECKPOINT_SECONDS = counting, 0.0
    try:
        with contextlib.suppress(Failed):
            command(*words)
    finally:
        screen.progress, loop.CHECKPOINT_SECONDS = shown, seconds


def _stores(at: Path) -> list[Target]:
    harvest = ["harvest", str(at / "model"), "--text", str(at / "text.jsonl"), *HARVEST]
    command(*harvest, "--out", str(at / "store"))
    _interrupted([*harvest, "--out", str(at / "begun")], "harvest", 1050)

    def resumed(place: Path) -> Any:
        command(*harvest, "--out", str(place))
        return whole_store(place)

    begun = at / "begun"
    if (begun / "manifest.json").exists() or not list(begun.glob("train/**/*.safetensors")):
        raise Failed("the harvest to be resumed has ended, or has no shard of training rows yet")
    return [
        Target("store", at / "store", files(at / "store", "**/*"), whole_store),
        Target("unfinished harvest", begun, files(begun, "**/*"), resumed),
    ]


def whole_store(place: Path) -> Any:
    """Return everything a store gives."""
    import numpy as np

    from wsae.acts.store import SPLITS, Store

    store = Store(place)
    found: list[Any] = [store.manifest.to_dict(), repr(store.stats())]
    for split in SPLITS:
        rows = store.rows(split, np.arange(store.n_rows[split]))
        found += [{hook: x.numpy().tobytes() for hook, x in rows.items()}]
        found += [tensor.tolist() for tensor in store.places(split)]
        labels, table = store.labels(split), store.tokens(split)
        found += [None if labels is None else labels.tolist()]
        if table is not None:
            found += [table.ids.tolist(), table.lengths.tolist(), table.decode(range(320))]
    return found


def _runs(at: Path) -> list[Target]:
    train = ["train", str(at / "store"), *TRAIN]
    run, begun = at / "run", at / "begun-run"
    command(*train, "--out", str(run))
    _interrupted([*train, "--out", str(begun)], "train", 800)
    command("evaluate", str(run), "--draws", "20", "--n-latents", "4", "--splice-tokens", "200")
    command(*_interpret(at, run))
    _classes(at)
    newest = sorted((begun / "checkpoints").glob("step-*"))[-1].relative_to(begun)
    own = files(run, "*", "members/**/*")

    def resumed(place: Path) -> Any:
        command(*train, "--out", str(place), "--resume")
        return contents(place)

    def interpreted(place: Path) -> Any:
        (place / "interpretation" / "manifest.json").unlink(missing_ok=True)
        command(*_interpret(at, place))
        return contents(place / "interpretation")

    sae = next((run / "members").glob("*/*"))
    return [
        Target("unfinished run", begun, files(begun, "*", f"{newest}/*"), resumed),
        Target("run", run, own, _evaluated),
        Target("SAE", sae, files(sae, "*"), _sae),
        Target("run in a report", run, files(run, "*"), _reported),
        Target("evaluation in a report", run, files(run, "evaluation/*"), _reported),
        Target("evaluation compared", run, files(run, "evaluation/*"), _compared),
        Target("interpretation", run, files(run, "interpretation/*"), _reported),
        Target("parts", run, files(run, "interpretation/parts/*"), interpreted),
        Target("class scores", at / "run-array", files(at / "run-array", "classes/*"), _reported),
    ]


def _shared(at: Path) -> list[Target]:
    """What of a run goes elsewhere: other tools' folders, a folder for the hub, the browser's index."""
    import numpy as np

    import wsae
    from wsae.interop import load
    from wsae.interop.config import FORMATS
    from wsae.serve.build import ensure_index
    from wsae.serve.config import IndexConfig
    from wsae.serve.index import Index

    run, member = str(at / "run"), ("--member", "variance-a1")
    formats = [name for name in FORMATS if name != "circuit_tracer"]  # which takes transcoders
    rows = np.random.default_rng(0).normal(size=(2, 400, 8))
    both = wsae.fit({"a": rows[0], "b": rows[1]}, activation="batch_topk", k=2, d_sae=24)
    both.save(at / "both")
    for name in formats:
        of = [str(at / "both")] if name == "crosscoder" else [run, *member]
        command("export", *of, "--format", name, "--out", str(at / f"as-{name}"))
    command("push", run, "somebody/saes", *member, "--dry-run", "--out", str(at / "pushed"))

    def imported(place: Path) -> Any:
        found = load(place)
        return found.sae.cfg, {n: t.tolist() for n, t in found.sae.tensors().items()}, found.about

    def indexed(place: Path) -> Any:
        index = Index(ensure_index(place, None, IndexConfig(logits=0))[0])
        tables = ("meta", "member", "latent", "shown", "packed", "words_data")
        return [index.rows(f"SELECT * FROM {table}") for table in tables]

    browsed, pushed = at / "browsed", at / "pushed"
    shutil.copytree(run, browsed)
    indexed(browsed)
    read = ("manifest.json", "evaluation/*", "interpretation/*", "members/**/*")
    exports = [at / f"as-{name}" for name in formats]
    return [
        *(Target(f"export {place.name}", place, files(place, "*"), imported) for place in exports),
        Target("pushed", pushed, files(pushed, "*.safetensors", "[mcp]*.json"), imported),
        Target("browser's index", browsed, files(browsed, "browser.sqlite*"), indexed),
        Target("run in the browser", at / "run", files(at / "run", *read), indexed),
    ]


def _interpret(at: Path, run: Path) -> list[str]:
    return [
        *("interpret", str(run), "--score", "embedding", "--encoder", str(at / "encoder")),
        *("--n-latents", "6", "--width", "8", "--min-windows", "4", "--n-score", "6"),
        *("--n-hard", "2", "--draws", "20", "--controls", "shuffled"),
    ]


def _classes(at: Path) -> None:
    """Train on an array with labels and score its latents against them."""
    import numpy as np

    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 600)
    x = np.maximum(rng.random((600, 16)) - 0.5 + np.eye(16)[labels], 0)  # silent on some rows
    np.save(at / "x.npy", x.astype(np.float32))
    np.save(at / "y.npy", labels)
    run, own = str(at / "run-array"), ("--labels", str(at / "y.npy"))
    command("train", str(at / "x.npy"), "--out", run, *TRAIN, "--gamma", "consistency", *own)
    command("evaluate", run, "--draws", "20", "--n-latents", "4", *own)


def _evaluated(place: Path) -> Any:
    from wsae.evals.run import run_subject

    families = run_subject(place)
    weights = {
        f"{hook}|{name}|{key}": tensor.tolist()
        for hook, family in families.items()
        for name, sae in family.saes.items()
        for key, tensor in sae.tensors().items()
    }
    return weights, {hook: family.about for hook, family in families.items()}


def _sae(place: Path) -> Any:
    from wsae import SAE

    sae = SAE.load(place)
    return sae.cfg, {name: tensor.tolist() for name, tensor in sae.tensors().items()}


def _reported(place: Path) -> Any:
    out = place.parent / "report.html"
    command("report", str(place), "--out", str(out))
    return out.read_bytes()


def _compared(place: Path) -> Any:
    from wsae.evals.compare import compare

    return repr(compare([place])["hooks"])


def _toys(at: Path) -> list[Target]:
    from wsae.studies.sweep import read_rows, write_rows
    from wsae.toy.config import FeatureConfig, ToyModelConfig
    from wsae.toy.model import ToyModels, train_toy_models

    settings = {"levels": [0.5, 0.9], "seeds": 3}
    write_rows([{"level": 0.5, "score": i / 7} for i in range(20)], settings, at / "sweep")
    cfg = ToyModelConfig(features=FeatureConfig(n_features=8, sparsity=0.5), d_in=4, steps=5)
    train_toy_models([cfg]).save(at / "toy")

    def toys(place: Path) -> Any:
        found = ToyModels.load(place)
        return found.configs, found.W_p.tolist(), found.b.tolist(), found.loss.tolist()

    def rows(place: Path) -> Any:
        return read_rows(settings, place)

    return [
        Target("toy models", at / "toy", files(at / "toy", "*"), toys),
        Target("sweep", at / "sweep", files(at / "sweep", "*"), rows),
    ]


def _vision(at: Path) -> list[Target]:
    """A store of images, a pretrained encoder, one whose pretraining has begun, and a cached consistency."""
    import numpy as np
    from images_models import make_vision

    from wsae.acts.config import ImagesConfig
    from wsae.acts.images.sets import open_images
    from wsae.acts.source import open_source
    from wsae.core.artifact import read_manifest
    from wsae.studies.vision import top_consistency
    from wsae.vision.config import preset
    from wsae.vision.pretrain import load_pretrained, pretrain

    rng = np.random.default_rng(0)
    pixels, labels = rng.integers(0, 256, (40, 16, 16, 3), dtype=np.uint8), rng.integers(0, 3, 40)
    np.savez(at / "images.npz", images=pixels, labels=labels)
    images = ("--images", str(at / "images.npz"))
    model = make_vision(at / "vit", "vit")
    command("harvest", model, *images, "--hook", "layers.1", "--out", str(at / "images"))
    store = at / "images"
    source: Any = open_source(store)
    (at / "cache").mkdir()
    top_consistency(source, labels, 3, at / "cache" / "beta.json")
    small = {"widths": (8, 8, 8, 8), "batch_size": 10, "epochs": 1, "size": 16}
    cfg = preset("tiny", **small)
    pretrain(cfg, open_images(ImagesConfig(path=str(at / "images.npz"))), at / "backbone")

    def pretrained(place: Path) -> Any:
        found = load_pretrained(place)
        states = found.encoder.state_dict()
        return {name: tensor.tolist() for name, tensor in states.items()}, found.info

    def cached(place: Path) -> Any:
        return top_consistency(source, labels, 3, place / "beta.json")

    backbone, names = at / "backbone", read_manifest(at / "backbone", "pretrain").files
    return [
        Target("store of images", store, files(store, "**/*"), whole_store),
        Target("backbone", backbone, (*sorted(names), "manifest.json"), pretrained),
        Target("cached consistency", at / "cache", ("beta.json",), cached),
    ]


def _answers(at: Path) -> Target:
    """Answers of a language model: a damaged one is asked again, and named."""
    from wsae.core.errors import UserError
    from wsae.core.files import digest
    from wsae.evals.interpret.asking import Answer, AnswerToken, Cache

    asked = {"model": "a", "messages": [["user", "Text 1: the cat"]]}
    answer = Answer(
        "answered", "[1, 0]", tokens=(AnswerToken("[1", {"[1": -0.5}, 2),), values=(0.25, 0.75)
    )
    key = digest(asked)
    Cache(at / "answers").save(key, asked, answer)

    def loaded(place: Path) -> Any:
        found, where = Cache(place).load(key)
        if found is None:
            raise UserError(f"{where}: damaged, so it is asked again")
        return found

    return Target("answers", at / "answers", files(at / "answers", "**/*"), loaded)
