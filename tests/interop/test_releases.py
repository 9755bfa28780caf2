"""Published SAEs by name, from folders in the layout of their releases: what their arrays mean, or refused by name.

What SAELens makes of the same folders is compared in test_interop_real.py.
"""

import importlib.util
import json
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from wsae import SAE, UserError
from wsae.cli.main import main
from wsae.interop.releases import Registry, _split, along, expanded, registry
from wsae.interop.saes import open_run

D, M = 16, 64
Weights = dict[str, torch.Tensor]


def weights(unit: bool = True) -> Weights:
    generator = torch.Generator().manual_seed(5)
    shapes = {"W_enc": (D, M), "W_dec": (M, D), "b_enc": (M,), "b_dec": (D,), "threshold": (M,)}
    made = {name: torch.randn(*shape, generator=generator) for name, shape in shapes.items()}
    made["threshold"] = made["threshold"].abs()
    if unit:
        made["W_dec"] /= made["W_dec"].norm(dim=1, keepdim=True)
    return made


def linear(w: Weights) -> Weights:
    return {
        "encoder.weight": w["W_enc"].T.contiguous(),
        "decoder.weight": w["W_dec"].T.contiguous(),
        "encoder.bias": w["b_enc"],
        "decoder.bias": w["b_dec"],
    }


def native(place: Path, **config: object) -> None:
    """A folder of SAELens before version 6."""
    place.mkdir(parents=True)
    old = {"d_in": D, "d_sae": M, "dtype": "float32", "device": "cpu", "model_name": "gpt2-small"}
    old |= {"hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "prepend_bos": True}
    old |= {"hook_point_head_index": None, "context_size": 128, "apply_b_dec_to_input": True}
    (place / "cfg.json").write_text(json.dumps(old | config))
    w = weights()
    save_file(
        {k: w[k] for k in ("W_enc", "W_dec", "b_enc", "b_dec")}, place / "sae_weights.safetensors"
    )


def topk(place: Path) -> None:
    arguments = {"activation_fn_str": "topk", "activation_fn_kwargs": {"k": 7}}
    native(place, architecture="standard", normalize_activations="none", **arguments)


def scaled(place: Path) -> None:
    native(
        place, normalize_activations="expected_average_only_in", hook_point="blocks.3.hook_mlp_out"
    )


def gemma_2(place: Path, **changes: torch.Tensor) -> None:
    place.mkdir(parents=True)
    np.savez(place / "params.npz", **{k: v.numpy() for k, v in (weights() | changes).items()})


def embedding(place: Path) -> None:
    gemma_2(
        place, b_dec=torch.zeros(D)
    )  # SAELens leaves b_dec in the units of the unscaled embedding


def gemma_3(place: Path) -> None:
    place.mkdir(parents=True)
    small = {name.replace("W_", "w_"): tensor for name, tensor in weights().items()}
    save_file(small, place / "params.safetensors")


def gemma_3_config(place: Path) -> None:
    gemma_3(place)
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-pt", "l0": 60}
    config |= {"hf_hook_point_in": "model.layers.9.output", "width": M}
    (place / "config.json").write_text(json.dumps(config))


def llama(place: Path) -> None:
    norm = D**0.5 / 5.91907514450867  # of the registry's l15r_8x
    config = {"d_model": D, "d_sae": M, "act_fn": "jumprelu", "jump_relu_threshold": 0.3}
    config |= {"norm_activation": "dataset-wise", "hook_point_in": "blocks.15.hook_resid_post"}
    config |= {"dataset_average_activation_norm": {"in": norm, "out": norm}}
    config |= {"sparsity_include_decoder_norm": True, "use_decoder_bias": True}
    (place / "checkpoints").mkdir(parents=True)
    (place / "hyperparams.json").write_text(json.dumps(config))
    save_file(linear(weights()), place / "checkpoints/final.safetensors")


def llama_r1(place: Path) -> None:
    place.mkdir(parents=True)
    config = {
        "d_model": D,
        "expansion_factor": M // D,
        "hook_point_in": "blocks.15.hook_resid_post",
    }
    (place / "config.json").write_text(json.dumps(config))
    w = weights()
    save_file(
        linear(w) | {"log_jumprelu_threshold": w["threshold"].log()},
        place / "sae_weights.safetensors",
    )


def learned(place: Path, kind: str, state: Weights, **more: object) -> None:
    place.mkdir(parents=True)
    trainer = {"dict_class": kind, "activation_dim": D, "dict_size": M, "layer": 3}
    trainer |= {"lm_name": "EleutherAI/pythia-70m-deduped", "submodule_name": "resid_post_layer_3"}
    config = {"trainer": trainer | more, "buffer": {"ctx_len": 128}}
    (place / "config.json").write_text(json.dumps(config))
    torch.save(state, place / "ae.pt")


def dl_topk(place: Path) -> None:
    state = linear(weights())
    state["b_dec"] = state.pop("decoder.bias")
    learned(
        place,
        "AutoEncoderTopK",
        state | {"k": torch.tensor(6), "threshold": torch.tensor(0.4)},
        k=6,
    )


def dl_batch(place: Path) -> None:
    state = linear(weights())
    state["b_dec"] = state.pop("decoder.bias")
    learned(
        place, "BatchTopKSAE", state | {"k": torch.tensor(6), "threshold": torch.tensor(0.4)}, k=6
    )


def dl_matryoshka(place: Path) -> None:
    state = {k: v for k, v in weights().items() if k != "threshold"}
    state |= {
        "k": torch.tensor(6),
        "threshold": torch.tensor(0.4),
        "group_sizes": torch.tensor([10, 30]),
    }
    learned(place, "MatryoshkaBatchTopKSAE", state, k=6, group_sizes=[10, 30])


def dl_gated(place: Path) -> None:
    w, state = weights(), linear(weights())
    state["decoder_bias"], generator = state.pop("decoder.bias"), torch.Generator().manual_seed(6)
    del state["encoder.bias"]
    names = ("r_mag", "gate_bias", "mag_bias")
    state |= {name: torch.randn(w["b_enc"].shape, generator=generator) * 0.5 for name in names}
    learned(place, "GatedAutoEncoder", state)


def dl_relu(place: Path) -> None:
    state = linear(weights())
    state["bias"] = state.pop("decoder.bias")
    learned(place, "AutoEncoder", state)


def qwen(place: Path) -> None:
    w = weights(unit=False)
    state = {"W_enc": w["W_enc"].T.contiguous(), "W_dec": w["W_dec"].T.contiguous()}
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state | {"b_enc": w["b_enc"], "b_dec": w["b_dec"]}, place)


