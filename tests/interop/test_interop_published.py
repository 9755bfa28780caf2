"""SAEs as laboratories publish them: every array means what their own code makes of it, or is refused by name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from wsae import SAE, UserError
from wsae.interop import load
from wsae.interop.published import origin

D, M = 6, 16
X = torch.randn(50, D, generator=torch.Generator().manual_seed(9))


def arrays(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,)}
    found = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    return {**found, "threshold": torch.rand(M, generator=generator) * 2 - 0.3}


def refuse(place: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load(place)
    assert "\n" not in str(caught.value)


def agrees(sae: SAE, z: torch.Tensor, x_hat: torch.Tensor) -> None:
    assert (z != 0).any()
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(X), z, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(sae(X), x_hat, atol=1e-4, rtol=1e-5)


def jumprelu(w: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return latents and reconstructions as Gemma Scope's page defines them."""
    pre = X @ w["W_enc"] + w["b_enc"]
    z = torch.relu(pre) * (pre > w["threshold"])
    return z, z @ w["W_dec"] + w["b_dec"]


@pytest.fixture
def gemma(tmp_path) -> Path:
    """A folder as google/gemma-scope-2b-pt-res has them."""
    folder = tmp_path / "models--google--gemma-scope-2b-pt-res/layer_20/width_16k/average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **{k: v.numpy() for k, v in arrays().items()})
    return folder


def test_gemma_scope(gemma):
    found = load(gemma)
    assert found.format == "gemma_scope"
    agrees(found.sae, *jumprelu(arrays()))
    assert (found.about.model, found.about.hook) == (
        "google/gemma-2-2b",
        "blocks.20.hook_resid_post",
    )
    agrees(load(gemma / "params.npz").sae, *jumprelu(arrays()))


def test_gemma_scope_without_its_folder_says_that_the_hook_is_not_known(gemma, tmp_path):
    (tmp_path / "mine").mkdir()
    (gemma / "params.npz").rename(tmp_path / "mine" / "params.npz")
    about = load(tmp_path / "mine").about
    assert about.hook is None
    assert "hook" in about.notes[0]


@pytest.mark.parametrize(
    ("path", "model", "hook"),
    [
        (
            "gemma-scope-9b-it-res/layer_9/width_16k",
            "google/gemma-2-9b-it",
            "blocks.9.hook_resid_post",
        ),
        ("gemma-scope-2b-pt-att/layer_3/w", "google/gemma-2-2b", "blocks.3.attn.hook_z"),
        ("gemma-scope-27b-pt-mlp/layer_3/w", "google/gemma-2-27b", "blocks.3.hook_mlp_out"),
        ("gemma-scope-2b-pt-res/embedding/width_4k", "google/gemma-2-2b", "hook_embed"),
        (
            "gemma-scope-2-270m-it/resid_post/layer_5_width_16k_l0_small",
            "google/gemma-3-270m-it",
            "blocks.5.hook_resid_post",
        ),
        ("somewhere/else", None, None),
    ],
)
def test_the_release_is_read_from_the_path(path, model, hook):
    assert origin(Path(path))[:2] == (model, hook)


