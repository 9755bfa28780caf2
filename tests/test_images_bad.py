"""Images that are not there or do not fit together: one line that names the place and the mend."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from wsae.acts.images.config import ImagesConfig
from wsae.acts.images.sets import open_images
from wsae.core.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 9, 7, 3), dtype=np.uint8)


def _npz(**arrays):
    def write(root):
        np.savez(root / "x.npz", **arrays)
        return root / "x.npz"

    return write


def _table(columns):
    def write(root):
        pq.write_table(pa.table(columns), root / "x.parquet")
        return root / "x.parquet"

    return write


def _mixed(root):
    (root / "a").mkdir()
    for path in (root / "a" / "x.png", root / "stray.png"):
        Image.fromarray(PIXELS[0]).save(path)
    return root


def _bytes(name, data):
    def write(root):
        (root / name).write_bytes(data)
        return root / name

    return write


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: root / "nowhere", "no such file or directory"),
        (lambda root: root, "no image file in it"),
        (_mixed, "stray.png lies beside class folders"),
        (_npz(pictures=PIXELS), "no array named images"),
        (_npz(images=PIXELS / 255), "images are float64; give uint8"),
        (_npz(images=PIXELS[..., :2]), "of shape"),
        (_npz(images=PIXELS[:0]), "there are none in it"),
        (_npz(images=PIXELS, labels=np.arange(5)), "for 12 images"),
        (_npz(images=PIXELS, labels=np.arange(12) / 2), "not whole numbers"),
        (_npz(images=PIXELS, labels=np.arange(12) - 3), "image 0 has label -3"),
        (_npz(images=PIXELS, labels=np.arange(12), names=["a"]), "labels up to 11 but 1 names"),
        (_npz(images=np.array([None, {}])), r"not a readable .npy array \(Python objects"),
        (_bytes("x.npz", b"PK\x03\x04nonsense"), "not a readable .npz"),
        (_bytes("x.tar.gz", b""), "an archive; unpack it"),
        (_bytes("x.png", b""), "one image; name a folder"),
        (_bytes("x.csv", b""), "unknown kind of file"),
        (_bytes("x.parquet", b"PAR1"), "not a readable parquet file"),
        (
            _table({"picture": [b""], "label": [0]}),
            r"no column 'image' \(nearest: picture\)|no column 'image'",
        ),
        (_table({"image": [3], "label": [0]}), "holds int64"),
        (_table({"image": [b"x"], "label": [0.5]}), "not whole numbers"),
    ],
)
def test_bad_input_is_one_line(tmp_path, write, message):
    with pytest.raises(UserError, match=message) as caught:
        open_images(ImagesConfig(path=str(write(tmp_path))))
    assert "\n" not in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def _bytes_in(name, data):
    def write(root):
        _bytes(name, data)(root)
        return root

    return write


def _idx(root, shape=(2, 3, 3), more=b"", name="train-images-idx3-ubyte"):
    header = bytes([0, 0, 8, len(shape)]) + np.array(shape, dtype=">u4").tobytes()
    (root / name).write_bytes(header + bytes(int(np.prod(shape))) + more)
    return root


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda root: _idx(root, more=b"x"), r"19 bytes where its header says \(2, 3, 3\)"),
        (lambda root: _idx(root, (2, 3)), "not an IDX file of bytes with 3 axes"),
        (lambda root: _idx(_idx(root), (5,), name="train-labels-idx1-ubyte"), "for 2 images"),
        (_bytes_in("train-images-idx3-ubyte.gz", b"\x1f\x8bno"), "not a readable IDX file"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, write, message):
    with pytest.raises(UserError, match=message) as caught:
        open_images(ImagesConfig(path=str(write(tmp_path))))
    assert str(tmp_path) in str(caught.value)


def test_no_network_and_no_such_dataset_are_told_apart_from_a_file(monkeypatch):
    monkeypatch.setattr("wsae.acts.images.tables.hub_reachable", lambda: False)
    with pytest.raises(UserError, match="no such file here, and as a hub dataset .* no network"):
        open_images(ImagesConfig(path="someone/pictures"))
