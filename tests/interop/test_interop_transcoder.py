"""Transcoders to other tools' files and back: to the bit with our own beside them, and by the tools' equations."""

import itertools
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from wsae.core.errors import UserError
from wsae.interop import Provenance, load, save
from wsae.interop.circuit_tracer import save_set
from wsae.sae import SAE, SAEConfig
from wsae.sae.config import make_activation

D, M, K = 6, 20, 4
X = torch.randn(48, D, generator=torch.Generator().manual_seed(0)) + 1
ABOUT = Provenance(model="tiny", hook="layers.0.mlp.input", hook_out="layers.0.mlp")
KINDS = {
    "saelens": ("relu", "jumprelu", "batch_topk"),
    "sparsify": ("topk", "group_topk"),
    "circuit_tracer": ("relu", "jumprelu", "batch_topk", "topk"),
}
CASES = [(f, k, s) for f, ks in KINDS.items() for k, s in itertools.product(ks, (False, True))]


def make(kind: str, skip: bool, d_out: int = D, seed: int = 0) -> SAE:
    g = torch.Generator().manual_seed(seed)
    sae = SAE(
        SAEConfig(d_in=D, d_sae=M, activation=make_activation(kind, K), d_out=d_out, skip=skip)
    )
    for parameter in sae.parameters():
        parameter.data.add_(torch.randn(parameter.shape, generator=g), alpha=0.3)
    if kind == "jumprelu":
        sae.threshold.data.abs_()
    else:
        sae.threshold.fill_(0.4 if kind == "batch_topk" else 0.0)
    sae.set_gamma(torch.rand(d_out, generator=g) + 0.5)
    return sae.requires_grad_(False)


@pytest.mark.parametrize(("name", "kind", "skip"), CASES)
def test_a_transcoder_comes_back(tmp_path: Path, name: str, kind: str, skip: bool) -> None:
    sae = make(kind, skip)
    folder = save(sae, tmp_path / "it", name, ABOUT)
    back = load(folder)
    for key, tensor in sae.tensors().items():
        assert torch.equal(back.sae.tensors()[key], tensor), key
    assert (back.sae.cfg, back.about) == (sae.cfg, ABOUT)
    for own in ("manifest.json", "wsae.safetensors"):
        (folder / own).unlink()
    alone = load(folder)
    torch.testing.assert_close(alone.sae(X), sae(X), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(alone.sae.encode(X), sae.encode(X), rtol=1e-5, atol=1e-5)
    if name != "sparsify":  # its folders say nothing of hooks
        out = "layers.0.mlp" if name == "saelens" else "blocks.0.hook_mlp_out"
        assert alone.about.hook_out == out  # of models with a norm behind the MLP they differ
        assert alone.about.hook == "blocks.0.mlp.hook_in"


def theirs(folder: Path, x: Tensor, kind: str) -> Tensor:
    """circuit-tracer's SingleLayerTranscoder, in its own words."""
    w = load_file(folder / "layer_0.safetensors")
    acts = torch.nn.functional.linear(x, w["W_enc"], w["b_enc"])
    if kind == "topk":
        values, index = acts.topk(yaml.safe_load((folder / "config.yaml").read_text())["k"])
        acts = torch.zeros_like(acts).scatter(1, index, values.relu())
    elif "activation_function.threshold" in w:
        acts = acts * (acts > w["activation_function.threshold"])
    else:
        acts = acts.relu()
    y = acts @ w["W_dec"] + w["b_dec"]
    return y + x @ w["W_skip"].T if "W_skip" in w else y


@pytest.mark.parametrize("kind", KINDS["circuit_tracer"])
def test_circuit_tracers_equations_give_our_output(tmp_path: Path, kind: str) -> None:
    sae = make(kind, skip=True)
    folder = save(sae, tmp_path / "it", "circuit_tracer", ABOUT)
    torch.testing.assert_close(theirs(folder, X, kind), sae(X), rtol=1e-5, atol=1e-5)
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert (config["model_kind"], config["model_name"]) == ("transcoder_set", "tiny")
    hooks = (config["feature_input_hook"], config["feature_output_hook"])
    assert hooks == ("mlp.hook_in", "hook_mlp_out")


def test_a_models_layers_are_one_folder_of_which_each_is_read_by_its_file(tmp_path: Path) -> None:
    saes = {f"layers.{i}.mlp.input": make("relu", True, seed=i) for i in range(3)}
    about = {h: ABOUT.model_copy(update={"hook": h, "hook_out": h[:-6]}) for h in saes}
    assert save_set(saes, about, tmp_path / "set") == [0, 1, 2]
    for i, sae in enumerate(saes.values()):
        found = load(tmp_path / "set" / f"layer_{i}.safetensors")
        torch.testing.assert_close(found.sae(X), sae(X), rtol=1e-6, atol=1e-6)
        assert found.about.hook == f"blocks.{i}.mlp.hook_in"
    with pytest.raises(UserError, match="holds 3 transcoders; name the file of one"):
        load(tmp_path / "set")
    other = {**saes, "layers.3.mlp.input": make("topk", True)}
    about["layers.3.mlp.input"] = about["layers.2.mlp.input"]
    with pytest.raises(UserError, match="a second transcoder of layer 2|another kind"):
        save_set(other, about, tmp_path / "mixed")
    assert not (tmp_path / "mixed").exists()


@pytest.mark.parametrize("kind", ["gated", "multi_topk", "matryoshka"])
def test_a_set_takes_the_kinds_that_one_layer_takes(tmp_path: Path, kind: str) -> None:
    sae = make(kind, skip=True)
    save_set({"layers.0.mlp.input": sae}, {"layers.0.mlp.input": ABOUT}, tmp_path / "set")
    for place in ("set", "set/layer_0.safetensors"):
        found = load(tmp_path / place)
        torch.testing.assert_close(found.sae.encode(X), sae.encode(X), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found.sae(X), sae(X), rtol=1e-5, atol=1e-5)


def test_a_decoder_of_no_dimension_is_refused(tmp_path: Path) -> None:
    folder = save(make("relu", True), tmp_path / "it", "saelens", ABOUT)
    (folder / "manifest.json").unlink()
    file = folder / "sae_weights.safetensors"
    save_file({**load_file(file), "W_dec": torch.tensor(1.0)}, file)
    with pytest.raises(UserError, match=r"the decoder is \(\), not a matrix"):
        load(folder)


@pytest.mark.parametrize(
    ("name", "kind", "d_out", "message"),
    [
        ("saelens", "topk", D, "a transcoder of topk has no equal in SAELens"),
        (
            "sparsify",
            "topk",
            D + 1,
            "in sparsify, whose transcoders give as many .*; no format has",
        ),
        ("dictionary_learning", "topk", D, "a transcoder has no equal in dictionary_learning"),
        ("circuit_tracer", "group_topk", D, "group_topk has no equal in circuit-tracer"),
        ("circuit_tracer", "relu", D + 1, "between other widths has no equal"),
    ],
)
def test_what_a_tool_does_not_have_is_refused_by_name(tmp_path, name, kind, d_out, message) -> None:
    with pytest.raises(UserError, match=message):
        save(make(kind, False, d_out), tmp_path / "it", name, ABOUT)
    assert not (tmp_path / "it").exists()
