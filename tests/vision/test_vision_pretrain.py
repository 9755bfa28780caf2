"""A pretraining run: it learns, resumes bit for bit, and what it leaves can be read."""

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel

from wsae.acts.config import ImagesConfig
from wsae.acts.images.harvest import heldout_images
from wsae.acts.images.model import EncoderConfig, ImageEncoder, Projector, load_encoder
from wsae.acts.images.sets import ArrayImages, open_images
from wsae.core.artifact import read_manifest
from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.train.loggers import read_json_lines
from wsae.train.loop import Stopped
from wsae.vision.config import PretrainConfig, preset
from wsae.vision.data import make_data
from wsae.vision.pretrain import Pretrainer, load_pretrained, pretrain


def stripes(n: int = 150, size: int = 8, channels: int = 0, seed: int = 0) -> ArrayImages:
    """Images of three classes: horizontal, vertical and no stripes, each over noise."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    x = rng.integers(0, 90, (n, size, size))
    phase = rng.integers(0, 2, n)
    for i, label in enumerate(labels):
        if label == 0:
            x[i, phase[i] :: 2] += 160
        if label == 1:
            x[i, :, phase[i] :: 2] += 160
    x = x.astype(np.uint8)
    if channels:
        x = np.stack([x, 255 - x, x // 2], axis=-1)
    return ArrayImages(x, labels.astype(np.int64), ("rows", "columns", "none"), f"stripes {seed}")


def config(**changes: object) -> PretrainConfig:
    small = {"widths": (8, 8, 16, 16), "batch_size": 20, "epochs": 2, "log_every": 3}
    return preset("tiny", **{**small, **changes})


def files_of(run: Path) -> dict[str, bytes]:
    names = [p for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "speed.jsonl")]
    return {str(p.relative_to(run)): p.read_bytes() for p in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pretrain(config(), stripes(), tmp_path_factory.mktemp("whole") / "run").path


def test_pretraining_separates_the_classes_it_was_never_told(tmp_path: Path) -> None:
    cfg = config(epochs=12, batch_size=60, heldout_fraction=0.3)
    result = pretrain(cfg, stripes(600), tmp_path / "run")
    rows = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    chance = np.log(2 * 60 - 1)
    assert rows[0]["loss"] == pytest.approx(chance, abs=0.5)
    assert rows[-1]["loss"] < chance - 0.4
    probes = result.info["probes"]
    assert probes["linear"]["accuracy"] > 0.85
    assert probes["knn"]["accuracy"] > 0.75
    assert rows[-1]["heldout_accuracy"] > 0.6
    heldout = int(heldout_images(600, 0.3, cfg.seed).sum())
    assert probes["linear"]["test"] == result.info["images"]["heldout"] == heldout


@pytest.mark.parametrize("stop", [1, 6, 8])
def test_a_stopped_and_resumed_run_ends_bit_for_bit_the_same(
    tmp_path: Path, whole: Path, stop: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Pretrainer.step

    def halting(self, views, labels, number):  # noqa: ANN001, ANN202
        if number == stop - 1:
            os.kill(os.getpid(), signal.SIGINT)
        step(self, views, labels, number)

    cfg = config()
    with monkeypatch.context() as patch:
        patch.setattr(Pretrainer, "step", halting)
        with pytest.raises(Stopped, match=f"step {stop} of 10"):
            pretrain(cfg, stripes(), tmp_path / "cut")
    with pytest.raises(UserError, match="add --resume"):
        pretrain(cfg, stripes(), tmp_path / "cut")
    pretrain(cfg, stripes(), tmp_path / "cut", resume=True)
    assert files_of(tmp_path / "cut") == files_of(whole)


def test_a_finished_run_is_returned_and_another_config_or_set_refused(whole: Path) -> None:
    before = files_of(whole)
    again = pretrain(config(), stripes(), whole)
    assert again.info == read_manifest(whole, "pretrain").info
    moved = config(images=ImagesConfig(path="elsewhere", workers=2))
    assert pretrain(moved, stripes(), whole).path == whole  # images may move
    assert files_of(whole) == before
    with pytest.raises(UserError, match="pretrain.seed is 0 there, 1 here"):
        pretrain(config(seed=1), stripes(), whole, resume=True)
    with pytest.raises(UserError, match="data is"):
        pretrain(config(), stripes(seed=4), whole)


def test_the_saved_encoder_gives_the_embeddings_of_the_run(whole: Path) -> None:
    encoder = load_encoder(whole)
    images = torch.stack([stripes().image(i) for i in range(9)])
    h, z = encoder(encoder.prepare(images))
    assert (h.shape, z.shape) == ((9, 16), (9, 32))
    assert bool((z >= 0).all())
    assert bool((z == 0).any())
    again = load_pretrained(whole).encoder(encoder.prepare(images[:, :1].float() / 255))
    torch.testing.assert_close(again, (h, z))  # one channel, floats: the same images
    rows = [torch.from_numpy(stripes()._images)[~heldout_images(150, 0.2, 0)].double() / 255]
    assert encoder.cfg.mean[0] == pytest.approx(float(rows[0].mean()), rel=1e-9)
    assert encoder.cfg.std[2] == pytest.approx(float(rows[0].std(correction=0)), rel=1e-9)
    assert encoder.cfg.grey


def test_the_optimiser_of_a_restored_run_is_that_of_the_run() -> None:
    cfg = config()
    data = make_data(cfg, stripes())
    a, b = Pretrainer(cfg, data), Pretrainer(config(), data)
    views = list(a.batches(0))[:3]
    for n, (index, view) in enumerate(views[:2]):
        a.step(view, a.labels(index), n)
    b.restore({k: v.clone() for k, v in a.tensors().items()}, "here")
    for job in (a, b):
        job.step(views[2][1], job.labels(views[2][0]), 2)
    assert a.tensors().keys() == b.tensors().keys()
    for key, value in a.tensors().items():
        assert torch.equal(value, b.tensors()[key]), key
    with pytest.raises(UserError, match="here: holds another encoder"):
        Pretrainer(config(widths=(8, 8, 16, 24)), data).restore(a.tensors(), "here")


def test_the_probe_does_not_touch_the_encoder() -> None:
    cfg, images = config(), stripes()
    unlabelled = ArrayImages(images._images, None, (), "no labels")
    with_probe = Pretrainer(cfg, make_data(cfg, images))
    without = Pretrainer(cfg, make_data(cfg, unlabelled))
    assert without.model.classifier is None
    for n, (index, view) in enumerate(list(with_probe.batches(0))[:3]):
        for job in (with_probe, without):
            job.step(view, job.labels(index), n)
    for key, value in without.encoder.state_dict().items():
        assert torch.equal(value, with_probe.encoder.state_dict()[key]), key


def test_rep_relu_is_relu_with_the_gradient_of_gelu() -> None:
    x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    kinds = {kind: Projector(4, 6, 5, kind) for kind in ("none", "relu", "rep_relu")}
    for projector in kinds.values():
        projector.load_state_dict(kinds["none"].state_dict())
    raw = kinds["none"](x)
    torch.testing.assert_close(kinds["relu"](x), raw.relu())
    torch.testing.assert_close(kinds["rep_relu"](x), raw.relu())
    kinds["rep_relu"](x).sum().backward()
    torch.nn.functional.gelu(raw).sum().backward()
    ours, theirs = kinds["rep_relu"].out.weight.grad, kinds["none"].out.weight.grad
    assert ours is not None
    torch.testing.assert_close(ours, theirs)


def test_images_are_held_out_by_their_number_alone() -> None:
    held = heldout_images(5000, 0.2, 3)
    assert held.mean() == pytest.approx(0.2, abs=0.02)
    assert np.array_equal(held[:700], heldout_images(700, 0.2, 3))
    assert bool((held >= heldout_images(5000, 0.1, 3)).all())  # a larger share holds more out
    assert not np.array_equal(held, heldout_images(5000, 0.2, 4))
    assert seed_for(3, "heldout image", 0) / 2**63 >= 0.2 or held[0]
    cfg = config(limit=100)
    data = make_data(cfg, stripes())
    own = heldout_images(150, 0.2, 0)
    assert len(data.train) + len(data.heldout) == 100
    assert bool(own[data.heldout].all())
    assert not own[data.train].any()


def test_every_epoch_sees_every_image_once_in_another_order() -> None:
    data = make_data(config(), stripes())
    per_epoch = len(data.train) // 10
    epochs = [
        np.concatenate([data.batch(e * per_epoch + s, 10, 0) for s in range(per_epoch)])
        for e in range(2)
    ]
    for epoch in epochs:
        assert len(set(epoch)) == per_epoch * 10
        assert set(epoch) <= set(data.train)
    assert not np.array_equal(*epochs)


def test_an_imagenet_stem_is_saved_for_transformers_too(tmp_path: Path) -> None:
    cfg = config(stem="imagenet", size=32, normalise="imagenet", epochs=1, method="simclr")
    pretrain(cfg, stripes(60, 32, channels=3), tmp_path / "run")
    encoder = load_encoder(tmp_path / "run")
    assert encoder.cfg.mean == (0.485, 0.456, 0.406)
    assert not encoder.cfg.grey
    assert encoder.cfg.positive == "none"
    model = AutoModel.from_pretrained(tmp_path / "run" / "backbone").eval()
    x = torch.randn(3, 3, 32, 32)
    torch.testing.assert_close(model(pixel_values=x).pooler_output.flatten(1), encoder(x)[0])
    assert any(
        name.startswith("backbone/") for name in read_manifest(tmp_path / "run", "pretrain").files
    )


def test_a_damaged_encoder_is_named(tmp_path: Path) -> None:
    encoder = ImageEncoder(EncoderConfig(widths=(8, 8, 8, 8), projector_hidden=8, projector_out=8))
    encoder.save(tmp_path)
    config_file = tmp_path / "config.json"
    other = {**json.loads(config_file.read_text()), "projector_out": 9}
    config_file.write_text(json.dumps(other))
    with pytest.raises(
        UserError, match=r"model.safetensors: does not fit .* \(tensor projector.out"
    ):
        load_encoder(tmp_path)
    config_file.write_text('{"stem": "wide"}')
    with pytest.raises(UserError, match=r"config.json: stem"):
        load_encoder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    config_file.write_text("{}")
    with pytest.raises(UserError, match="model.safetensors: no such file"):
        load_encoder(tmp_path)


@pytest.mark.parametrize(
    ("images", "changes", "says"),
    [
        (stripes(20), {}, "to train on are fewer than a batch of 20; use --batch-size 1"),
        (
            ArrayImages(np.full((60, 8, 8), 9, np.uint8), None, (), "x"),
            {},
            "all pixels have the same",
        ),
    ],
)
def test_images_that_cannot_be_trained_on_are_refused_and_leave_nothing(
    tmp_path: Path, images: ArrayImages, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(UserError, match=says):
        pretrain(config(**changes), images, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("labels", [None, np.zeros(80, np.int64)])
def test_without_two_classes_the_probes_are_left_out(
    tmp_path: Path, labels: np.ndarray | None
) -> None:
    images = ArrayImages(stripes(80)._images, labels, (), "one class")
    result = pretrain(config(epochs=1), images, tmp_path / "run")
    assert result.info["probes"] is None
    (row, *_) = read_json_lines(tmp_path / "run" / "metrics.jsonl")
    assert "accuracy" not in row
    assert "loss" in row


def test_a_class_that_is_held_out_alone_leaves_no_probe() -> None:
    labels = np.where(heldout_images(80, 0.2, 0), 1, 0)
    data = make_data(config(), ArrayImages(stripes(80)._images, labels, ("a", "b"), "apart"))
    assert data.labels is None


def test_accuracy_on_the_way_is_of_every_class_though_images_are_sorted(monkeypatch) -> None:
    images, cfg = stripes(300), config()
    assert images.labels is not None
    order = np.argsort(images.labels)
    images = ArrayImages(images._images[order], images.labels[order], images.names, "sorted")
    job, asked = Pretrainer(cfg, make_data(cfg, images)), []
    embed = job.embed
    monkeypatch.setattr("wsae.vision.pretrain.EPOCH_TEST", 15)
    monkeypatch.setattr(job, "embed", lambda index: asked.append(index) or embed(index))
    job._heldout_accuracy()
    assert len(asked[0]) == 15
    assert set(images.labels[asked[0]]) == {0, 1, 2}


def test_digits_can_be_opened_and_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    images = open_images(ImagesConfig())
    losses = [
        pretrain(config(epochs=1, limit=200, dtype=dtype), images, tmp_path / dtype).info["loss"]
        for dtype in ("float32", "bfloat16")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert losses[0] != losses[1]