def test_gemma_scope_2(tmp_path):
    small = {name.replace("W_", "w_"): tensor for name, tensor in arrays().items()}
    save_file(small, tmp_path / "params.safetensors")
    agrees(load(tmp_path).sae, *jumprelu(arrays()))
    config = {"architecture": "jump_relu", "model_name": "gemma-3-4b-pt"}
    config |= {"hf_hook_point_in": "model.layers.9.output", "l0": 60, "width": M}
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load(tmp_path)
    agrees(found.sae, *jumprelu(arrays()))
    assert found.about.model == "google/gemma-3-4b-pt"
    assert found.about.hook == "model.layers.9.output"
    for key, value, match in (
        ("architecture", "gated", "architecture = 'gated'"),
        ("input_scale", 2.0, "input_scale = 2.0 is a key"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | {key: value}))
        refuse(tmp_path, match)
    (tmp_path / "config.json").unlink()
    save_file({**small, "affine_skip_connection": torch.eye(D)}, tmp_path / "params.safetensors")
    refuse(tmp_path, "affine_skip_connection")


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoder_of_gemma_scope_2_gives_the_output_of_its_module(tmp_path, skip):
    w = arrays()
    w["W_dec"] = w["W_dec"][:, : D - 1]
    w["b_dec"] = w["b_dec"][: D - 1]
    affine = torch.randn(D, D - 1, generator=torch.Generator().manual_seed(3))
    small = {name.replace("W_", "w_"): tensor.contiguous() for name, tensor in w.items()}
    extra = {"affine_skip_connection": affine} if skip else {}
    save_file(small | extra, tmp_path / "params.safetensors")
    config = {"architecture": "jump_relu", "affine_connection": skip}
    ends = ("pre_feedforward_layernorm.output", "post_feedforward_layernorm.output")
    config |= dict(
        zip(("hf_hook_point_in", "hf_hook_point_out"), (f"layers.9.{e}" for e in ends), strict=True)
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = load(tmp_path)
    pre = X @ w["W_enc"] + w["b_enc"]
    z = torch.relu(pre) * (pre > w["threshold"])
    agrees(found.sae, z, z @ w["W_dec"] + w["b_dec"] + (X @ affine if skip else 0))
    assert (found.sae.cfg.d_out, found.sae.cfg.skip) == (D - 1, skip or None)
    assert (found.about.hook, found.about.hook_out) == tuple(f"layers.9.{e}" for e in ends)


def test_gemma_scopes_embedding_is_read_where_it_is_scaled(gemma, tmp_path):
    """The SAE is of e; the first block takes x = sqrt(d) e, and the reconstruction is of that."""
    folder = tmp_path / "gemma-scope-2b-pt-res/embedding/width_4k/average_l0_6"
    folder.mkdir(parents=True)
    (gemma / "params.npz").rename(folder / "params.npz")
    w, root = arrays(), D**0.5
    pre = X / root @ w["W_enc"] + w["b_enc"]
    z = torch.relu(pre) * (pre > w["threshold"])
    agrees(load(folder).sae, z, root * (z @ w["W_dec"] + w["b_dec"]))


def test_a_transcoder_of_gemma_scope_is_not_an_sae(gemma, tmp_path):
    """Its arrays have the same names and shapes; only the folder's name tells."""
    release = tmp_path / "gemma-scope-2b-pt-transcoders"
    folder = release / "layer_3" / "width_16k"
    folder.mkdir(parents=True)
    (gemma / "params.npz").rename(folder / "params.npz")
    found = load(folder)
    agrees(found.sae, *jumprelu(arrays()))
    assert found.sae.cfg.transcoder
    assert (found.about.model, found.about.hook_out) == (
        "google/gemma-2-2b",
        "blocks.3.hook_mlp_out",
    )
    assert "before its weight" in found.about.notes[-1]
    (folder / "params.npz").rename(release / "params.npz")
    refuse(release, "transcoder, and not of which layer")


def test_damaged_and_altered_arrays_are_refused(gemma):
    file, good = gemma / "params.npz", {k: v.numpy() for k, v in arrays().items()}
    whole = file.read_bytes()
    for end in (0, 10, len(whole) // 2, len(whole) - 3):
        file.write_bytes(whole[:end])
        refuse(gemma, "not a readable .npz file")
    changes = {
        "W_enc": (good["W_enc"].T, r"W_enc is \(16, 6\)"),
        "W_dec": (good["W_dec"][0], "not a matrix"),
        "threshold": (good["threshold"][:-1], "threshold is"),
        "b_dec": (good["b_dec"] * np.nan, "NaN"),
        "b_enc": (good["b_enc"].astype(np.int32), "int32"),
        "scaling_factor": (np.full(M, 2.0, np.float32), "scaling_factor belongs to no SAE"),
    }
    for name, (array, match) in changes.items():
        np.savez(file, **{**good, name: array})
        refuse(gemma, match)
    np.savez(file, **{k: v for k, v in good.items() if k != "b_dec"})
    refuse(gemma, "b_dec is missing")
    np.savez(file, **{**good, "b_dec": np.array([{"a": 1}], dtype=object)})
    refuse(gemma, "Python objects")
    np.savez(file, **good, pre_bias=good["b_dec"])
    refuse(gemma, "array pre_bias belongs to no SAE")
    np.savez_compressed(file, **{**good, "scaling_factor": np.ones(M)})
    agrees(load(gemma).sae, *jumprelu(arrays()))


def test_arrays_out_of_proportion_to_their_file_are_not_unpacked(gemma, monkeypatch):
    monkeypatch.setattr("wsae.core.tensors.PLAIN_UNPACKED", 2**20)
    np.savez_compressed(gemma / "params.npz", W_enc=np.zeros((2**9, 2**10), np.float32))
    refuse(gemma, "unpacks to")


def test_llama_scope(tmp_path):
    """Weights are for s x; the threshold of the file is in units of x."""
    w, norm, level = arrays(), 3.7, 0.4
    config = {"d_model": D, "d_sae": M, "act_fn": "jumprelu", "jump_relu_threshold": level}
    config |= {"norm_activation": "dataset-wise", "hook_point_in": "blocks.15.hook_resid_post"}
    config |= {
        "dataset_average_activation_norm": {"in": norm, "out": norm},
        "use_decoder_bias": True,
    }
    (tmp_path / "checkpoints").mkdir()
    save_file(
        {
            "encoder.weight": w["W_enc"].T.contiguous(),
            "decoder.weight": w["W_dec"].T.contiguous(),
            "encoder.bias": w["b_enc"],
            "decoder.bias": w["b_dec"],
        },
        tmp_path / "checkpoints/final.safetensors",
    )
    (tmp_path / "hyperparams.json").write_text(json.dumps(config))
    scale = D**0.5 / norm
    pre = (X * scale) @ w["W_enc"] + w["b_enc"]
    z = pre * (pre > level * scale)
    found = load(tmp_path)
    assert found.about.hook == "blocks.15.hook_resid_post"
    agrees(found.sae, z, (z @ w["W_dec"] + w["b_dec"]) / scale)
    agrees(
        load(tmp_path / "checkpoints/final.safetensors").sae,
        z,
        (z @ w["W_dec"] + w["b_dec"]) / scale,
    )
    for changes, match in (
        ({"act_fn": "topk"}, "act_fn = 'topk'.*SAELens"),
        ({"norm_activation": "token-wise"}, "norm_activation"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"dataset_average_activation_norm": {"in": 0}}, "in = 0"),
        ({"dataset_average_activation_norm": [1]}, "is not a positive number"),
        ({"jump_relu_threshold": None}, "jump_relu_threshold = None"),
        ({"d_model": "6"}, "d_model = '6'"),
        ({"hook_point_out": "blocks.16.hook_mlp_out"}, "transcoder"),
        ({"sparsity_include_decoder_norm": 1}, "sparsity_include_decoder_norm"),
    ):
        (tmp_path / "hyperparams.json").write_text(json.dumps(config | changes))
        refuse(tmp_path, match)
    normed = config | {"sparsity_include_decoder_norm": True}
    (tmp_path / "hyperparams.json").write_text(json.dumps(normed))
    z = pre * (pre * w["W_dec"].norm(dim=1) > level * scale)
    found = load(tmp_path)
    agrees(found.sae, z, (z @ w["W_dec"] + w["b_dec"]) / scale)
    assert "decoder norms" in found.about.notes[0]


def turned(w: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """Return the arrays as linear layers keep them, under other names."""
    return dict(zip(names, (w["W_enc"].T, w["W_dec"].T, w["b_enc"], w["b_dec"]), strict=True))


def test_qwen_scope(tmp_path):
    w, k = arrays(), 3
    folder = tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{k}"
    folder.mkdir()
    torch.save(turned(w, "W_enc", "W_dec", "b_enc", "b_dec"), folder / "layer7.sae.pt")
    pre = X @ w["W_enc"] + w["b_enc"]
    values, index = pre.topk(k)
    z = torch.zeros_like(pre).scatter(1, index, values.relu())
    found = load(folder / "layer7.sae.pt")
    agrees(found.sae, z, z @ w["W_dec"] + w["b_dec"])
    assert (found.about.model, found.about.hook) == (
        "Qwen/Qwen3-1.7B-Base",
        "blocks.7.hook_resid_post",
    )
    agrees(load(folder).sae, z, z @ w["W_dec"] + w["b_dec"])
    (folder / "layer8.sae.pt").write_bytes(b"")
    refuse(folder, "there is one in .*layer7.sae.pt")  # a folder may hold every layer
    (folder / "layer7.sae.pt").rename(tmp_path / "layer7.sae.pt")
    refuse(tmp_path / "layer7.sae.pt", "W32K-L0_50")


def test_openais_relu_saes_are_read_and_those_that_normalise_tokens_are_not(tmp_path):
    w, file = arrays(), tmp_path / "autoencoder.pt"
    state = turned(w, "encoder.weight", "decoder.weight", "latent_bias", "pre_bias")
    state["stats_last_nonzero"] = torch.zeros(M, dtype=torch.int64)
    torch.save({**state, "activation": "ReLU", "activation_state_dict": {}}, file)
    z = torch.relu((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"])
    for place in (file, tmp_path):  # the only one of its folder
        agrees(load(place).sae, z, z @ w["W_dec"] + w["b_dec"])
    torch.save({**state, "activation": "TopK", "activation_state_dict": {"k": 4}}, file)
    refuse(file, "own norm")
    torch.save({**state, "activation": "Identity"}, file)
    refuse(file, "activation 'Identity'")


def test_goodfires_file_and_files_that_say_too_little(tmp_path):
    w, file = arrays(), tmp_path / "sae.pth"
    sides = [f"{side}_linear" for side in ("encoder", "decoder")]
    names = [f"{side}.{what}" for what in ("weight", "bias") for side in sides]
    torch.save(turned(w, *names), file)
    z = torch.relu(X @ w["W_enc"] + w["b_enc"])
    agrees(load(file).sae, z, z @ w["W_dec"] + w["b_dec"])
    torch.save(turned(w, *(name.replace("_linear", "") for name in names)), file)
    refuse(file, "of no SAE this knows.*SAELens")
    torch.save([torch.ones(3)], file)
    refuse(file, "not a state dict")
