"""Harvests of images: parity with the plain library, exact statistics, kill and resume, unreadable files, bad input."""

from pathlib import Path

import numpy as np
import pytest
import torch
from images_models import SIZE, WIDTH, make_vision
from PIL import Image
from transformers import AutoImageProcessor, AutoModel, CLIPVisionModel

from wsae.acts import store as ledger
from wsae.acts.config import ImageHarvestConfig, ImagesConfig
from wsae.acts.images.harvest import harvest_images, heldout_images, store_images
from wsae.acts.images.model import load_vision
from wsae.acts.source import StoreSource
from wsae.core.errors import UserError

N, CLASSES = 30, 3
RNG = np.random.default_rng(0)
PIXELS = RNG.integers(0, 256, (N, SIZE, SIZE, 3), dtype=np.uint8)
LABELS = RNG.integers(0, CLASSES, N)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("images")
    for kind in ("resnet", "vit", "clip", "clip_vision", "dinov2"):
        make_vision(path / kind, kind)
    np.savez(path / "x.npz", images=PIXELS, labels=LABELS, names=["x", "y", "z"])
    return path


def config(base: Path, kind: str = "resnet", **values) -> ImageHarvestConfig:
    images = ImagesConfig(path=str(base / "x.npz"), **values.pop("images", {}))
    defaults = {"model": str(base / kind), "images": images, "batch_size": 4, "shard_rows": 6}
    return ImageHarvestConfig(**{**defaults, **values})


@pytest.fixture(scope="module")
def store(base, tmp_path_factory):
    return harvest_images(config(base), tmp_path_factory.mktemp("store") / "s")


def all_rows(store, split, hook):
    return store.rows(split, np.arange(store.n_rows[split]))[hook]


def contents(path: Path) -> dict[str, bytes]:
    files = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


# ---- what is stored


def plain(base, kind):
    """Return the library's own outputs on every image, prepared by the model's own processor."""
    load = CLIPVisionModel if kind.startswith("clip") else AutoModel
    model = load.from_pretrained(base / kind).eval()
    processor = AutoImageProcessor.from_pretrained(base / kind)
    pictures = [Image.fromarray(pixels) for pixels in PIXELS]
    with torch.no_grad():
        return model(**processor(pictures, return_tensors="pt"), output_hidden_states=True)


PARITY = {
    "resnet": {
        "pooler": lambda out: out.pooler_output.flatten(1)[:, None],
        "encoder.stages.1": lambda out: out.hidden_states[2].flatten(2).transpose(1, 2),
    },
    "vit": {
        "layers.0": lambda out: out.hidden_states[1],
        "pooler": lambda out: out.pooler_output[:, None],
    },
    "clip": {
        "layers.1": lambda out: out.hidden_states[2],
        "post_layernorm": lambda out: out.pooler_output[:, None],
    },
    "clip_vision": {"layers.0": lambda out: out.hidden_states[1]},
    "dinov2": {"layernorm": lambda out: out.last_hidden_state},
}


@pytest.mark.parametrize("kind", list(PARITY))
def test_rows_are_the_librarys_activations_at_every_position(base, tmp_path, kind):
    out = plain(base, kind)
    for hook, wanted in PARITY[kind].items():
        made = harvest_images(config(base, kind, hooks=(hook,)), tmp_path / hook)
        (name,) = made.hooks
        expected = wanted(out)
        assert made.hooks[name] == expected.shape[2]
        for split in ("train", "heldout"):
            image, pos = made.places(split)
            torch.testing.assert_close(
                all_rows(made, split, name), expected[image, pos], rtol=1e-4, atol=2e-5
            )
        assert made.n_rows["train"] + made.n_rows["heldout"] == N * expected.shape[1]


def test_images_of_any_shape_are_cut_as_the_models_processor_cuts_them(base, tmp_path):
    (tmp_path / "i").mkdir()
    shapes = [(50, 81), (200, 47), (33, 32), (31, 90)]
    for number, (height, width) in enumerate(shapes):
        pixels = RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "i" / f"{number}.png")
    for kind in ("resnet", "dinov2", "clip"):
        processor = AutoImageProcessor.from_pretrained(base / kind)
        vision = load_vision(str(base / kind))
        images = store_like(vision, tmp_path / "i")
        for number in range(len(shapes)):
            wanted = processor(Image.open(tmp_path / "i" / f"{number}.png"), return_tensors="pt")
            mine = vision.prepare(images.square(number)[None])
            torch.testing.assert_close(mine, wanted["pixel_values"], rtol=0, atol=0.02)


