"""Every reader of a file that a user or a stranger may bring: how to call it, and sound files to begin from.

`READERS` is what the fuzzers (`fuzz.py`, tests/reliability/test_fuzz.py) feed; a new reader is one entry.
"""

import contextlib
import functools
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

MOST_ROWS = 2_000
"""Of what a reader yields, no more is asked for: a fuzzed file may be endless and well-formed."""


class Reader(NamedTuple):
    """A reader: the name its file has, the call, and sound contents."""

    name: str
    call: Callable[[Path], Any]
    seeds: Callable[[], list[bytes]]


def _texts(path: Path) -> int:
    from wsae.acts.config import TextConfig
    from wsae.acts.text import documents

    return sum(1 for _ in islice(documents(TextConfig(path=str(path))), MOST_ROWS))


def _array(path: Path) -> Any:
    from wsae.acts.source import open_source

    source = open_source(str(path))
    return source.hooks, next(iter(source.heldout(4)), None)


def _vector(path: Path) -> Any:
    from wsae.cli.live import read_vector

    return read_vector("--labels", path, "iuf", "one number per row").sum()


def _tensors(path: Path) -> Any:
    from wsae.core.tensors import load_tensors

    return load_tensors(path)


def _images(path: Path) -> Any:
    from wsae.acts.config import ImagesConfig
    from wsae.acts.images.pixels import ImageError
    from wsae.acts.images.sets import open_images

    found = open_images(ImagesConfig(path=str(path)))
    for index in range(min(len(found), 3)):
        with contextlib.suppress(ImageError):  # counted and left out by a harvest
            found.image(index)
    return len(found), found.labels


def _image(path: Path) -> Any:
    from wsae.acts.images.pixels import decoded

    return decoded(path, str(path), 0).size


def _folder(path: Path) -> Any:
    return _images(path.parent)


def _config(path: Path) -> Any:
    from wsae.core.config import read_config

    return read_config(path).data


def _train_config(path: Path) -> Any:
    from wsae.train.config import TrainConfig

    return TrainConfig.load(path)


def _sealed(path: Path) -> Any:
    from wsae.core.files import read_sealed

    return read_sealed(path)


def _metrics(path: Path) -> Any:
    from wsae.train.loggers import read_json_lines

    return read_json_lines(path)


def _manifest(path: Path) -> Any:
    """Read a manifest as every kind of artifact reads it."""
    from wsae.acts.store import Store
    from wsae.core.artifact import read_manifest
    from wsae.evals.compare import read_evaluation
    from wsae.sae import SAE
    from wsae.toy.model import ToyModels
    from wsae.train.run import load_run
    from wsae.vision.pretrain import load_pretrained

    kind = _kind(path)
    (path.parent.parent / "config.json").write_text("{}")  # the folder of an evaluation is in a run
    readers: dict[str, Callable[[Path], Any]] = {
        "store": Store,
        "run": load_run,
        "sae": SAE.load,
        "toy": ToyModels.load,
        "pretrain": load_pretrained,
        "evaluation": lambda place: read_evaluation(place.parent),
    }
    return readers.get(kind, lambda place: read_manifest(place, kind))(path.parent)


def _kind(path: Path) -> str:
    try:
        return str(json.loads(path.read_bytes()).get("kind"))
    except (ValueError, AttributeError, RecursionError):
        return "run"


def _foreign(name: str, format: str) -> Reader:
    """Return the reader of one file of another tool's folder, the others of it whole."""

    def call(path: Path) -> Any:
        from wsae.interop import load

        for other, data in _shared(format).items():
            if other != name:
                (path.parent / other).write_bytes(data)
        found = load(path.parent, format)
        return found.sae.tensors(), found.about

    return Reader(name, call, lambda: [_shared(format)[name]])


@functools.cache
def _shared(format: str) -> dict[str, bytes]:
    """Return the files of an SAE as another tool has them: without ours beside, which hold checksums."""
    from wsae import SAE
    from wsae.interop import save
    from wsae.interop.saes import KINDS
    from wsae.sae.config import SAEConfig

    cfg = SAEConfig.parse({"d_in": 4, "d_sae": 6, "activation": {"kind": "topk", "k": 2}})
    with tempfile.TemporaryDirectory() as folder:
        save(SAE(cfg, seed=0), folder, format)
        names = next(kind.files for kind in KINDS.values() if kind.name == format)
        return {name: (Path(folder) / name).read_bytes() for name in names}


def _npy(*arrays: Any) -> list[bytes]:
    found = []
    for array in arrays:
        file = io.BytesIO()
        np.save(file, array, allow_pickle=False)
        found.append(file.getvalue())
    return found


