"""Ours -> another tool's folder -> ours: the same bits; what has no equal is refused; files run no code."""

import json
import pickle
import shutil
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from wsae import SAE, UserError
from wsae.core.torchfile import load_state, save_state
from wsae.interop import Provenance, load, save
from wsae.interop.format import NamedTensors, assemble, centred, uncentred, unit_rows
from wsae.interop.saebench import SAEBenchSAE
from wsae.sae import SAEConfig, make_activation

EQUALS = {
    "saelens": ("topk", "batch_topk", "relu", "jumprelu"),
    "sparsify": ("topk", "group_topk"),
    "dictionary_learning": ("topk", "batch_topk", "relu", "jumprelu"),
}
PAIRS = [(name, kind) for name, kinds in EQUALS.items() for kind in kinds]
KINDS = ("topk", "group_topk", "batch_topk", "relu", "jumprelu")


def make(kind: str, d_in: int = 5, groups: int = 3, k: int = 2, tied: bool = False, seed: int = 0):
    """An SAE with every number set at random: norms, biases, thresholds, gamma."""
    activation = make_activation(kind, k)
    sae = SAE(SAEConfig(d_in=d_in, d_sae=k * groups, activation=activation, tied=tied))
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(t.shape, generator=generator).to(t.dtype)
        for name, t in sae.tensors().items()
    }
    tensors["gamma"] = tensors["gamma"].abs()
    tensors["threshold"] = torch.rand(sae.threshold.shape, generator=generator, dtype=torch.float64)
    if kind not in ("batch_topk", "jumprelu"):
        tensors["threshold"] *= 0
    if seed % 3 == 0:
        tensors["gamma"] = torch.rand(d_in, d_in, generator=generator)
    sae.set_tensors(tensors)
    return sae


def same_bits(a: SAE, b: SAE) -> bool:
    one, other = a.tensors(), b.tensors()
    return (
        a.cfg == b.cfg
        and one.keys() == other.keys()
        and all(
            one[n].dtype == other[n].dtype
            and one[n].contiguous().numpy().tobytes() == other[n].contiguous().numpy().tobytes()
            for n in one
        )
    )