def store_like(vision, path):
    from wsae.acts.images.sets import open_images

    return open_images(vision.images(ImagesConfig(path=str(path))))


def test_halves_classes_and_statistics_are_those_of_the_images(store):
    held = heldout_images(N, 0.2, 0)
    for split, mask in (("train", ~held), ("heldout", held)):
        image, pos = store.places(split)
        assert image.tolist() == np.flatnonzero(mask).tolist()
        assert not pos.any()
        assert store.labels(split).tolist() == LABELS[mask].tolist()
    source = StoreSource(store.path)
    assert source.labels().tolist() == LABELS[held].tolist()
    assert source.tokens() is None
    assert store.info["classes"] == ["x", "y", "z"]
    stats, rows = source.stats()["pooler"], all_rows(store, "train", "pooler").double()
    torch.testing.assert_close(stats.kept.mean, rows.mean(0), rtol=1e-12, atol=1e-15)
    active = (rows.abs() / rows.norm(dim=1, keepdim=True) > 1e-5).numpy()
    for dim in range(WIDTH):
        share = np.bincount(LABELS[~held][active[:, dim]], minlength=CLASSES)
        expected = share.max() / share.sum() if share.sum() else 0.0
        assert float(stats.consistency[dim]) == pytest.approx(expected, abs=1e-15)
    assert np.array_equal(store_images(store).labels, LABELS)


def test_a_limit_takes_a_random_choice_and_rows_keep_their_images_numbers(base, store, tmp_path):
    made = harvest_images(config(base, limit=11, heldout_fraction=0.3), tmp_path / "s")
    image = torch.cat([made.places(split)[0] for split in ("train", "heldout")])
    assert len(image) == len(image.unique()) == 11
    assert int(image.max()) > 11
    rows = dict(
        zip(store.places("train")[0].tolist(), all_rows(store, "train", "pooler"), strict=True)
    )
    for number, row in zip(
        made.places("train")[0].tolist(), all_rows(made, "train", "pooler"), strict=True
    ):
        if number in rows:
            torch.testing.assert_close(row, rows[number], rtol=1e-4, atol=1e-6)


def test_hooks_of_one_pass_are_aligned_and_a_full_path_names_one_module(base, tmp_path):
    made = harvest_images(config(base, "vit", hooks=("layers.*", "embeddings")), tmp_path / "s")
    assert list(made.hooks) == ["embeddings", "layers.0", "layers.1"]
    assert made.info["positions"] == 17
    out = plain(base, "vit")
    image, pos = made.places("train")
    for hook, depth in (("embeddings", 0), ("layers.1", 2)):
        torch.testing.assert_close(
            all_rows(made, "train", hook),
            out.hidden_states[depth][image, pos],
            rtol=1e-4,
            atol=2e-5,
        )
    labels = made.labels("train")
    assert labels.tolist() == np.repeat(LABELS[np.unique(image)], 17).tolist()


# ---- unreadable files, killed, other


def write_files(root: Path) -> Path:
    for number, pixels in enumerate(PIXELS):
        place = root / f"c{LABELS[number]}"
        place.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(place / f"{number:02d}.png")
    return root


def test_unreadable_images_are_left_out_counted_and_named_or_fatal(base, tmp_path):
    root = write_files(tmp_path / "i")
    broken = sorted(root.rglob("*.png"))[::4]
    for path in broken:
        path.write_bytes(path.read_bytes()[:300])
    cfg = config(base).model_copy(update={"images": ImagesConfig(path=str(root))})
    made = harvest_images(cfg, tmp_path / "s")
    lost = sum(part["unreadable"] for part in made.info["skipped"].values())
    assert lost == len(broken)
    assert len(made.info["unreadable"]) == 5
    assert all(any(str(p) in line for p in broken) for line in made.info["unreadable"])
    assert made.n_rows["train"] + made.n_rows["heldout"] == N - len(broken)
    files = sorted(root.rglob("*.png"))
    for split in ("train", "heldout"):
        kept = [files[i] for i in made.places(split)[0].tolist()]
        assert not set(kept) & set(broken)
        assert [int(p.parent.name[1]) for p in kept] == made.labels(split).tolist()
    fatal = ImagesConfig(path=str(root), on_error="raise")
    with pytest.raises(UserError, match=r"\.png: cannot be read"):
        harvest_images(cfg.model_copy(update={"images": fatal}), tmp_path / "t")
    assert not (tmp_path / "t").exists()
    for path in files:
        path.write_bytes(b"")
    with pytest.raises(UserError, match="none of the heldout images can be read"):
        harvest_images(cfg, tmp_path / "t")
    assert not (tmp_path / "t").exists()


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("stop_after", [1, 3])
def test_an_interrupted_harvest_continues_to_the_same_bytes(
    base, store, tmp_path, monkeypatch, stop_after
):
    saves, save = 0, ledger.Ledger.save

    def stopping(self, out, tally):
        nonlocal saves
        saves += 1
        if saves > stop_after:
            raise Stopped
        return save(self, out, tally)

    monkeypatch.setattr(ledger.Ledger, "save", stopping)
    with pytest.raises(Stopped):
        harvest_images(config(base), tmp_path / "s")
    monkeypatch.undo()
    assert (tmp_path / "s" / ledger.PROGRESS).exists()
    made = harvest_images(config(base, images={"workers": 1}), tmp_path / "s")
    assert contents(made.path) == contents(store.path)