def _npz() -> list[bytes]:
    pixels = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)
    found = []
    for save in (np.savez, np.savez_compressed):
        file = io.BytesIO()
        save(file, images=pixels, labels=np.arange(3), names=np.array(["a", "b", "c"]))
        found.append(file.getvalue())
    return found


def _idx() -> list[bytes]:
    return [bytes([0, 0, 8, 3]) + np.array([2, 3, 3], ">u4").tobytes() + bytes(18)]


def _safetensors() -> list[bytes]:
    from safetensors.numpy import save

    return [save({"x": np.ones((6, 4), np.float32)}), save({"x": np.ones((6, 4), np.float16)})]


def _pictures() -> list[bytes]:
    from PIL import Image

    image, found = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3)), []
    for kind in ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM"):
        file = io.BytesIO()
        image.save(file, kind)
        found.append(file.getvalue())
    return found


def _parquet(columns: dict[str, list[Any]]) -> list[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    found = []
    for kind in ("none", "snappy"):
        file = io.BytesIO()
        pq.write_table(pa.table(columns), file, compression=kind)
        found.append(file.getvalue())
    return found


def _text_table() -> list[bytes]:
    return _parquet({"text": ["the cat", "sat", "on the mat"]})


def _image_table() -> list[bytes]:
    cells = [{"bytes": data, "path": "x.png"} for data in _pictures()[:3]]
    return _parquet({"image": cells, "label": [0, 1, 0]})


def _lines() -> list[bytes]:
    return [b'{"text": "the cat"}\n{"text": "sat \\u00e9"}\n', b'{"text": ""}']


def _zipped(contents: Iterable[bytes]) -> list[bytes]:
    return [gzip.compress(content) for content in contents]


def _settings() -> list[bytes]:
    return [b"alpha: [0.5, 1.0]\nk: 4\nnested:\n  deep: 'word'\n  off: no\n", b"a: 1e-3\n"]


def _objects() -> list[bytes]:
    from wsae.core.files import seal

    train = {"members": [{"d_sae": 8, "label": "plain"}], "tokens": 100}
    return [json.dumps(value).encode() for value in (train, seal(train), {"a": [1, {"b": None}]})]


def _manifests() -> list[bytes]:
    """Sound manifests of empty artifacts: a fuzzer that knows JSON changes them and seals them again."""
    from wsae.core.files import seal

    about: dict[str, dict[str, Any]] = {
        "store": {"hooks": {"h": 4}, "rows": {"train": 0, "heldout": 0}, "shard_rows": {"train": [], "heldout": []}},
        "run": {"members": {"h": ["plain"]}, "d_in": {"h": 4}},
        "sae": {},
        "toy": {"loss": [0.1]},
        "pretrain": {"steps": 3},
        "evaluation": {},
    }  # fmt: skip
    common = {"schema_version": 1, "wsae_version": "1", "inputs": {}, "files": {}}
    config = {"models": [{"d_in": 4}], "d_in": 4, "d_sae": 8}
    return [
        json.dumps(seal({**common, "kind": kind, "config": config, "info": info})).encode()
        for kind, info in about.items()
    ]


READERS = (
    Reader("x.txt", _texts, lambda: [b"one\n\ntwo\n" * 3]),
    Reader("x.jsonl", _texts, _lines),
    Reader("x.jsonl.gz", _texts, lambda: _zipped(_lines())),
    Reader("x.parquet", _texts, _text_table),
    Reader("x.npy", _array, lambda: _npy(np.ones((6, 4), np.float32), np.ones((4, 2), ">i2").T)),
    Reader("labels.npy", _vector, lambda: _npy(np.arange(5), np.ones(3))),
    Reader("x.safetensors", _array, _safetensors),
    Reader("all.safetensors", _tensors, _safetensors),
    Reader("images.npz", _images, _npz),
    Reader("images.parquet", _images, _image_table),
    Reader("train-images-idx3-ubyte", _folder, _idx),
    Reader("train-images-idx3-ubyte.gz", _folder, lambda: _zipped(_idx())),
    Reader("x.png", _image, _pictures),
    Reader("x.yaml", _config, _settings),
    Reader("x.json", _config, _objects),
    Reader("train.json", _train_config, _objects),
    Reader("sealed.json", _sealed, _objects),
    Reader("metrics.jsonl", _metrics, lambda: [b'{"hook": "h", "member": "m", "step": 1}\n' * 2]),
    Reader("manifest.json", _manifest, _manifests),
    _foreign("cfg.json", "saelens"),
    _foreign("sae_weights.safetensors", "saelens"),
    _foreign("sae.safetensors", "sparsify"),
    _foreign("config.json", "dictionary_learning"),
    _foreign("ae.pt", "dictionary_learning"),
)
