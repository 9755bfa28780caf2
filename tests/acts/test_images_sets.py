"""Image sets: every layout gives the pixels and classes that were written, and bad input ends in one line."""

import gzip
import io
import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsae.acts.config import ImagesConfig
from wsae.acts.images import sets
from wsae.acts.images.pixels import Failures, ImageError, batches
from wsae.acts.images.sets import open_images
from wsae.core.errors import UserError

RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (12, 9, 7, 3), dtype=np.uint8)  # [n, height, width, channels]


def opened(path, **values):
    return open_images(ImagesConfig(path=str(path), **values))


def as_array(image: torch.Tensor) -> np.ndarray:
    return image.permute(1, 2, 0).numpy()


def write_folder(root, n=12):
    """Class folders "a" (the even numbers) and "b", one image of each two levels deep."""
    for i, pixels in enumerate(PIXELS[:n]):
        place = root / "ab"[i % 2] / ("deep" if i < 2 else "")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{i:02d}.png")
    return root


def png(pixels: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG")
    return out.getvalue()


# ---- layouts


def test_class_folders_are_sorted_and_labelled_by_folder(tmp_path):
    root = write_folder(tmp_path)
    (root / "a" / ".hidden.png").write_bytes(b"not an image")
    (root / "a" / "notes.txt").write_text("not an image either")
    images = opened(root)
    assert images.names == ("a", "b")
    assert images.labels is not None
    assert images.labels.tolist() == [0] * 6 + [1] * 6
    wanted = [2, 4, 6, 8, 10, 0, 3, 5, 7, 9, 11, 1]  # "04.png" comes before "deep/00.png"
    for index, number in enumerate(wanted):
        assert np.array_equal(as_array(images.image(index)), PIXELS[number])


def test_a_folder_without_classes_has_no_labels(tmp_path):
    for i, pixels in enumerate(PIXELS):
        Image.fromarray(pixels).save(tmp_path / f"{i:02d}.bmp")
    images = opened(tmp_path)
    assert (images.labels, images.names, len(images)) == (None, (), 12)
    assert np.array_equal(as_array(images.image(7)), PIXELS[7])


def test_train_and_val_are_splits_also_in_several_parts(tmp_path):
    for part, number in (("train.X1", 0), ("train.X2", 1), ("val.X", 2)):
        place = tmp_path / part / f"n0{number % 2}"
        place.mkdir(parents=True)
        Image.fromarray(PIXELS[number]).save(place / "x.png")
    train, val = opened(tmp_path), opened(tmp_path, split="val")
    assert [np.array_equal(as_array(train.image(i)), PIXELS[i]) for i in range(2)] == [True, True]
    assert (train.names, val.names, len(val)) == (("n00", "n01"), ("n00",), 1)
    with pytest.raises(UserError, match="no split 'test'; it has train, val"):
        opened(tmp_path, split="test")


@pytest.mark.parametrize("beside", ["val/a", "Testing/a", "__MACOSX", "docs"])
@pytest.mark.parametrize("name", ["train", "Train", "training"])
def test_splits_are_no_classes_however_they_are_written(tmp_path, name, beside):
    for place in (f"{name}/a", f"{name}/b", beside):
        (tmp_path / place).mkdir(parents=True)
        if place[-2] == "/":
            Image.fromarray(PIXELS[0]).save(tmp_path / place / "x.png")
    (tmp_path / beside / "._x.png").write_bytes(b"")
    assert opened(tmp_path).names == ("a", "b")


@pytest.mark.parametrize("target", ["gone.png", "b.png"])
def test_a_link_that_leads_nowhere_is_named(tmp_path, target):
    Image.fromarray(PIXELS[0]).save(tmp_path / "a.png")
    (tmp_path / "b.png").symlink_to(target)
    with pytest.raises(UserError, match="b.png: a link that leads nowhere"):
        opened(tmp_path)


@pytest.mark.parametrize("turned", [False, True])
def test_of_a_line_of_pixels_the_middle_is_read_in_little_memory(tmp_path, monkeypatch, turned):
    """Resized whole, its shorter side to 8 pixels, it would be of 8 x 400,000."""
    made, resize = [], Image.Image.resize
    monkeypatch.setattr(
        Image.Image, "resize", lambda self, *how: made.append(how[0]) or resize(self, *how)
    )
    line = np.full((1, 50_000, 3), 200, np.uint8)
    line[:, 24_000:26_000] = 50
    line[:, 25_000:] += 5
    picture = Image.fromarray(line.swapaxes(0, 1) if turned else line)
    picture.save(tmp_path / "line.png")
    square = opened(tmp_path, size=8).square(0)
    assert max(made[0]) <= 16 * 8
    square = square.transpose(1, 2) if turned else square
    assert int(square[0, 0, 0]) in (49, 50)
    assert int(square[0, 0, -1]) in (55, 56)


def test_classes_may_be_named_like_splits(tmp_path):
    for name in ("train", "plane"):
        (tmp_path / name).mkdir()
        Image.fromarray(PIXELS[0]).save(tmp_path / name / "x.png")
    assert opened(tmp_path).names == ("plane", "train")


@pytest.mark.parametrize("first", [0, 1])
def test_a_file_without_the_column_of_labels_is_named(tmp_path, first):
    (tmp_path / "t").mkdir()
    for number in (0, 1):
        columns = {"image": [b""]} | ({"label": [0]} if number == first else {})
        pq.write_table(pa.table(columns), tmp_path / "t" / f"{number}.parquet")
    with pytest.raises(UserError, match=f"{1 - first}.parquet: no column 'label'"):
        opened(tmp_path / "t")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("channels", [0, 1, 3, 4])
def test_npz_gives_rgb_whatever_its_channels(tmp_path, save, channels):
    raw = RNG.integers(0, 256, (5, 6, 4) + ((channels,) if channels else ()), dtype=np.uint8)
    save(tmp_path / "x.npz", images=raw, labels=np.arange(5) % 3, names=["r", "s", "t"])
    images = opened(tmp_path / "x.npz")
    assert images.names == ("r", "s", "t")
    mode = {0: "L", 1: "L", 3: "RGB", 4: "RGBA"}[channels]
    for index in range(5):
        plain = Image.fromarray(raw[index].reshape(6, 4, -1).squeeze(), mode)
        if channels == 4:
            white = Image.new("RGBA", plain.size, "white")
            plain = Image.alpha_composite(white, plain)
        wanted = np.asarray(plain.convert("RGB")).astype(int)
        assert np.abs(as_array(images.image(index)).astype(int) - wanted).max() <= (channels == 4)


def test_an_uncompressed_npz_is_mapped_not_read(tmp_path):
    np.savez(tmp_path / "x.npz", labels=np.arange(12), images=PIXELS)
    images = opened(tmp_path / "x.npz")
    base = images._images
    while not isinstance(base, np.memmap):
        assert base.base is not None
        base = base.base
    assert np.array_equal(as_array(images.image(11)), PIXELS[11])


@pytest.mark.parametrize("packed", [True, False])
def test_idx_files_as_mnist_ships_them(tmp_path, packed):
    def write(name, data):
        shape = np.array(data.shape, dtype=">u4").tobytes()
        raw = bytes([0, 0, 8, data.ndim]) + shape + data.tobytes()
        path = tmp_path / (name + ".gz" * packed)
        path.write_bytes(gzip.compress(raw) if packed else raw)

    grey, labels = PIXELS[..., 0], (np.arange(12) % 10).astype(np.uint8)
    for prefix, part in (("train", slice(0, 8)), ("t10k", slice(8, 12))):
        write(f"{prefix}-images-idx3-ubyte", grey[part])
        write(f"{prefix}-labels-idx1-ubyte", labels[part])
    test = opened(tmp_path, split="test")
    assert test.labels is not None
    assert test.labels.tolist() == [8, 9, 0, 1]
    assert np.array_equal(as_array(test.image(0)), np.repeat(grey[8][..., None], 3, 2))
    assert len(opened(tmp_path)) == 8
    with pytest.raises(UserError, match="no split 'val'; it has train, test"):
        opened(tmp_path, split="val")


def test_the_built_in_digits():
    images = opened("digits")
    assert (len(images), images.image(3).shape, len(images.names)) == (1797, (3, 8, 8), 10)
    assert opened("digits", size=16).square(3).shape == (3, 16, 16)


@pytest.mark.parametrize(
    "limit", [1 << 40, 1600, 0]
)  # bytes: one group of three fits 1600, one of five does not
def test_parquet_in_any_order_whatever_fits_in_memory(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(sets, "CACHE_BYTES", limit)
    monkeypatch.setattr(sets, "_ROWS", 2)
    cells = [{"bytes": png(pixels), "path": f"{i}.png"} for i, pixels in enumerate(PIXELS)]
    (tmp_path / "t").mkdir()
    for number, part in enumerate((slice(0, 7), slice(7, 12))):
        table = pa.table({"image": cells[part], "label": list("abcdefghijkl"[part])})
        path = tmp_path / "t" / f"train-{number:05d}.parquet"
        pq.write_table(table, path, row_group_size=3 + 4 * number)
    images = opened(tmp_path / "t")
    assert images.labels is not None
    assert (images.labels.tolist(), images.names) == (list(range(12)), tuple("abcdefghijkl"))
    for index in [*range(12), *RNG.permutation(12).tolist()]:
        assert np.array_equal(as_array(images.image(index)), PIXELS[index])


def hub_table(monkeypatch, labels, names):
    import datasets

    feature = datasets.ClassLabel(names=names)
    features = datasets.Features({"img": datasets.Image(), "fine": feature})
    rows = [Image.fromarray(pixels) for pixels in PIXELS]
    table = datasets.Dataset.from_dict({"img": rows, "fine": labels}, features=features)
    asked = []
    monkeypatch.setattr("wsae.core.hub.hub_reachable", lambda: True)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (asked.append((a, k)), table)[1])
    return asked


def test_a_hub_dataset_by_name(monkeypatch):
    asked = hub_table(monkeypatch, [0, 1, 2] * 4, ["x", "y", "z"])
    images = opened("someone/pictures", image_field="img", label_field="fine", subset="s")
    assert asked == [(("someone/pictures", "s"), {"split": "train"})]
    assert images.labels is not None
    assert (images.labels.tolist(), images.names) == ([0, 1, 2] * 4, ("x", "y", "z"))
    assert np.array_equal(as_array(images.image(5)), PIXELS[5])
    with pytest.raises(UserError, match=r"no column 'image' \(nearest: img\)|no column 'image'"):
        opened("someone/pictures")
    hub_table(monkeypatch, [-1] * 12, ["x", "y", "z"])
    assert opened("cifar", image_field="img", label_field="fine").labels is None


# ---- squares and batches


@given(
    height=st.integers(1, 40),
    width=st.integers(1, 40),
    size=st.integers(1, 12),
    more=st.integers(0, 5),
)
@settings(max_examples=40, deadline=None)
def test_squares_are_the_middle_of_the_resized_image(height, width, size, more):
    from wsae.acts.images.pixels import middle_square

    ramp = np.broadcast_to(np.arange(width, dtype=np.uint8)[None, :, None] * 6, (height, width, 3))
    cfg = ImagesConfig(size=size, resize=size + more, resample="nearest")
    square = np.asarray(middle_square(Image.fromarray(np.ascontiguousarray(ramp)), cfg, size))
    assert square.shape == (size, size, 3)
    scale = (size + more) / min(height, width)
    centre = width / 2 + (np.arange(size) + 0.5 - size / 2) / scale - 0.5
    wanted = 6 * centre.clip(0, width - 1)
    assert np.abs(square[0, :, 0] - wanted).max() <= 6 * (1 + 1.5 / scale)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_keep_the_order_and_leave_out_what_cannot_be_read(tmp_path, workers):
    root = write_folder(tmp_path)
    broken = sorted(root.rglob("*.png"))[:7]
    for path in broken[1:]:
        path.write_bytes(path.read_bytes()[:40])
    images, order = opened(root, size=7), RNG.permutation(12)
    failures = Failures("skip")
    kept, found = [], []
    for index, squares in batches(images, order, 5, workers, failures):
        assert squares.dtype == torch.uint8
        assert len(index) == len(squares)
        kept += index.tolist()
        found += list(squares) if len(squares) else []
    bad = {i for i in range(12) if _unreadable(images, i)}
    assert kept == [i for i in order.tolist() if i not in bad]
    assert all(torch.equal(images.square(i), x) for i, x in zip(kept, found, strict=True))
    assert (failures.count, len(failures.messages)) == (6, 5)
    assert re.search(r"6 unreadable: .*\.png: .*; .* and 1 more$", failures.summary())
    with pytest.raises(ImageError, match=r"\.png: "):
        list(batches(images, order, 5, workers))


def _unreadable(images, index) -> bool:
    try:
        images.image(index)
    except ImageError as error:
        return error.index == index
    return False
