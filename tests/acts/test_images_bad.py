"""Images that are not there or do not fit together: one line that names the place and the mend."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import SwinConfig, SwinModel, ViTMAEConfig, ViTMAEModel

from wsae.acts.config import ImagesConfig
from wsae.acts.hookpoints import probe
from wsae.acts.images.model import VisionModel
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
    monkeypatch.setattr("wsae.core.hub.hub_reachable", lambda: False)
    with pytest.raises(UserError, match="no such file here, and as a hub dataset .* no network"):
        open_images(ImagesConfig(path="someone/pictures"))


def vision(model: torch.nn.Module) -> VisionModel:
    half = (0.5, 0.5, 0.5)
    return VisionModel(model.eval(), "m", "digest", 32, half, half, 32, "bicubic")


def test_a_random_choice_of_patches_is_refused():
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sides = {"intermediate_size": 32, "image_size": 32, "patch_size": 8}
    found = vision(ViTMAEModel(ViTMAEConfig(**small, **sides)))  # pyright: ignore
    for hook in ("embeddings", "layers.1"):
        with pytest.raises(UserError, match="a random choice of positions"):
            probe(found.model, [hook], found.modality(32, 32))


def test_windows_are_no_images_and_a_mean_over_positions_is_one_row():
    sides = {"image_size": 32, "patch_size": 4, "window_size": 4}
    found = vision(SwinModel(SwinConfig(**sides, embed_dim=8, depths=[1, 1], num_heads=[2, 2])))  # pyright: ignore
    with pytest.raises(UserError, match=r"its output is \(12, 16, 8\), not \[batch, width\]"):
        probe(found.model, ["layers.0.blocks.0.attention"], found.modality(32, 32))
    (pooled,) = probe(found.model, ["pooler"], found.modality(32, 32)).hooks
    assert (pooled.d_in, pooled.positions) == (16, 1)
