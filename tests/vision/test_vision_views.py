"""Views of images: decided by a seed, cut from whole files, and the same whoever makes them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from wsae.acts.config import ImagesConfig
from wsae.acts.images.sets import open_images
from wsae.core.errors import UserError
from wsae.vision.config import AugmentConfig, PretrainConfig, preset
from wsae.vision.data import Augment, crops_from, make_data
from wsae.vision.pretrain import Pretrainer, pretrain


def photos(root: Path, n: int = 30) -> Path:
    """Files of several sizes in two class folders: a smooth gradient from left (dark) to right, in two colours."""
    for i in range(n):
        width, height = 30 + 7 * (i % 3), 24 + 5 * (i % 4)
        ramp = np.linspace(0, 255, width).astype(np.uint8)[None].repeat(height, 0)
        zero = np.zeros_like(ramp)
        bands = (ramp, zero, zero) if i % 2 else (zero, ramp, ramp)
        place = root / ("red" if i % 2 else "cyan")
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.stack(bands, axis=-1)).save(place / f"{i:03d}.png")
    return root


def config(path: Path, workers: int = 0, **changes: object) -> PretrainConfig:
    images = {"path": str(path), "size": 12, "workers": workers}
    small = {"widths": (8, 8, 8, 8), "size": 12, "batch_size": 8, "epochs": 1, "log_every": 1}
    augment = AugmentConfig(crop=(0.2, 0.6), flip=0.5)
    return preset("tiny", images=images, **{**small, "augment": augment, **changes})


def test_views_depend_on_the_seed_alone_and_leave_other_randomness_alone() -> None:
    cfg = preset("cifar").augment
    images = torch.rand(6, 3, 40, 40, generator=torch.Generator().manual_seed(0))
    augment = Augment(cfg, 32, grey=False)
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    first = augment(images, 1)
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.rand(3)
    assert torch.equal(first, Augment(cfg, 32, grey=False)(images, 1))
    assert not torch.equal(first, augment(images, 2))
    assert first.shape == (6, 3, 32, 32)
    assert 0 <= float(first.min()) <= float(first.max()) <= 1


@pytest.mark.parametrize(
    ("changes", "grey", "expected"),
    [
        ({}, False, "same"),
        ({"jitter": (0, 0, 0.8, 0.2), "jitter_p": 1.0, "grey": 1.0}, True, "same"),
        ({"jitter": (0.8, 0, 0, 0), "jitter_p": 1.0}, True, "scaled"),
        ({"flip": 1.0}, False, "flipped"),
        ({"grey": 1.0}, False, "colourless"),
    ],
)
def test_each_setting_does_its_own_part(
    changes: dict[str, object], grey: bool, expected: str
) -> None:
    channels = 1 if grey else 3
    images = 0.5 * torch.rand(4, channels, 9, 9, generator=torch.Generator().manual_seed(0))
    augment = Augment(AugmentConfig.parse(changes), 9, grey, cropped=True)
    got = augment(images, 3)
    if expected == "same":
        torch.testing.assert_close(got, images)
    elif expected == "flipped":
        torch.testing.assert_close(got, images.flip(3))
    elif expected == "scaled":
        ratio = (got / images).flatten(1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio))
        assert len(set(ratio[:, 0].tolist())) == 4
    else:
        torch.testing.assert_close(got, got[:, :1].expand_as(got))
        assert not torch.equal(got, images)


def test_crops_of_files_keep_the_wanted_share_and_do_not_depend_on_workers(tmp_path: Path) -> None:
    photos(tmp_path)
    found = {}
    for workers in (0, 2):
        cfg = config(tmp_path, workers)
        data = make_data(cfg, open_images(cfg.images))
        assert not data.in_memory
        found[workers] = list(crops_from(cfg, data, slice(0, 8), 0))
    assert len(found[0]) == len(found[2]) == len(data.train) // 8
    for a, b in zip(found[0], found[2], strict=True):
        assert np.array_equal(a.numbers, b.numbers)
        assert torch.equal(a.crops, b.crops)
        assert a.crops.shape == (16, 3, 12, 12)
    # the ramp's rise over a crop is the share of the width that it keeps; area 0.2-0.6, ratio 3/4-4/3
    crops = torch.cat([a.crops for a in found[0]]).float().amax(1)
    share = (crops[:, :, -1] - crops[:, :, 0]).mean(1) / 255
    assert float(share.min()) > 0.2
    assert float(share.max()) < 1.0
    assert float(share.std()) > 0.05
    views = crops.view(-1, 2, 8, 12, 12)
    assert not torch.equal(views[:, 0], views[:, 1])
    steps = list(crops_from(cfg, data, slice(4, 8), 1))
    assert np.array_equal(
        steps[0].numbers, found[0][1].numbers[4:]
    )  # a process's own part, from a later step
    assert torch.equal(steps[0].crops[:4], found[0][1].crops[4:8])


def test_a_run_on_files_learns_and_names_the_unreadable(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 40)
    broken = sorted((tmp_path / "photos" / "red").iterdir())[3]
    broken.write_bytes(broken.read_bytes()[:60])
    cfg = config(tmp_path / "photos", epochs=2)
    result = pretrain(cfg, open_images(cfg.images), tmp_path / "run")
    assert result.info["unreadable"]["count"] >= 1
    assert broken.name in result.info["unreadable"]["first"][0]
    assert result.info["probes"]["linear"]["accuracy"] > 0.8
    strict = config(tmp_path / "photos").model_copy(
        update={"images": ImagesConfig(path=str(tmp_path / "photos"), size=12, on_error="raise")}
    )
    with pytest.raises(UserError, match=broken.name):
        pretrain(strict, open_images(strict.images), tmp_path / "strict")
    assert not (tmp_path / "strict").exists()


def test_a_run_ends_though_no_held_out_image_can_be_read(tmp_path: Path) -> None:
    photos(tmp_path / "photos", 40)
    cfg = config(tmp_path / "photos", epochs=1)
    images = open_images(cfg.images)
    for number in make_data(cfg, images).heldout:
        images._path(int(number)).write_bytes(b"lost")
    result = pretrain(cfg, images, tmp_path / "run")
    assert result.info["probes"] is None
    assert "NaN" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_both_views_of_a_batch_reach_the_encoder_normalised(tmp_path: Path) -> None:
    cfg = config(photos(tmp_path))
    data = make_data(cfg, open_images(cfg.images))
    job = Pretrainer(cfg, data)
    index, views = next(iter(job.batches(0)))
    assert views.shape == (16, 3, 12, 12)
    crops = next(iter(crops_from(cfg, data, slice(0, 8), 0))).crops.float() / 255
    flat = views * torch.tensor(data.std).view(3, 1, 1) + torch.tensor(data.mean).view(3, 1, 1)
    either = [(flat - c).abs().amax((1, 2, 3)) < 1e-5 for c in (crops, crops.flip(3))]
    assert bool((either[0] | either[1]).all())  # as cut, or flipped
    assert bool(either[0].any())
    assert bool(either[1].any())
    labels = job.labels(index)
    assert labels is not None
    reds = flat[:8, 0].amax((1, 2)) > 0
    assert torch.equal(labels == data.images.names.index("red"), reds)
