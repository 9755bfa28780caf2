"""SAEs that SAELens, sparsify and dictionary_learning wrote: the same x gives their latents and reconstructions.

The folders and what upstream's own classes made of them come from `benchmarks/interop_fixtures/make_*.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wsae import UserError
from wsae.interop import load

FIXTURES = Path(__file__).parent / "fixtures" / "interop"
REFUSED = {
    "saelens-gated": "architecture 'gated'",
    "saelens-matching-pursuit": "architecture 'matching_pursuit'",
    "saelens-layer-norm": "normalize_activations = 'layer_norm'",
    "sparsify-transcoder": "transcode",
    "sparsify-skip": "skip",
    "dl-gated": "GatedAutoEncoder",
    "dl-matryoshka": "MatryoshkaBatchTopKSAE",
}
ALL = sorted(p.name for p in FIXTURES.iterdir())
READ = [name for name in ALL if name not in REFUSED]
KINDS = {
    "saelens-topk": "topk",
    "saelens-batchtopk": "jumprelu",
    "saelens-standard": "relu",
    "sparsify-groupmax": "group_topk",
    "dl-batchtopk": "batch_topk",
    "dl-topk-threshold": "topk",
    "dl-jumprelu": "jumprelu",
}


@pytest.mark.parametrize("name", READ)
def test_latents_and_reconstructions_are_upstreams(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    sae = load(FIXTURES / name).sae
    with torch.no_grad():
        z = sae.encode(expected["x"])
        x_hat = sae(expected["x"])
    assert (z != 0).sum() > len(z)  # something speaks
    torch.testing.assert_close(z, expected["z"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_hat, expected["x_hat"], atol=1e-5, rtol=1e-5)


def test_every_trap_is_in_a_fixture():
    """Without these differences a reader that ignores the trap would pass."""
    rescale = load_file(FIXTURES / "saelens-topk-rescale" / "sae_weights.safetensors")
    norms = rescale["W_dec"].norm(dim=1)
    assert norms.max() / norms.min() > 1.5
    for name, key in (("saelens-topk", "b_dec"), ("sparsify-topk", "b_dec")):
        weights = next(p for p in (FIXTURES / name).glob("sae*.safetensors"))
        assert load_file(weights)[key].norm() > 0.3
    assert (
        json.loads((FIXTURES / "sparsify-no-num-latents/cfg.json").read_text())["num_latents"] == 0
    )
    half = load_file(FIXTURES / "saelens-topk-bf16" / "sae_weights.safetensors")
    assert half["W_enc"].dtype == torch.bfloat16
    jump = load_file(FIXTURES / "saelens-jumprelu" / "sae_weights.safetensors")
    assert jump["threshold"].min() < 0


@pytest.mark.parametrize(("name", "kind"), KINDS.items())
def test_the_activation_function_is_the_one_that_upstream_uses(name, kind):
    assert load(FIXTURES / name).sae.cfg.activation.kind == kind


@pytest.mark.parametrize(("name", "reason"), REFUSED.items())
def test_what_has_no_equal_is_refused_in_one_line(name, reason):
    with pytest.raises(UserError, match=reason) as caught:
        load(FIXTURES / name)
    assert "\n" not in str(caught.value)
    assert str(FIXTURES / name) in str(caught.value)


def test_metadata_are_read():
    about = load(FIXTURES / "saelens-topk").about
    assert (about.model, about.hook, about.context) == ("tiny", "blocks.3.hook_resid_post", 64)
    assert about.prepend_bos is True
    assert about.origin["format"] == "saelens"
    of_dl = load(FIXTURES / "dl-topk-threshold").about
    assert (of_dl.model, of_dl.hook, of_dl.context) == ("tiny", "resid", 64)
    assert of_dl.origin["threshold"] == pytest.approx(1.25)


def copied(tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(FIXTURES / name, tmp_path / name))


def refuse(folder: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


WEIGHTS = {
    "saelens-topk": "sae_weights.safetensors",
    "sparsify-topk": "sae.safetensors",
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_nan_wrong_shapes_missing_and_foreign_tensors_are_named(tmp_path, name):
    folder = copied(tmp_path, name)
    file = folder / WEIGHTS[name]
    good = load_file(file)
    for key in good:
        bad = {**good, key: good[key].clone()}
        bad[key].view(-1)[0] = float("nan")
        save_file(bad, file)
        refuse(folder, "NaN or infinite")
        save_file({**good, key: good[key][:-1].clone()}, file)
        refuse(folder, "the config says|need|decoder")
        save_file({k: v for k, v in good.items() if k != key}, file)
        refuse(folder, f"tensor {key} is missing")
    save_file({**good, "W_skip": torch.zeros(3)}, file)
    refuse(folder, "W_skip")


@pytest.mark.parametrize("name", ["saelens-topk", "sparsify-topk", "dl-topk"])
def test_cut_files_are_refused(tmp_path, name):
    folder = copied(tmp_path, name)
    for file in [p for p in folder.iterdir() if p.name != "expected.safetensors"]:
        content = file.read_bytes()
        for share in (0.0, 0.3, 0.9):
            file.write_bytes(content[: int(len(content) * share)])
            refuse(folder, file.name)
        file.unlink()
        refuse(folder, "no such file|holds no SAE")
        file.write_bytes(content)
    load(folder)


def edited(folder: Path, file: str, **changes: object) -> Path:
    data = json.loads((folder / file).read_text())
    place = data.get("trainer", data)
    place.update(changes)
    (folder / file).write_text(json.dumps(data))
    return folder


@pytest.mark.parametrize(
    ("name", "changes", "match"),
    [
        ("saelens-topk", {"k": 0}, "k = 0"),
        ("saelens-topk", {"k": 99}, "k = 99 active latents of only"),
        ("saelens-topk", {"d_in": 7}, "d_in = 7"),
        ("saelens-topk", {"d_sae": 10**12}, "d_sae = 1000000000000"),
        ("saelens-topk", {"metadata": {"sae_lens_version": "5.9.1"}}, "SAELens 5.9.1"),
        ("saelens-topk", {"metadata": 3}, "SAELens < 6"),
        ("saelens-topk", {"architecture": "batchtopk"}, "training checkpoint"),
        ("saelens-topk", {"normalize_activations": "expected_average_only_in"}, "folded"),
        ("sparsify-topk", {"activation": "relu"}, "activation 'relu'"),
        ("sparsify-topk", {"d_in": None}, "d_in = None"),
        ("sparsify-topk", {"num_latents": 17}, "d_sae = 17"),
        ("sparsify-groupmax", {"k": 5}, "divisible"),
        ("dl-topk", {"k": 5}, "k is 4 in ae.pt and 5"),
        ("dl-topk", {"dict_class": None}, "dict_class"),
        ("dl-topk", {"dict_size": 3}, "d_sae = 3"),
    ],
)
def test_configs_that_contradict_the_weights_are_refused(tmp_path, name, changes, match):
    file = "config.json" if name.startswith("dl") else "cfg.json"
    refuse(edited(copied(tmp_path, name), file, **changes), match)


def test_a_folder_without_an_sae_says_what_was_looked_for(tmp_path):
    refuse(tmp_path, "sae_weights.safetensors, sae.safetensors, ae.pt")
    copied(tmp_path, "dl-topk")
    refuse(tmp_path, "there is one in .*dl-topk")
    refuse(tmp_path / "nothing", "no such directory")
