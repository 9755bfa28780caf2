"""The commands on images: harvest, train by consistency, evaluate and report; and flags that do not go together."""

import json

import numpy as np
import pytest
import torch
from images_models import SIZE, make_vision
from sklearn.datasets import load_digits

from wsae.acts.images.model import EncoderConfig, ImageEncoder
from wsae.acts.store import Store
from wsae.cli.main import main

CLASSES = 3


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli")
    make_vision(path / "model", "resnet")
    rng = np.random.default_rng(0)
    labels = np.arange(240) % CLASSES
    images = rng.integers(0, 256, (240, SIZE, SIZE, 3)) * (1 + labels)[:, None, None, None] // 3
    np.savez(path / "x.npz", images=images.astype(np.uint8), labels=labels)
    words = ["harvest", str(path / "model"), "--images", str(path / "x.npz"), "--hook", "pooler"]
    words += ["--out", str(path / "store"), "--batch-size", "32", "--json"]
    torch.set_num_threads(1)
    assert main(words) == 0
    return path


def ran(capsys, *words: object) -> dict:
    capsys.readouterr()
    assert main([*map(str, words), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys, *words: object) -> str:
    capsys.readouterr()
    assert main([*map(str, words)]) == 2
    return capsys.readouterr().err


def test_the_whole_way_from_images_to_a_report(base, capsys):
    store, run = base / "store", base / "run"
    words = [
        "--gamma",
        "consistency",
        "--k",
        2,
        "--d-sae",
        32,
        "--tokens",
        2000,
        "--batch-size",
        64,
    ]
    ran(capsys, "train", store, "--out", run, *words)
    gamma = json.loads((run / "gamma.json").read_text())["pooler"]
    assert any(name.startswith("consistency") for name in gamma)
    found = ran(capsys, "evaluate", run, "--draws", 20)
    assert "pooler" in found["hooks"]
    page = base / "page.html"
    ran(capsys, "report", run, "--out", page)
    assert page.stat().st_size > 10_000
    assert "no text" in refused(capsys, "interpret", run, "--score", "surprisal")


def test_a_crosscoder_of_images_has_class_scores_and_pictures(base, capsys, tmp_path):
    make_vision(tmp_path / "vit", "vit")
    store, run, hooks = tmp_path / "store", tmp_path / "run", ("layers.0", "layers.1")
    images = ["--images", base / "x.npz", "--batch-size", 32]
    ran(capsys, "harvest", tmp_path / "vit", *images, "--hook", *hooks, "--out", store)
    small = ["--k", 2, "--d-sae", 32, "--tokens", 640, "--batch-size", 64, "--out", run]
    ran(capsys, "train", store, "--crosscoder", *hooks, *small)
    found = ran(capsys, "evaluate", run, "--draws", 20)
    (scores,) = found["classes"]["hooks"].values()
    assert len(scores["class_totals"]) == CLASSES
    assert "thumbnails.json" in {path.name for path in (run / "evaluation").iterdir()}


def test_harvest_says_what_was_read(base, capsys):
    words = ["harvest", base / "model", "--images", base / "x.npz", "--out", base / "store"]
    assert main([*map(str, words), "--hook", "pooler", "--batch-size", "32"]) == 0
    said = capsys.readouterr().out
    assert "images: 240 of 32 x 32 pixels, a row each, 3 classes" in said
    assert "--gamma consistency" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--text", "x.txt", "--images", "x.npz"], "give one of them"),
        (["--images", "x.npz", "--seq-len", "8"], "--seq-len: is for --text"),
        (["--images", "x.npz", "--tokens", "8"], "--tokens: is for --text"),
        (["--text", "x.txt", "--limit", "8"], "--limit: is for --images"),
        (["--images", "/nowhere.npz"], "no such file or directory"),
        (["--images", "x.npz", "--heldout-fraction", "1"], "--heldout-fraction: "),
    ],
)
def test_flags_that_do_not_go_together_are_one_line(base, capsys, tmp_path, words, message):
    hook = ["--hook", "pooler", "--out", tmp_path / "s"]
    error = refused(capsys, "harvest", base / "model", *words, *hook)
    assert message in error
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_a_pretrained_run_gives_embeddings_and_projections(capsys, tmp_path):
    shape = {"widths": (4, 4, 8, 8), "projector_hidden": 12, "projector_out": 6}
    normal = {"mean": (0.3, 0.3, 0.3), "std": (0.2, 0.2, 0.2)}
    torch.manual_seed(0)
    encoder = ImageEncoder(
        EncoderConfig(stem="smallest", size=8, positive="relu", **shape, **normal)
    )
    (tmp_path / "run" / "encoder").mkdir(parents=True)
    encoder.save(tmp_path / "run" / "encoder")
    words = ["--images", "digits", "--limit", 40, "--hook", "pooler", "projector"]
    found = ran(capsys, "harvest", tmp_path / "run", *words, "--out", tmp_path / "s")
    assert found["hooks"] == {"pooler": 8, "projector": 6}
    assert (found["size"], found["positions"], len(found["classes"])) == (8, 1, 10)
    store = Store(tmp_path / "s")
    image, _ = store.places("train")
    digits = load_digits()
    pixels = torch.from_numpy(np.round(digits.images[image] * (255 / 16)) / 255).float()
    with torch.no_grad():
        h, z = encoder.eval()(((pixels - 0.3) / 0.2)[:, None].expand(-1, 3, -1, -1))
    rows = store.rows("train", np.arange(len(image)))
    torch.testing.assert_close(rows["pooler"], h, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(rows["projector"], z, rtol=1e-4, atol=1e-5)
    assert store.labels("train").tolist() == digits.target[image].tolist()
