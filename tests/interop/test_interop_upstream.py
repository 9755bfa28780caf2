"""SAEs that SAELens, sparsify and dictionary_learning wrote: the same x gives their latents and reconstructions.

The folders and what upstream's own classes made of them come from `benchmarks/interop_fixtures/make_*.py`.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from wsae import SAE, UserError
from wsae.interop import load, save
from wsae.sae.forward import training_forward
from wsae.sae.model import Encoder

FIXTURES = Path(__file__).parents[1] / "fixtures" / "interop"
REFUSED = {
    "saelens-matching-pursuit": "architecture 'matching_pursuit'",
    "crosscoder-decoupled": "code_normalization 'DECOUPLED'",
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
    "dl-gated": "jumprelu",
    "saelens-gated": "jumprelu",
    "saelens-skip-transcoder": "relu",
    "saelens-jumprelu-skip-transcoder": "jumprelu",
    "sparsify-skip-transcoder": "topk",
    "dl-matryoshka": "batch_topk",
    "crosscoder-relu": "relu",
    "crosscoder-mixed": "batch_topk",
}


@pytest.mark.parametrize("name", READ)
def test_latents_and_reconstructions_are_upstreams(name):
    expected = load_file(FIXTURES / name / "expected.safetensors")
    sae = load(FIXTURES / name).sae
    with torch.no_grad():
        z = sae.encode(expected["x"])
        x_hat = sae(expected["x"])
        decoded = sae.decode(expected["z"], expected["x"])
    assert (z != 0).sum() > len(z)  # something speaks
    torch.testing.assert_close(z, expected["z"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(x_hat, expected["x_hat"], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(decoded, expected["x_hat"], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["saelens-layer-norm", "saelens-norm-rescale"])
def test_rows_normalised_one_by_one_stay_so_in_files_and_codes(name, tmp_path):
    x = upstream(name)["x"]
    with torch.no_grad():
        sae = load(FIXTURES / name).sae
        sae.save(tmp_path / "ours")
        save(sae, tmp_path / "theirs", "saelens")
        theirs = json.loads((tmp_path / "theirs" / "cfg.json").read_text())
        said = json.loads((FIXTURES / name / "cfg.json").read_text())
        assert theirs["normalize_activations"] == said["normalize_activations"]
        (tmp_path / "theirs" / "manifest.json").unlink()  # read it as theirs alone
        for other in (SAE.load(tmp_path / "ours"), load(tmp_path / "theirs").sae):
            torch.testing.assert_close(other(x), sae(x), atol=1e-6, rtol=1e-6)
        many = torch.cat([x * 2**i for i in range(-3, 4)])
        code = Encoder(sae)(many)
        torch.testing.assert_close(
            code.dense(sae.cfg.d_sae), sae.encode(many), atol=1e-5, rtol=1e-5
        )
        torch.testing.assert_close(sae.decode_code(code, many), sae(many), atol=1e-5, rtol=1e-5)
        assert sae(torch.zeros(1, 6)).isfinite().all()
        folded = sae.fold_decoder_norm() if name == "saelens-norm-rescale" else sae
        torch.testing.assert_close(folded(x), sae(x), atol=1e-5, rtol=1e-5)
    for refused, says in (
        (lambda: sae.decode(sae.encode(x)), "needs its input too; decode\\(z, x\\)"),
        (lambda: training_forward(sae, x), "is not trained here"),
        (lambda: sae.scaled(2.0), "same latents at every scale"),
        (lambda: save(sae.plain(), tmp_path / "no", "dictionary_learning"), "no equal there"),
    ):
        with pytest.raises(UserError, match=says):
            refused()
    assert not (tmp_path / "no").exists()


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
        ("saelens-topk", {"metadata": 3}, "metadata is a int"),
        ("saelens-topk", {"architecture": ["topk"]}, "architecture"),
        ("saelens-topk", {"architecture": "abstopk"}, "architecture 'abstopk'"),
        ("saelens-topk", {"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input = 'false'"),
        ("saelens-topk", {"rescale_acts_by_decoder_norm": 2}, "rescale_acts_by_decoder_norm = 2"),
        ("saelens-topk", {"activation_fn": "tanh-relu"}, "activation_fn = 'tanh-relu'"),
        ("saelens-topk", {"reshape_activations": "heads"}, "reshape_activations = 'heads'"),
        ("saelens-topk", {"hook_name_out": "blocks.3.hook_mlp_out"}, "transcoder"),
        ("saelens-topk", {"clip_acts": 3.0}, "clip_acts = 3.0 is a key that wsae does not know"),
        ("saelens-standard", {"activation_fn": "topk"}, "activation_fn = 'topk'"),
        ("saelens-topk", {"architecture": "batchtopk"}, "training checkpoint"),
        ("saelens-topk", {"normalize_activations": "expected_average_only_in"}, "folded"),
        ("sparsify-topk", {"activation": "relu"}, "activation 'relu'"),
        ("sparsify-topk", {"activation": ["topk"]}, "activation"),
        ("sparsify-topk", {"signed": True}, "signed = True"),
        ("sparsify-topk", {"signed": "yes"}, "signed = 'yes'"),
        ("sparsify-topk", {"transcode": 1}, "transcode = 1"),
        ("sparsify-topk", {"matching_pursuit": True}, "matching_pursuit = True is a key"),
        ("sparsify-topk", {"num_latent": 16}, r"num_latent = 16 .*nearest: num_latents"),
        ("sparsify-topk", {"num_latents": "16"}, "num_latents = '16'"),
        ("sparsify-topk", {"k": 4.0}, "k = 4.0"),
        ("sparsify-topk", {"d_in": None}, "d_in = None"),
        ("sparsify-topk", {"num_latents": 17}, "d_sae = 17"),
        ("sparsify-groupmax", {"k": 5}, "divisible"),
        ("dl-topk", {"k": 5}, "k is 4 in ae.pt and 5"),
        ("dl-topk", {"dict_class": None}, "dict_class"),
        ("dl-topk", {"apply_b_dec_to_input": True}, "apply_b_dec_to_input = True is a key"),
        ("dl-topk", {"dict_size": 3}, "d_sae = 3"),
        ("crosscoder-batchtopk", {"k": 5}, "k is 4 in model.safetensors and 5"),
        ("crosscoder-batchtopk", {"num_layers": 3}, "num_layers = 3, the weights have 2"),
        ("crosscoder-batchtopk", {"dict_size": 3}, "d_sae = 3"),
        ("crosscoder-batchtopk", {"code_normalization": "none"}, "code_normalization 'none'"),
        ("crosscoder-relu", {"encoder_layers": [0]}, r"encoder_layers = \[0\]: an encoder of some"),
        ("crosscoder-relu", {"decoder_bias": False, "x": 1}, "x = 1 is a key"),
    ],
)
def test_configs_that_contradict_the_weights_are_refused(tmp_path, name, changes, match):
    file = "config.json" if name.startswith(("dl", "crosscoder")) else "cfg.json"
    refuse(edited(copied(tmp_path, name), file, **changes), match)


@pytest.mark.parametrize(
    ("tensors", "match"),
    [
        ({"code_normalization_id": torch.tensor(6)}, "code_normalization_id .* from 1 to 5"),
        (
            {"code_normalization_id": torch.tensor([1, 2])},
            "code_normalization_id .* not one number",
        ),
        ({"code_normalization_id": torch.tensor(torch.nan)}, "code_normalization_id"),
        ({"activation_mean": torch.ones(3)}, r"activation_mean is \(3,\)"),
        ({"activation_global_scale": torch.ones(3)}, r"activation_global_scale \[1.0, 1.0, 1.0\]"),
        ({"activation_global_scale": torch.tensor(0.0)}, "one number above 0"),
        ({"activation_global_scale": None}, r"activation_global_scale \[\]"),
    ],
)
def test_a_crosscoder_whose_buffers_are_damaged_is_refused(tmp_path, tensors, match):
    folder = edited(copied(tmp_path, "crosscoder-relu"), "config.json", code_normalization=None)
    held = load_file(folder / "model.safetensors")
    held |= {name: torch.full((2, 3), 0.1) for name in ("activation_mean", "activation_std")}
    save_file(held, folder / "model.safetensors")
    assert load(folder).format == "crosscoder"
    held = {name: t for name, t in (held | tensors).items() if t is not None}
    save_file(held, folder / "model.safetensors")
    refuse(folder, match)


def test_a_language_model_is_no_crosscoder(tmp_path):
    model = copied(tmp_path, "crosscoder-relu")
    (model / "config.json").write_text('{"num_layers": 2}')
    refuse(model, "holds no SAE that this reads")
    refuse(tmp_path, "a .pt\\); if SAELens reads it")  # nor is it pointed at


def test_a_folder_without_an_sae_says_what_was_looked_for(tmp_path):
    refuse(tmp_path, "sae_weights.safetensors, sae.safetensors, ae.pt")
    copied(tmp_path, "dl-topk")
    refuse(tmp_path, "there is one in .*dl-topk")
    refuse(tmp_path / "nothing", "no such file or directory")
    (tmp_path / "notes.txt").write_text("x")
    refuse(tmp_path / "notes.txt", "holds no SAE")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("saelens-topk", "cfg.json"),
        ("saelens-topk", "sae_weights.safetensors"),
        ("sparsify-topk", "sae.safetensors"),
        ("dl-topk", "ae.pt"),
        ("dl-topk", "config.json"),
    ],
)
def test_a_file_of_the_folder_stands_for_the_folder(name, file):
    assert same(load(FIXTURES / name / file).sae, load(FIXTURES / name).sae)


def same(a: SAE, b: SAE) -> bool:
    mine, other = a.tensors(), b.tensors()
    return a.cfg == b.cfg and all(torch.equal(mine[name], other[name]) for name in mine)


def upstream(name: str) -> dict[str, torch.Tensor]:
    return load_file(FIXTURES / name / "expected.safetensors")


def agrees(sae: SAE, x: torch.Tensor, z: torch.Tensor, x_hat: torch.Tensor) -> None:
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(x), z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(sae(x), x_hat, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["saelens-topk", "sparsify-topk"])
def test_unknown_keys_that_are_off_are_read_and_told(tmp_path, name):
    folder = edited(copied(tmp_path, name), "cfg.json", novelty=False, other="none", more=None)
    found = load(folder)
    assert same(found.sae, load(FIXTURES / name).sae)
    (note,) = found.about.notes
    assert "novelty = False" in note
    assert load(FIXTURES / name).about.notes == ()


OLD = {
    "hook_point": "blocks.3.hook_resid_post",
    "hook_point_layer": 3,
    "hook_point_head_index": None,
    "model_name": "tiny",
    "context_size": 64,
    "prepend_bos": True,
    "finetuning_scaling_factor": False,
    "normalize_activations": False,
    "l1_coefficient": 1e-3,
    "noise_scale": 0.0,
    "use_ghost_grads": True,
    "lr": 4e-4,
    "seqpos_slice": [None],
    "model_from_pretrained_kwargs": {"center_writing_weights": True},
}


def old(tmp_path: Path, name: str, **changes: object) -> Path:
    """A fixture's weights under a config as SAELens wrote it before version 6."""
    folder = copied(tmp_path, name)
    now = json.loads((folder / "cfg.json").read_text())
    kept = {key: now[key] for key in ("d_in", "d_sae", "dtype", "device", "apply_b_dec_to_input")}
    (folder / "cfg.json").write_text(json.dumps(kept | OLD | changes))
    return folder