def test_a_finished_harvest_is_opened_and_another_refused(base, store):
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}
    harvest_images(config(base), store.path)
    assert {p: p.stat().st_mtime_ns for p in store.path.rglob("*")} == before
    with pytest.raises(UserError, match="was made with heldout_fraction=0.2, not 0.3"):
        harvest_images(config(base, heldout_fraction=0.3), store.path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hooks": ("puller",)}, r"no such module \(nearest: .*pooler"),
        ({"hooks": ("stages.0", "pooler")}, "have 64 and 1 rows an image|have 1 and 64 rows"),
        ({"model": "/no/model"}, "no such file or directory"),
        (
            {"kind": "vit", "images": {"size": 40}},
            "does not take images of 40 x 40 .* its own size is 32",
        ),
        ({"limit": 1, "heldout_fraction": 0.99}, "leave none to train on"),
        ({"device": "warp"}, "not available here"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_directory(base, tmp_path, values, message):
    with pytest.raises(UserError, match=message) as caught:
        harvest_images(config(base, **values), tmp_path / "deep" / "s")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "deep" / "s").exists()


def test_a_language_model_and_one_without_a_preparation_are_refused(base, tmp_path):
    from acts_models import make_model

    make_model(tmp_path / "lm")
    (tmp_path / "lm" / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="not a vision model.*what works: ResNet"):
        load_vision(str(tmp_path / "lm"))
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        (tmp_path / "bare" / name).write_bytes((base / "vit" / name).read_bytes())
    with pytest.raises(UserError, match="no preprocessor_config.json in it"):
        load_vision(str(tmp_path / "bare"))


def test_weights_that_a_classifier_lacks_are_told_of_and_refused_where_read(base, tmp_path, caplog):
    from acts_models import rewritten

    make_vision(tmp_path / "vit", "vit")
    rewritten(
        tmp_path / "vit",
        lambda x: (
            {k: v for k, v in x.items() if "pooler" not in k}
            | {"classifier.weight": x["pooler.dense.weight"]}
        ),
    )
    lacking = ["pooler.dense.weight", "pooler.dense.bias"]
    model = str(tmp_path / "vit")
    store = harvest_images(config(base, model=model, hooks=("layers.1",)), tmp_path / "s")
    assert store.manifest.info["not_loaded"] == lacking
    assert "not used" in caplog.text
    assert "classifier.weight" in caplog.text
    with pytest.raises(UserError, match=r"hook 'pooler': depends on .*pooler\.dense\.weight"):
        harvest_images(config(base, model=model, hooks=("pooler",)), tmp_path / "p")
    assert "not_loaded" not in harvest_images(config(base), tmp_path / "whole").manifest.info
    rewritten(tmp_path / "vit", lambda x: {f"module.{k}": v for k, v in x.items()})
    with pytest.raises(UserError, match="begin with 'module.'"):
        load_vision(model)


def test_a_store_is_known_again_however_its_place_is_written(tmp_path, monkeypatch):
    make_vision(tmp_path / "model", "resnet")
    pixels = np.random.default_rng(0).integers(0, 256, (12, SIZE, SIZE, 3)).astype(np.uint8)
    np.savez(tmp_path / "x.npz", images=pixels)
    monkeypatch.chdir(tmp_path)
    shared = {"model": str(tmp_path / "model"), "hooks": ("pooler",)}
    first = harvest_images(
        ImageHarvestConfig(**shared, images=ImagesConfig(path="x.npz")), tmp_path / "store"
    )
    place = ImagesConfig(path=str(tmp_path / "x.npz"))
    again = harvest_images(ImageHarvestConfig(**shared, images=place), tmp_path / "store")
    assert again.manifest.digest() == first.manifest.digest()
    monkeypatch.chdir("/")
    assert len(store_images(again)) == 12