@settings(max_examples=60)
@given(
    pair=st.sampled_from(PAIRS),
    d_in=st.integers(1, 6),
    groups=st.integers(1, 4),
    k=st.integers(1, 3),
    tied=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_there_and_back_again_to_the_bit(tmp_path_factory, pair, d_in, groups, k, tied, seed):
    name, kind = pair
    sae = make(kind, d_in, groups, k, tied, seed)
    folder = tmp_path_factory.mktemp("export")
    about = Provenance(model="m", hook="layers.3", gamma={"rule": "variance"}, tokens=7)
    loaded = load(save(sae, folder, name, about))
    assert same_bits(loaded.sae, sae)
    assert (loaded.about, loaded.format) == (about, name)


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_other_tools_files_alone_give_the_same_latents(tmp_path, name, kind, tied):
    sae = make(kind, d_in=6, groups=5, k=3, tied=tied, seed=1)
    folder = save(sae, tmp_path / "sae", name)
    for ours in ("manifest.json", "wsae.safetensors"):
        (folder / ours).unlink()
    alone = load(folder).sae
    assert torch.equal(alone.gamma, torch.ones(6))
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    scale = torch.ones(15)
    if name == "dictionary_learning" and kind == "relu":
        scale = sae.W_dec.detach().norm(dim=1)  # AutoEncoder.from_pretrained folds the norms
    with torch.no_grad():
        torch.testing.assert_close(alone.encode(x), sae.encode(x) * scale, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone(x), sae(x), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gated", "batch_topk", "matryoshka"])
def test_weights_in_half_precision_are_exported_as_they_are(tmp_path, kind, dtype):
    """The other tool's SAE in float32 has the latents of ours with the same weights in float32."""
    half = make(kind, d_in=6, groups=5, k=3, seed=1).to(dtype)
    sae = SAE(half.cfg)
    sae.set_tensors(half.tensors())
    folder = save(half, tmp_path / "sae", "saelens")
    x = torch.randn(400, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(load(folder).sae.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "kind"), [(n, k) for n in EQUALS for k in KINDS if k not in EQUALS[n]]
)
def test_kinds_without_an_equal_are_refused_before_anything_is_written(tmp_path, name, kind):
    with pytest.raises(UserError, match=f"activation {kind} has no equal") as caught:
        save(make(kind), tmp_path / "out", name)
    assert not (tmp_path / "out").exists()
    advised = str(caught.value).rpartition("--format ")[2].split(" or ")
    assert advised == [other for other in EQUALS if kind in EQUALS[other]]


def crosscoder(kind: str, widths: tuple[int, ...] = (3, 3)) -> SAE:
    """A crosscoder with every number set at random, its sources at scales of their own."""
    sae = make(kind, sum(widths), groups=5, k=3, seed=1)
    parts = [{"name": f"h{i}", "width": w, "scale": 2.0 + i} for i, w in enumerate(widths)]
    other = SAE(SAEConfig.parse({**sae.cfg.to_dict(), "sources": parts}))
    other.set_tensors(sae.tensors())
    return other


@pytest.mark.parametrize("kind", ["relu", "batch_topk"])
def test_crosscoders_go_there_and_back(tmp_path, kind):
    sae, about = crosscoder(kind), Provenance(model="m", hook="h0+h1")
    folder = save(sae, tmp_path / "sae", "crosscoder", about)
    loaded = load(folder)
    assert same_bits(loaded.sae, sae)
    assert (loaded.about, loaded.format) == (about, "crosscoder")
    for ours in ("manifest.json", "wsae.safetensors"):
        (folder / ours).unlink()
    alone = load(folder).sae
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        torch.testing.assert_close(alone.encode(x), sae.encode(x), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(alone(x), sae(x), atol=1e-5, rtol=1e-5)
        by_layer = load_file(folder / "model.safetensors")["decoder.weight"]
        for got, part in zip(by_layer, sae.split(sae.W_dec).values(), strict=True):
            assert torch.equal(got, part)


def test_what_no_crosscoder_there_is_like_is_refused(tmp_path):
    for sae, name in (
        (crosscoder("topk"), "crosscoder"),
        (crosscoder("relu", (2, 4)), "crosscoder"),
        (make("relu"), "crosscoder"),
        (crosscoder("relu"), "saelens"),
    ):
        with pytest.raises(UserError, match="no equal"):
            save(sae, tmp_path / "out", name)
    assert not (tmp_path / "out").exists()


def test_folding_is_algebra():
    """Of the three foldings, the equations they stand for, in fp64."""
    g = torch.Generator().manual_seed(0)
    weights = NamedTensors(
        *(torch.randn(s, generator=g) for s in ((4, 7), (7, 4), (7,), (4,), (7,)))
    )
    x = torch.randn(9, 4, generator=g)
    raw = x @ weights.W_enc + weights.b_enc
    moved = centred(weights)
    torch.testing.assert_close((x - moved.b_dec) @ moved.W_enc + moved.b_enc, raw)
    torch.testing.assert_close(uncentred(moved).b_enc, weights.b_enc)
    unit, norms = unit_rows(weights), weights.W_dec.norm(dim=1)
    torch.testing.assert_close(unit.W_dec.norm(dim=1), torch.ones(7))
    torch.testing.assert_close(x @ unit.W_enc + unit.b_enc, raw * norms)
    z = raw * (raw > weights.threshold)
    scaled = raw * norms * (raw * norms > unit.threshold)
    torch.testing.assert_close(scaled @ unit.W_dec, z @ weights.W_dec)


def test_thresholds_of_zero_and_below_act_as_zero_exactly():
    cfg = SAEConfig(d_in=1, d_sae=2, activation=make_activation("jumprelu"))
    ones, zeros = torch.ones(1, 2), torch.zeros(2)
    for low in (0.0, -1.0):
        weights = NamedTensors(ones, ones.T, zeros, zeros[:1], torch.tensor([low, 1e-3]))
        sae = assemble(cfg, weights)
        assert sae.encode(torch.tensor([[1e-20]])).tolist() == [[pytest.approx(1e-20), 0.0]]
        assert sae.encode(torch.tensor([[-0.5]])).tolist() == [[0.0, 0.0]]


def test_a_changed_export_is_found_out(tmp_path):
    folder = save(make("topk"), tmp_path / "sae", "saelens")
    for file in (p for p in sorted(folder.iterdir()) if p.name != ".lock"):
        content = file.read_bytes()
        flipped = bytearray(content)
        flipped[len(flipped) // 2] ^= 1
        file.write_bytes(bytes(flipped))
        with pytest.raises(UserError, match=file.name):
            load(folder)
        file.write_bytes(content)
    load(folder)


def test_what_saelens_and_dictionary_learning_are_told(tmp_path):
    about = Provenance(model="m", hook="h.3", context=64, prepend_bos=False, dataset="d", tokens=9)
    meta = json.loads(
        (save(make("topk"), tmp_path / "a", "saelens", about) / "cfg.json").read_text()
    )["metadata"]
    assert meta["hook_name"] == "blocks.3.hook_resid_post"
    assert (meta["hook_layer"], meta["model_name"], meta["context_size"]) == (3, "m", 64)
    assert (meta["prepend_bos"], meta["dataset_path"], meta["training_tokens"]) == (False, "d", 9)
    inside = Provenance(hook="layers.3.mlp")
    meta = json.loads(
        (save(make("topk"), tmp_path / "b", "saelens", inside) / "cfg.json").read_text()
    )["metadata"]
    assert (meta["hook_name"], meta["hook_layer"]) == ("layers.3.mlp", 3)
    folder = save(make("topk"), tmp_path / "c", "dictionary_learning", about)
    trainer = json.loads((folder / "config.json").read_text())["trainer"]
    assert (trainer["layer"], trainer["lm_name"], trainer["k"]) == (3, "m", 2)


class Hostile:
    """Runs a command when it is unpickled by a reader that lets it."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return (exec, (f"open({str(self.mark)!r}, 'w').close()",))


def refused(path: Path, match: str) -> None:
    with pytest.raises(UserError, match=match) as caught:
        load_state(path)
    assert "\n" not in str(caught.value)


def test_no_code_runs_from_a_torch_file(tmp_path):
    mark, path = tmp_path / "mark", tmp_path / "ae.pt"
    torch.save({"b_dec": Hostile(mark)}, path)
    refused(path, "not a state dict of tensors")
    path.write_bytes(pickle.dumps(Hostile(mark)))
    refused(path, "not a zip")
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists()  # a reader that lets it would have made it


def test_torch_files_hold_plain_tensors_that_fit_into_them(tmp_path):
    path = tmp_path / "ae.pt"
    cases = {
        "holds a Tensor": torch.zeros(3),
        "b_dec is a list": {"b_dec": [torch.zeros(3)]},
        "not a name": {3: torch.zeros(3)},
        "fits into this file": {"b_dec": torch.zeros(1).expand(10**12)},
        "dense tensor": {"b_dec": torch.eye(3).to_sparse()},
    }
    for match, value in cases.items():
        torch.save(value, path)
        refused(path, match)
    torch.save({"b_dec": torch.zeros(8), "k": 3}, path)
    assert load_state(path)["k"] == 3
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    refused(path, "compressed")
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content + b"\0" * (2 << 20) * name.endswith(".pkl"))
    refused(path, "a pickle of")


def test_a_torch_file_is_a_zip_from_its_first_byte(tmp_path):
    """torch.load takes anything else for its old format: a bare pickle, past every check of the zip behind it."""
    path = tmp_path / "ae.pt"
    save_state(path, {"b_dec": torch.ones(2)})
    whole = path.read_bytes()
    torch.save({"b_dec": torch.zeros(2)}, path, _use_new_zipfile_serialization=False)
    path.write_bytes(path.read_bytes() + whole)
    assert zipfile.is_zipfile(path)
    assert torch.load(path, weights_only=True)["b_dec"].sum() == 0
    refused(path, "does not begin with an entry")


def test_damaged_torch_files_are_refused_or_read_as_they_are(tmp_path):
    """Every byte flipped: one line, or a state dict; never another exception."""
    path = tmp_path / "ae.pt"
    save_state(path, {"b_dec": torch.ones(2)})
    content = path.read_bytes()
    outcomes = {"refused": 0, "read": 0}
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x55]) + content[place + 1 :])
        try:
            load_state(path)
            outcomes["read"] += 1
        except UserError:
            outcomes["refused"] += 1
    assert outcomes["refused"] > 50


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [False, True])
def test_the_object_for_saebench(kind, tied):
    sae = make(kind, d_in=6, groups=5, k=3, tied=tied, seed=1)
    bench = SAEBenchSAE(sae, Provenance(model="m", hook="layers.3", context=64), prepend_bos=True)
    x = torch.randn(4, 7, 6, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        z = bench.encode(x)
        flat = sae(x.reshape(-1, 6)).reshape(x.shape)
    torch.testing.assert_close(bench(x), flat, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(bench.encode(x[0]), z[0])
    torch.testing.assert_close(bench.decode(z), bench(x))
    assert torch.equal(z != 0, sae.encode(x.reshape(-1, 6)).reshape(z.shape) != 0)
    torch.testing.assert_close(bench.W_dec.norm(dim=1), torch.ones(15), atol=1e-5, rtol=0)
    assert (bench.W_enc.shape, bench.b_enc.shape, bench.b_dec.shape) == ((6, 15), (15,), (6,))
    assert bench.cfg.hook_name == "blocks.3.hook_resid_post"
    assert json.loads(json.dumps(bench.cfg.to_dict()))["prepend_bos"] is True
    half = bench.to(dtype=torch.bfloat16)
    assert (half.dtype, half.cfg.dtype) == (torch.bfloat16, "bfloat16")
    assert half.encode(x).dtype == torch.bfloat16
    assert sae.W_dec.dtype == torch.float32  # the SAE given is not touched


def test_files_of_an_export_are_those_upstream_reads(tmp_path):
    names = {
        "saelens": {"W_enc", "b_enc", "W_dec", "b_dec"},
        "sparsify": {"encoder.weight", "encoder.bias", "W_dec", "b_dec"},
    }
    for name, wanted in names.items():
        folder = save(make("topk"), tmp_path / name, name)
        weights = next(p for p in folder.glob("sae*.safetensors"))
        assert set(load_file(weights)) == wanted
        shutil.rmtree(folder)


@pytest.mark.parametrize("kind", ["multi_topk", "matryoshka", "gated"])
def test_kinds_that_other_tools_do_not_know_are_written_in_their_plain_form(tmp_path, kind):
    sae, x = make(kind), torch.randn(40, 5, generator=torch.Generator().manual_seed(1))
    back = load(save(sae, tmp_path / "sae", "saelens")).sae
    assert back.cfg.activation.kind == sae.plain().cfg.activation.kind
    torch.testing.assert_close(back.encode(x), sae.encode(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(back(x), sae(x), rtol=1e-5, atol=1e-5)