def test_configs_of_before_saelens_6_are_read_as_saelens_6_reads_them(tmp_path):
    expected = upstream("saelens-topk")
    folder = old(tmp_path, "saelens-topk", activation_fn_str="topk", activation_fn_kwargs={"k": 4})
    found = load(folder)
    agrees(found.sae, *(expected[key] for key in ("x", "z", "x_hat")))
    assert (found.about.model, found.about.hook) == ("tiny", "blocks.3.hook_resid_post")
    assert "center_writing_weights" in found.about.notes[0]
    found = load(old(tmp_path, "saelens-standard"))  # the oldest name no architecture
    assert found.sae.cfg.activation.kind == "relu"
    folder = old(tmp_path, "saelens-jumprelu", architecture="jumprelu", activation_fn="relu")
    agrees(load(folder).sae, *(upstream("saelens-jumprelu")[key] for key in ("x", "z", "x_hat")))
    (folder / "cfg.json").write_text("{}")
    refuse(folder, "neither architecture nor d_in")


def test_finetuning_factors_are_folded_into_the_decoder(tmp_path):
    folder = old(tmp_path, "saelens-standard", finetuning_scaling_factor=True)
    file = folder / "sae_weights.safetensors"
    weights = load_file(file)
    factor = torch.linspace(0.5, 2.0, len(weights["b_enc"]))
    save_file({**weights, "scaling_factor": factor}, file)
    expected = upstream("saelens-standard")
    x_hat = (expected["z"] * factor) @ weights["W_dec"] + weights["b_dec"]
    agrees(load(folder).sae, expected["x"], expected["z"], x_hat)
    edited(folder, "cfg.json", finetuning_scaling_factor=False)
    refuse(folder, "scaling_factor is there")
    save_file({**weights, "scaling_factor": torch.ones_like(factor)}, file)
    agrees(load(folder).sae, expected["x"], expected["z"], expected["x_hat"])