def goodfire(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k.replace(".", "_linear."): v for k, v in linear(weights()).items()}, place)


def deepseek(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save(linear(weights()), place)


def kissane(place: Path) -> None:
    place.parent.mkdir(parents=True, exist_ok=True)
    torch.save({k: v for k, v in weights().items() if k != "threshold"}, place)
    config = {"act_size": D, "dict_size": M, "act_name": "blocks.5.attn.hook_z"}
    place.with_name(f"{place.stem}_cfg.json").write_text(json.dumps(config))


def gemma_3_affine(place: Path) -> None:
    gemma_3(place)
    small = {name.replace("W_", "w_"): tensor for name, tensor in weights().items()}
    affine = torch.randn(D, D, generator=torch.Generator().manual_seed(7))
    save_file(small | {"affine_skip_connection": affine}, place / "params.safetensors")
    at = "model.layers.9."
    config = {"architecture": "jump_relu", "model_name": "gemma-v3-4b-pt"}
    config |= {"hf_hook_point_in": at + "pre_feedforward_layernorm.output"}
    config |= {"hf_hook_point_out": at + "post_feedforward_layernorm.output"}
    (place / "config.json").write_text(json.dumps(config | {"affine_connection": True}))


def qwen_transcoder(place: Path) -> None:
    """As circuit-tracer's sets, with the config of their training beside it."""
    place.parent.mkdir(parents=True, exist_ok=True)
    w = weights()
    save_file(
        {"W_enc": w["W_enc"].T.contiguous(), **{k: w[k] for k in ("W_dec", "b_enc", "b_dec")}},
        place,
    )
    hooks = "feature_input_hook: mlp.hook_in\nfeature_output_hook: hook_mlp_out\n"
    said = f"model_name: Qwen/Qwen3-4B\nmodel_kind: transcoder_set\n{hooks}"
    place.with_name("config.yaml").write_text(said)
    trained = "".join(
        f"{key}:\n  value: {value}\n"
        for key, value in (("d_model", D), ("d_feature", M), ("batch_size", 8))
    )
    place.with_name("wandb-config.yaml").write_text(trained)


RELEASES: dict[str, Callable[[Path], None]] = {
    "gpt2-small-res-jb:blocks.8.hook_resid_pre": native,
    "pythia-70m-deduped-res-sm:blocks.3.hook_resid_post": topk,
    "gpt2-small-mlp-tm:blocks.3.hook_mlp_out": scaled,
    "gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical": gemma_2,
    "gemma-scope-9b-it-res:layer_20/width_16k/average_l0_47": gemma_2,
    "gemma-scope-2b-pt-att:layer_3/width_16k/average_l0_24": gemma_2,
    "gemma-scope-2b-pt-res:embedding/width_4k/average_l0_6": embedding,
    "gemma-scope-2-270m-pt-res:layer_12_width_16k_l0_big": gemma_3,
    "gemma-scope-2-4b-pt-res:layer_9_width_16k_l0_big": gemma_3_config,
    "llama_scope_lxr_8x:l15r_8x": llama,
    "llama_scope_r1_distill:l15r_800m_slimpajama": llama_r1,
    "sae_bench_pythia70m_sweep_topk_ctx128_0730:blocks.3.hook_resid_post__trainer_0": dl_topk,
    "llama-3.1-8b-instruct-andyrdt:resid_post_layer_3_trainer_1": dl_batch,
    "saebench_gemma-2-2b_width-2pow12_date-0108:blocks.12.hook_resid_post__trainer_0": dl_matryoshka,
    "sae_bench_pythia70m_sweep_gated_ctx128_0730:blocks.3.hook_resid_post__trainer_0": dl_gated,
    "sae_bench_pythia70m_sweep_panneal_ctx128_0730:blocks.3.hook_resid_post__trainer_16": dl_relu,
    "qwen-scope-3-1.7b-base-w32k-l50:layer7": qwen,
    "goodfire-llama-3.1-8b-instruct:layer_19": goodfire,
    "deepseek-r1-distill-llama-8b-qresearch:blocks.19.hook_resid_post": deepseek,
    "gpt2-small-hook-z-kk:blocks.5.hook_z": kissane,
    "gemma-scope-2b-pt-transcoders:layer_3/width_16k/average_l0_54": gemma_2,
    "gemma-scope-2-4b-pt-transcoders:transcoder/layer_9_width_16k_l0_big_affine": gemma_3_affine,
    "mwhanna-qwen3-4b-transcoders:layer_5": qwen_transcoder,
}


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    return empty_cache(tmp_path, monkeypatch)


def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the hub library's cache, empty, without a network behind it."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "hub"


def publish(cache: Path, target: str) -> Path:
    """Put a release's files into the cache as a download leaves them; returns the SAE's folder or file."""
    release, _, sae_id = target.partition(":")
    found = registry().release(release)[sae_id]
    repo = cache / f"models--{found.repo.replace('/', '--')}"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("0" * 40)
    place = repo / "snapshots" / ("0" * 40) / found.path
    RELEASES[target](place)
    return place


def rows() -> torch.Tensor:
    return torch.randn(64, D, generator=torch.Generator().manual_seed(1)) * 2 + 0.5


def test_patterns_stand_for_ids_and_paths():
    assert expanded("l{0..2,5}/{a,b}") == [f"l{i}/{x}" for i in (0, 1, 2, 5) for x in "ab"]
    assert along("p{1}_{7,8,9,10}", "{0..1}x{a,b}") == ["p0_7", "p0_8", "p1_9", "p1_10"]
    assert along("{2}/{1}", "{0..1}{a,b}") == ["a/0", "b/0", "a/1", "b/1"]


def test_the_table_says_what_saelens_registry_says():
    """All that can be opened here is in it: the same ids, repositories, paths, loaders and scales."""
    table = Registry("wsae", _split((files("wsae.interop") / "releases.yaml").read_text()))
    assert len(table.texts) == 167
    if importlib.util.find_spec("sae_lens") is None:
        assert registry() == table
        return
    theirs = registry()
    assert theirs.whose.startswith("sae-lens ")
    for name in theirs.texts:
        saes = theirs.release(name)
        if all(one.refusal for one in saes.values()):
            assert name not in table.texts
            continue
        if next(iter(saes.values())).loader == "llama_scope":  # its files say the scale
            saes = {sae_id: one._replace(scale=None) for sae_id, one in saes.items()}
        assert table.release(name) == saes


FORMULAS = {
    "gpt2-small-res-jb:blocks.8.hook_resid_pre": ("relu", True, None),
    "pythia-70m-deduped-res-sm:blocks.3.hook_resid_post": (7, True, None),
    "gpt2-small-mlp-tm:blocks.3.hook_mlp_out": ("relu", True, None),
    "gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical": ("jump", False, None),
    "llama_scope_r1_distill:l15r_800m_slimpajama": ("jump", False, None),
    "qwen-scope-3-1.7b-base-w32k-l50:layer7": (50, False, None),
    "deepseek-r1-distill-llama-8b-qresearch:blocks.19.hook_resid_post": ("relu", False, None),
    "gpt2-small-hook-z-kk:blocks.5.hook_z": ("relu", True, None),
    "gemma-scope-2b-pt-transcoders:layer_3/width_16k/average_l0_54": ("jump", False, None),
    "mwhanna-qwen3-4b-transcoders:layer_5": ("relu", False, None),
}
"""Release -> its activation, whether b_dec is subtracted from the input, and what the input is multiplied by."""


@pytest.mark.parametrize("target", FORMULAS)
def test_a_release_is_what_its_formula_says(target, cache):
    publish(cache, target)
    (kind, centred, _), w = FORMULAS[target], weights(unit="qwen-scope" not in target)
    scale = registry().release(target.partition(":")[0])[target.partition(":")[2]].scale or 1.0
    x = rows() * scale
    pre = (x - w["b_dec"] if centred else x) @ w["W_enc"] + w["b_enc"]
    z = pre.relu()
    if kind == "jump":
        z = z * (pre > w["threshold"])
    elif isinstance(kind, int):
        values, index = pre.topk(kind)
        z = torch.zeros_like(pre).scatter(1, index, values.relu())
    sae = SAE.from_pretrained(*target.split(":"))
    with torch.no_grad():
        torch.testing.assert_close(sae.encode(rows()), z, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(
            sae(rows()), (z @ w["W_dec"] + w["b_dec"]) / scale, atol=1e-4, rtol=1e-5
        )


def test_a_release_is_imported_and_opened_by_its_name(cache, tmp_path, capsys):
    target = "gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical"
    publish(cache, target)
    assert main(["import", target, "--out", str(tmp_path / "mine"), "--json"]) == 0
    about = json.loads(capsys.readouterr().out)["provenance"]
    assert (about["model"], about["hook"]) == ("google/gemma-2-2b", "blocks.12.hook_resid_post")
    assert about["origin"]["release"] == "gemma-scope-2b-pt-res-canonical"
    run = open_run(target)
    assert run.members == {"blocks.12.hook_resid_post": ["sae"]}
    assert open_run(target).path == run.path
    of_repository = SAE.from_pretrained(
        "google/gemma-scope-2b-pt-res", "layer_12/width_16k/average_l0_82"
    )
    assert torch.equal(of_repository.W_dec, run.saes["blocks.12.hook_resid_post"]["sae"].W_dec)
    assert main(["export", target, "--out", str(tmp_path / "out"), "--json"]) == 0
    capsys.readouterr()


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("gemma-scop-2b-pt-res:x", "nearest: gemma-scope-2b-pt-res"),
        ("gpt2-small-res-jb:blocks.8.hook_resid_pr", "nearest: blocks.8.hook_resid_pre"),
        ("gpt2-small-res-jb:blocks.7.hook_resid_pre", "not in the cache"),
        ("pythia-70m-deduped-res-sm:blocks.3.hook_resid_post", "sae_weights.safetensors"),
        ("gpt2-small-resid-post-v5-32k:blocks.11.hook_resid_post", "covariance_whitening"),
    ],
)
def test_what_cannot_be_opened_is_one_line(target, says, cache, tmp_path, capsys):
    if "pythia" in target:
        weights = publish(cache, target) / "sae_weights.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
    if "v5-32k" in target:
        RELEASES[target] = lambda place: native(place, normalize_activations="covariance_whitening")
        publish(cache, target)
    for words in (["import", target, "--out", str(tmp_path / "out")], ["report", target]):
        assert main(words) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1, error
        assert says in error
    assert not (tmp_path / "out").exists()


def test_a_registry_of_another_form_is_one_line():
    other = Registry("sae-lens 99", _split("first:\n  saes:\n  - id: a\nsecond:\n  models: []\n"))
    assert list(other.texts) == ["first", "second"]
    with pytest.raises(UserError, match="sae-lens 99's registry is of a form"):
        other.release("first")


def test_releases_are_listed_by_model(capsys):
    assert main(["releases", "--model", "gemma-2-2b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["releases"]
    assert {one["model"] for one in found} == {"google/gemma-2-2b"}
    assert main(["releases", "llama_scope_lxr_8x", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)["releases"]
    assert [sae["id"] for sae in one["saes"]] == [f"l{layer}r_8x" for layer in range(32)]
    assert main(["releases", "--model", "nobody"]) == 2
    assert "nobody" in capsys.readouterr().err