def test_a_constant_scale_is_folded(tmp_path):
    expected, scale = upstream("saelens-topk-rescale"), 0.37
    folder = copied(tmp_path, "saelens-topk-rescale")
    edited(folder, "cfg.json", normalize_activations="expected_average_only_in")
    refuse(folder, "activation_scaler.json")
    (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": scale}))
    found = load(folder)
    agrees(found.sae, expected["x"] / scale, expected["z"], expected["x_hat"] / scale)
    assert "0.37" in found.about.notes[0]
    for bad in (0, -1, "2", None, True, 1e300):
        (folder / "activation_scaler.json").write_text(json.dumps({"scaling_factor": bad}))
        refuse(folder, "scaling_factor = .* is not a positive number")
    refuse(edited(folder, "cfg.json", normalize_activations="covariance_whitening"), "whitened")
    refuse(edited(folder, "cfg.json", normalize_activations=["none"]), "normalize_activations")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.int64])
def test_quantised_weights_are_not_taken_for_weights(tmp_path, dtype):
    folder = copied(tmp_path, "saelens-topk")
    file = folder / "sae_weights.safetensors"
    weights = load_file(file)
    save_file({**weights, "W_enc": weights["W_enc"].to(dtype)}, file)
    refuse(folder, "tensor W_enc is .*quantised")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_precisions_are_read(tmp_path, dtype):
    folder = copied(tmp_path, "saelens-topk")
    file = folder / "sae_weights.safetensors"
    save_file({name: tensor.to(dtype) for name, tensor in load_file(file).items()}, file)
    expected = upstream("saelens-topk")
    with torch.no_grad():
        z = load(folder).sae.encode(expected["x"])
    torch.testing.assert_close(z, expected["z"], atol=1e-2, rtol=1e-2)


def test_transposed_matrices_are_named(tmp_path):
    folder = copied(tmp_path, "saelens-topk")
    file = folder / "sae_weights.safetensors"
    weights = load_file(file)
    turned = {name: weights[name].T.contiguous() for name in ("W_enc", "W_dec")}
    save_file({**weights, **turned}, file)
    refuse(folder, "transposed")
