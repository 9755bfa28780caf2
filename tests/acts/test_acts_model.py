"""Hook names, capture against the full forward, splicing, the probe, packing and the keep mask."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from acts_models import (
    LAYERS,
    WIDTH,
    config,
    hooks_of,
    make_model,
    make_text,
    make_tokenizer,
    some_ids,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from wsae.acts.capture import Capture, splice, token_positions, tokens
from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.flow import REASONS, SkipRule, count_reasons
from wsae.acts.hooknames import HookPlace, among, canonical_names, hook_name, match
from wsae.acts.hookpoints import HookPoint, probe, taken
from wsae.acts.language import load_language
from wsae.acts.text import REFUSED, Packer, Position, documents
from wsae.acts.tokens import decode_table
from wsae.core.errors import UserError


@pytest.fixture(scope="module", params=["llama", "neox"])
def language(request, tmp_path_factory):
    return load_language(str(make_model(tmp_path_factory.mktemp(request.param), request.param)))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(make_text(tmp_path_factory.mktemp("text") / "a.jsonl"))


# ---- hook points


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
    assert match("layers.*", paths) == [HookPlace(f"model.layers.{i}") for i in range(12)]
    assert match("layers.1*.mlp", paths) == [
        HookPlace(f"model.layers.{i}.mlp") for i in (1, 10, 11)
    ]
    assert (
        match("model.layers.9", paths) == match("layers.9", paths) == [HookPlace("model.layers.9")]
    )
    assert match("9.mlp", paths) == [HookPlace("model.layers.9.mlp")]


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
        with splice(language.model, "layers.1", lambda x, _: x):
            same = language.model(input_ids=ids).logits
        with splice(language.model, "layers.1", lambda x, _: torch.zeros_like(x)):
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
        with splice(model, f"layers.{LAYERS - 1}", lambda _x, _c: new):
            got = model(input_ids=some_ids()).logits
        torch.testing.assert_close(got, model.get_output_embeddings()(norm(new)))


def test_splice_refuses_an_ambiguous_name(language):
    with (
        pytest.raises(UserError, match="names 3 modules"),
        splice(language.model, "layers.*", lambda x, _: x),
    ):
        pass


# ---- the probe: order, dependence on tokens, repeatability, length


SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
USUAL = {**SMALL, "intermediate_size": 32}
GROUPED = {**USUAL, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
MODELS = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "gemma2": lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**HEADS)),
    "qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**HEADS)),
    "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)),
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ),
    "gpt_neo": lambda t: t.GPTNeoForCausalLM(
        t.GPTNeoConfig(
            vocab_size=64,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=16,
            window_size=4,
        )
    ),
    "gptj": lambda t: t.GPTJForCausalLM(
        t.GPTJConfig(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    ),
    "neox": lambda t: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**USUAL)),
    "opt": lambda t: t.OPTForCausalLM(
        t.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=16)
    ),
    "bloom": lambda t: t.BloomForCausalLM(
        t.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    ),
    "falcon": lambda t: t.FalconForCausalLM(t.FalconConfig(**SMALL)),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**USUAL, max_position_embeddings=16)),
    "roberta": lambda t: t.RobertaForMaskedLM(t.RobertaConfig(**USUAL, max_position_embeddings=18)),
    "xlnet": lambda t: t.XLNetLMHeadModel(
        t.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32)
    ),
    "mamba": lambda t: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "reformer": lambda t: t.ReformerModelWithLMHead(
        t.ReformerConfig(
            vocab_size=64,
            is_decoder=True,
            hidden_size=16,
            attention_head_size=8,
            num_attention_heads=2,
            feed_forward_size=32,
            attn_layers=["local", "lsh"],
            axial_pos_shape=(8, 8),
            axial_pos_embds_dim=(8, 8),
            local_attn_chunk_length=8,
            lsh_attn_chunk_length=8,
            num_buckets=4,
        )
    ),
    "gemma3": lambda t: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            text_config=HEADS,
            vision_config={
                **{key: n for key, n in USUAL.items() if key != "vocab_size"},
                **{"num_hidden_layers": 3, "image_size": 28, "patch_size": 14},
            },
            mm_tokens_per_image=4,
        )
    ),
}


@functools.cache
def tiny(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[kind](transformers).eval().requires_grad_(False)


def hook_of(kind: str, pattern: str, seq_len: int | None = 12) -> HookPoint:
    (hook,) = probe(tiny(kind), [pattern], tokens(seq_len)).hooks
    return hook


def few_ids(batch=4, seq=9):
    return torch.randint(6, 60, (batch, seq), generator=torch.Generator().manual_seed(0))


BLOCKS = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "bloom", "falcon"), "h.0"),
    **dict.fromkeys(("bert", "roberta", "xlnet"), "layer.0"),
}


@pytest.mark.parametrize("kind", [kind for kind in MODELS if kind != "reformer"])
def test_rows_are_the_hidden_state_of_their_own_token_with_and_without_padding(kind):
    model, ids, after = tiny(kind), few_ids(), 0 if kind == "mamba" else 1
    hook = hook_of(kind, BLOCKS.get(kind, "layers.0"))
    with torch.inference_mode():
        full = model(input_ids=ids, output_hidden_states=True).hidden_states[after]
        alone = model(input_ids=ids[1:2, :6], output_hidden_states=True).hidden_states[after]
    rows = Capture(model, [hook])(ids)[hook.name]
    torch.testing.assert_close(rows, full)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[1, 6:] = False
    padded = Capture(model, [hook])(ids, mask)[hook.name]
    torch.testing.assert_close(padded[1, :6], alone[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(padded[0], rows[0])


@pytest.mark.parametrize(
    ("kind", "causal", "limit"),
    [
        ("llama", True, None),
        ("gpt2", True, 16),
        ("gpt_neo", True, 16),
        ("gptj", True, None),
        ("opt", True, 16),
        ("bloom", True, None),
        ("mamba", True, None),
        ("mixtral", True, None),
        ("gemma3", True, None),
        ("bert", False, 16),
        ("roberta", False, 16),
        ("xlnet", False, None),
    ],
)
def test_later_tokens_and_tables_of_positions_are_found(kind, causal, limit):
    found = probe(tiny(kind), [BLOCKS.get(kind, "layers.0")], tokens(12))
    assert (found.causal, found.limit) == (causal, limit)
    assert any("later tokens" in note for note in found.notes) is not causal
    early = probe(tiny(kind), ["blocks.0.hook_resid_pre"], tokens(12))
    assert early.causal is causal, "it is the model that sees later tokens, not the place"


@pytest.mark.parametrize(
    ("kind", "pattern"),
    [
        ("mixtral", "layers.1.mlp.gate"),
        ("mixtral", "layers.1.mlp.experts"),
        ("opt", "layers.1.fc1"),
        ("opt", "layers.1.fc2.input"),
        ("xlnet", "layer.1.ff"),
        ("qwen3", "layers.1.self_attn.q_norm"),
        ("gemma2", "layers.1.self_attn.o_proj.input"),
        ("gemma3", "layers.1.self_attn.q_norm"),
    ],
)
def test_other_orders_become_rows_of_each_sequence_alone(kind, pattern):
    model, ids = tiny(kind), few_ids()
    hook = hook_of(kind, pattern)
    together = Capture(model, [hook])(ids)[hook.name]
    assert together.shape == (*ids.shape, hook.d_in)
    for row, one in zip(together, ids, strict=True):
        alone = Capture(model, [hook])(one[None])[hook.name][0]
        torch.testing.assert_close(row, alone, rtol=1e-4, atol=1e-5)


def test_a_flat_output_in_the_order_of_positions_is_told_from_one_in_that_of_sequences():
    class Flat(nn.Module):
        def __init__(self, swap):
            super().__init__()
            self.table, self.inner, self.swap = nn.Embedding(64, 8), nn.Linear(8, 4), swap

        def get_input_embeddings(self):
            return self.table

        def forward(self, input_ids, **rest):  # noqa: ARG002
            x = self.table(input_ids)
            return self.inner((x.transpose(0, 1) if self.swap else x).reshape(-1, 8))

    for swap in (False, True):
        model = Flat(swap)
        (hook,) = probe(model, ["inner"], tokens()).hooks
        expected = model.inner(model.table(few_ids()))
        torch.testing.assert_close(Capture(model, [hook])(few_ids())["inner"], expected)


class Odd(nn.Module):
    """A model whose module `odd` does something that gives no rows of tokens."""

    def __init__(self, change):
        super().__init__()
        self.table, self.first, self.odd = nn.Embedding(64, 8), nn.Identity(), Change(change)

    def get_input_embeddings(self):
        return self.table

    def forward(self, input_ids, **rest):  # noqa: ARG002
        return self.odd(self.first(self.table(input_ids)))


class Change(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        return self.change(x)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.mean(1), r"its output is \(3, 8\) for 3 sequences of 5 tokens"),
        (lambda x: x[:, ::2], r"its output is \(3, 3, 8\)"),
        (lambda x: x[:, :1], "its output is"),
        (lambda x: x.flatten(0, 1)[:4], "an expert gets only the tokens that are sent to it"),
        (lambda x: nn.functional.dropout(x, 0.1), "two passes over the same input"),
        (lambda x: x[:, torch.randperm(x.shape[1])], "two passes over the same input|own token"),
        (lambda x: x @ torch.randn(8, 8), "two passes over the same input"),
        (lambda x: x.mean(0, keepdim=True) + 0 * x, "another sequence"),
        (lambda x: x.roll(1, 0), "another sequence|own token"),
        (lambda x: x.roll(1, 1), "own token|batch or the padding"),
        (lambda x: torch.ones_like(x), "do not depend on their own token"),
        (lambda x: x.argmax(-1), "of torch.int64"),
        (lambda x: (x.argmax(-1), None), "not one activation"),
        (lambda x: {"a": x, "b": x}, r"a: \(3, 5, 8\), b: \(3, 5, 8\)"),
        (lambda x: x.sum(), r"its output is \(\)"),
        (lambda x: x - x.mean(1, keepdim=True), "batch or the padding"),
    ],
)
def test_what_is_not_a_row_for_each_token_is_refused_in_one_line(change, message):
    with pytest.raises(UserError, match=message) as caught:
        probe(Odd(change), ["odd"], tokens(9))
    assert "\n" not in str(caught.value)
    assert "'odd'" in str(caught.value)


@dataclasses.dataclass
class Held:
    weight: float
    x: torch.Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: (None, x),
        lambda x: [x, None],
        lambda x: (x.argmax(-1), x),
        lambda x: {"last_hidden_state": x, "other": 2 * x},
        lambda x: {"ids": x.argmax(-1), "x": x},
        lambda x: Held(1.0, x),
        lambda x: BaseModelOutput(last_hidden_state=x, hidden_states=(x, x)),
    ],
)
def test_the_activation_is_found_in_what_a_module_gives_and_put_back_there(wrap):
    model = Odd(wrap)
    (hook,) = probe(model, ["odd"], tokens()).hooks
    ids = few_ids()
    torch.testing.assert_close(Capture(model, [hook])(ids)["odd"], model.table(ids))
    with torch.no_grad(), splice(model, hook, lambda x, _: x + 1):
        out = model(input_ids=ids)
    plain = model(input_ids=ids)
    assert type(out) is type(plain)
    torch.testing.assert_close(taken(out, hook.item), model.table(ids) + 1)


def test_a_random_choice_that_only_long_sequences_meet_is_found():
    assert hook_of("reformer", "layers.0", seq_len=64).d_in == 16
    with pytest.raises(UserError, match=r"'layers\.1': two passes over the same input"):
        hook_of("reformer", "layers.1", seq_len=64)
    with pytest.raises(UserError, match=r"\(1, 24, 16\) for 1 sequence of 17 tokens"):
        hook_of("reformer", "layers.0", seq_len=17)


def test_a_model_that_changes_after_a_short_sequence_does_not_repeat():
    class Moody(Odd):
        def forward(self, input_ids, **rest):
            if input_ids.shape[1] < 9:
                self.table.weight.data *= 1.01
            return super().forward(input_ids, **rest)

    with pytest.raises(UserError, match="two passes over the same input"):
        probe(Moody(lambda x: x), ["odd"], tokens(9))


def test_what_the_model_changes_in_place_later_is_read_as_it_was():
    """Falcon adds the attention's output to that of the MLP in place."""
    model, ids, seen = tiny("falcon"), few_ids(), {}
    hooks = probe(model, ["h.0.mlp", "h.1"], tokens()).hooks
    assert [hook.copied for hook in hooks] == [True, False]
    handle = model.transformer.h[0].mlp.register_forward_hook(
        lambda _m, _i, out: seen.update(mlp=out.clone())
    )
    got = Capture(model, hooks)(ids)
    handle.remove()
    assert torch.equal(got["h.0.mlp"], seen["mlp"])


@pytest.mark.parametrize("kind", ["gpt2", "gpt_neo", "opt", "bert", "roberta", "gptj"])
def test_sequences_longer_than_the_models_positions_are_refused_with_the_limit(kind):
    pattern = BLOCKS.get(kind, "layers.0")
    assert probe(tiny(kind), [pattern], tokens(16)).notes == () or kind in ("bert", "roberta")
    with pytest.raises(UserError, match=r"--seq-len 17: .* 16 positions .*give --seq-len 16"):
        probe(tiny(kind), [pattern], tokens(17))


def test_rotary_models_run_beyond_their_positions_with_a_note():
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**GROUPED, max_position_embeddings=16)
    ).eval()
    assert probe(model, ["layers.0"], tokens(16)).notes == ()
    (note,) = probe(model, ["layers.0"], tokens(17)).notes
    assert "17 tokens" in note
    assert "max_position_embeddings 16" in note


# ---- inputs of modules, and names of other tools


def kept(model: nn.Module, path: str, ids: torch.Tensor, side: str) -> torch.Tensor:
    seen = {}

    def before(_module, args, kwargs):
        seen["input"] = (args[0] if args else kwargs["hidden_states"]).clone()

    def after(_module, _args, out):
        seen["output"] = (out[0] if isinstance(out, tuple) else out).clone()

    module = model.get_submodule(path)
    handles = [
        module.register_forward_pre_hook(before, with_kwargs=True),
        module.register_forward_hook(after),
    ]
    with torch.inference_mode():
        model(input_ids=ids)
    for handle in handles:
        handle.remove()
    return seen[side]


@pytest.mark.parametrize(
    "name", ["layers.1.self_attn.o_proj", "layers.1.self_attn", "layers.1", "layers.1.mlp"]
)
def test_inputs_are_read_and_replaced_by_position_or_by_keyword(name):
    model, ids = tiny("llama"), few_ids()
    found = hook_of("llama", f"{name}.input")
    assert found.name == f"{name}.input"
    got = Capture(model, [found])(ids)[found.name]
    torch.testing.assert_close(got, kept(model, f"model.{name}", ids, "input"))
    assert hook_of("llama", f"{name}.output").name == name
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with splice(model, f"{name}.input", lambda x, _: x):
            assert torch.equal(model(input_ids=ids).logits, plain)
        with splice(model, f"{name}.input", lambda x, _: 0.5 * x + 1):
            assert not torch.allclose(model(input_ids=ids).logits, plain)


def test_replacing_a_blocks_input_is_replacing_the_output_before_it():
    model, ids = tiny("llama"), few_ids()
    with torch.no_grad():
        with splice(model, "layers.1.input", lambda x, _: torch.zeros_like(x)):
            one = model(input_ids=ids).logits
        with splice(model, "layers.0", lambda x, _: torch.zeros_like(x)):
            other = model(input_ids=ids).logits
    torch.testing.assert_close(one, other)


@pytest.mark.parametrize("kind", ["xlnet", "opt", "mixtral"])
def test_splicing_the_same_rows_changes_nothing_in_any_order(kind):
    name = {"xlnet": "layer.1", "opt": "layers.1.fc1", "mixtral": "layers.1.mlp.experts"}[kind]
    model, ids = tiny(kind), few_ids()
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        with splice(model, name, lambda x, _: x):
            torch.testing.assert_close(model(input_ids=ids).logits, plain)
        with splice(model, name, lambda x, _: torch.cat([x[:1], x[1:] + 1])):
            other = model(input_ids=ids).logits
    torch.testing.assert_close(other[0], plain[0])
    assert not torch.allclose(other[1:], plain[1:])


def test_a_module_called_output_comes_before_the_suffix():
    assert hook_of("bert", "layer.1.output").path.endswith("layer.1.output")
    assert hook_of("bert", "layer.1.output.output").name == "layer.1.output"
    assert hook_of("bert", "layer.1.output.input").name == "layer.1.output.input"


LENS = [
    ("llama", "blocks.1.hook_resid_post", "layers.1"),
    ("llama", "blocks.1.hook_resid_pre", "layers.1.input"),
    ("llama", "blocks.1.hook_resid_mid", "layers.1.post_attention_layernorm.input"),
    ("llama", "blocks.1.hook_attn_out", "layers.1.self_attn"),
    ("llama", "blocks.1.hook_mlp_out", "layers.1.mlp"),
    ("llama", "blocks.1.attn.hook_z", "layers.1.self_attn.o_proj.input"),
    ("llama", "blocks.1.attn.hook_q", "layers.1.self_attn.q_proj"),
    ("llama", "blocks.1.mlp.hook_post", "layers.1.mlp.down_proj.input"),
    ("llama", "blocks.1.mlp.hook_pre", "layers.1.mlp.gate_proj"),
    ("llama", "blocks.1", "layers.1"),
    ("llama", "blocks.1.mlp", "layers.1.mlp"),
    ("llama", "hook_embed", "embed_tokens"),
    ("llama", "unembed", "lm_head"),
    ("llama", "ln_final", "norm"),
    ("gemma2", "blocks.1.hook_mlp_out", "layers.1.post_feedforward_layernorm"),
    ("gemma2", "blocks.1.hook_attn_out", "layers.1.post_attention_layernorm"),
    ("gemma2", "blocks.1.hook_resid_mid", "layers.1.pre_feedforward_layernorm.input"),
    ("gemma2", "hook_embed", "layers.0.input"),
    ("gpt2", "blocks.1.hook_resid_post", "h.1"),
    ("gpt2", "blocks.1.attn.hook_z", "h.1.attn.c_proj.input"),
    ("gpt2", "blocks.1.mlp.hook_post", "h.1.mlp.c_proj.input"),
    ("gpt2", "hook_embed", "wte"),
    ("gpt_neo", "blocks.1.attn.hook_z", "h.1.attn.attention.out_proj.input"),
    ("gptj", "blocks.1.mlp.hook_pre", "h.1.mlp.fc_in"),
    ("neox", "blocks.1.attn.hook_z", "layers.1.attention.dense.input"),
    ("neox", "blocks.1.mlp.hook_post", "layers.1.mlp.dense_4h_to_h.input"),
    ("opt", "blocks.1.hook_mlp_out", "layers.1.fc2"),
    ("opt", "blocks.1.hook_resid_mid", "layers.1.final_layer_norm.input"),
    ("bloom", "blocks.1.hook_mlp_out", "h.1.mlp.dense_4h_to_h"),
    ("bloom", "blocks.1.hook_attn_out", "h.1.self_attention.dense"),
    ("bert", "blocks.1.hook_normalized_resid_post", "layer.1"),
    ("bert", "blocks.1.hook_resid_post", "layer.1.output.LayerNorm.input"),
    ("gemma3", "blocks.1.hook_resid_post", "model.language_model.layers.1"),
    ("llama", "model.layers.1.output[0]", "layers.1"),
    ("llama", "model.layers.1.input", "layers.1.input"),
    ("gpt2", "transformer.h.1", "h.1"),
]


@pytest.mark.parametrize(("kind", "theirs", "ours"), LENS)
def test_names_of_other_tools_mean_the_same_place(kind, theirs, ours):
    assert hook_of(kind, theirs, None).name == ours


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt2", "opt", "bloom"])
def test_the_residual_stream_is_the_sum_of_what_its_names_say(kind):
    """resid_post = resid_mid + mlp_out = resid_pre + attn_out + mlp_out: the names are exact."""
    names = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out")
    theirs = [f"blocks.1.hook_{name}" for name in names]
    got = Capture(tiny(kind), probe(tiny(kind), theirs, tokens()).hooks)(few_ids())
    pre, mid, post, attn, mlp = (got[hook_of(kind, name, None).name] for name in theirs)
    torch.testing.assert_close(mid, pre + attn, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(post, mid + mlp, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("llama", "blocks.1.ln1.hook_normalized", r"the nearest is layers\.1\.input_layernorm"),
        ("llama", "blocks.7.hook_resid_post", "no block 7"),
        ("llama", "ln_final.hook_normalized", "norm is like it, with the norm's weights"),
        ("gpt2", "blocks.1.attn.hook_q", r"the nearest is h\.1\.attn\.c_attn"),
        ("neox", "blocks.1.hook_resid_mid", "no module of this model has exactly these values"),
        ("qwen3", "blocks.1.attn.hook_q", r"the nearest is layers\.1\.self_attn\.q_proj"),
        ("xlnet", "blocks.1.hook_mlp_out", r"the block itself is layer\.1"),
        ("gpt2", "hook_pos_embed", "its output is"),
    ],
)
def test_names_without_an_equal_are_refused_with_the_nearest(kind, name, message):
    with pytest.raises(UserError, match=message):
        hook_of(kind, name, None)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("layers.9", "blocks.9.hook_resid_post"),
        ("gpt_neox.layers.9", "blocks.9.hook_resid_post"),
        ("model.language_model.layers.9", "blocks.9.hook_resid_post"),
        ("layers.9.input", "blocks.9.hook_resid_pre"),
        ("layers.9.self_attn.o_proj.input", "blocks.9.attn.hook_z"),
        ("h.9.mlp.c_proj.input", "blocks.9.mlp.hook_post"),
        ("layers.9.post_feedforward_layernorm", "blocks.9.hook_mlp_out"),
        ("layers.9.mlp", "layers.9.mlp"),
        ("blocks.9.hook_mlp_out", "blocks.9.hook_mlp_out"),
        ("norm", "norm"),
    ],
)
def test_names_for_other_tools(ours, theirs):
    assert hook_name(ours).name == theirs
    assert hook_name(ours).layer == (None if ours == "norm" else 9)


def test_a_recorded_hook_is_found_by_any_of_its_names():
    hooks = ["layers.9", "layers.9.input", "layers.10", "layers.9.mlp.down_proj.input"]
    for name, meant in [
        ("layers.9", "layers.9"),
        ("model.layers.9", "layers.9"),
        ("model.layers.9.output[0]", "layers.9"),
        ("blocks.9.hook_resid_post", "layers.9"),
        ("blocks.9.hook_resid_pre", "layers.9.input"),
        ("blocks.9.mlp.hook_post", "layers.9.mlp.down_proj.input"),
        ("layers.1", None),
        ("mlp", None),
    ]:
        assert among(name, hooks) == meant
    assert among("blocks.9.hook_resid_post", ["model.layers.9.output"]) is not None
    for name, hook in (
        ("blocks.9.hook_mlp_out", "layers.9.mlp"),
        ("model.layers.9.self_attn.output", "blocks.9.hook_attn_out"),
    ):
        assert among(name, [hook]) == hook  # in most kinds of models, but not in all
        assert among(name, [hook], sure=True) is None
    assert among("blocks.9.hook_attn_out", ["layers.9.mlp"]) is None


def test_the_layers_that_run_on_text_are_meant_in_a_model_of_images_and_text():
    model = tiny("gemma3")
    assert hook_of("gemma3", "layers.1").path == "model.language_model.layers.1"
    found = probe(model, ["layers.*"], tokens()).hooks
    assert [hook.path for hook in found] == [f"model.language_model.layers.{i}" for i in (0, 1)]
    with pytest.raises(UserError, match="does not run"):
        hook_of("gemma3", "layers.2")  # the images' tower is deeper


def test_one_name_for_two_modules_that_both_run_is_refused_with_their_paths():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(64, 8)
            self.a, self.b = (
                nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 8)])}) for _ in "ab"
            )

        def forward(self, input_ids, **rest):  # noqa: ARG002
            return self.b["layers"][0](self.a["layers"][0](self.table(input_ids)))

    with pytest.raises(UserError, match=r"full path: a\.layers\.0, b\.layers\.0"):
        probe(Two(), ["layers.0"], tokens())
    assert probe(Two(), ["b.layers.0"], tokens()).hooks[0].path == "b.layers.0"


# ---- packing


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


TALK = [[("user", "the cat"), ("assistant", "sat")], [("system", "a mat")], [("user", "ran")]]
TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }} {{ date_string }}\n{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}|{% endfor %}</s>"
)


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ raise_exception('nothing') }}"])
def test_conversations_are_read_as_the_models_chat_template_writes_them(tmp_path, template):
    rows = [[{"role": role, "content": text} for role, text in turns] for turns in TALK]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = template
    cfg = HarvestConfig(
        text=TextConfig(path=str(path), field="messages"), seq_len=99, heldout_tokens=0, heldout_fraction=0
    )  # fmt: skip
    packer = Packer(cfg, tokenizer, heldout=False)
    if template is not None and "nothing" in template:
        with pytest.raises(UserError, match="chat template refuses all"):
            list(packer.sequences())
        return
    (sequence,) = packer.sequences()
    day = "26 Jul 2024 26 Jul 2024\n"
    whole = ["user: the cat\nassistant: sat", "system: a mat", "user: ran"]
    texts = whole if template is None else [f"{day}the cat|sat|", f"{day}ran|"]
    assert tokenizer.decode(sequence.ids[: sequence.length]) == "<s>" + "".join(
        f"{text}</s>" for text in texts
    )
    refused = [packer.refuses(d) for d in documents(cfg.text)]
    assert refused == ([""] * 3 if template is None else ["", REFUSED, ""])


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
)
TRIMMED = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
    "{% if not loop.last %} ;; {% endif %}{% endfor %}"
)
MERGED = (  # the system's words stand before the last user's, and old thoughts are not written
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] {% if messages[0].role == 'system' "
    "and loop.index >= loop.length - 1 %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
)
SPOKEN = st.lists(
    st.sampled_from([*"ab\n |<>", "</s>", "<|user|>\n", "</s>\n<|assistant|>\n"]), max_size=6
).map("".join)


def masked(turns, template, roles, tmp_path) -> tuple[str, list[str], Packer]:
    """Return the text of one conversation and the runs of tokens that are kept in it."""
    path, tokenizer = tmp_path / "talk.jsonl", make_tokenizer()
    rows = [{"role": role, "content": text} for role, text in turns]
    path.write_text(json.dumps({"messages": rows}) + "\n")
    tokenizer.chat_template = template
    packer = Packer(
        HarvestConfig(text=TextConfig(path=str(path), field="messages"), seq_len=999, roles=roles,
                      pack=False, heldout_tokens=0, heldout_fraction=0), tokenizer, heldout=False
    )  # fmt: skip
    (sequence,) = packer.sequences()
    ids, said = sequence.ids[: sequence.length], sequence.said[: sequence.length]
    assert not sequence.said[sequence.length :].any()
    parts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(said)) + 1)
    kept = [tokenizer.decode(ids[part]) for part in parts if len(part) and said[part[0]]]
    return tokenizer.decode(ids), kept, packer


@pytest.mark.parametrize("template", [CHATML, TRIMMED, MERGED])
def test_the_words_of_a_role_are_marked_where_the_template_writes_them(tmp_path, template):
    turns = [("system", "be kind"), ("user", "the [INST] cat?"), ("assistant", "<think>hm</think>it sat"),
             ("user", "sat user"), ("assistant", "ran on a mat")]  # fmt: skip
    kept = masked(turns, template, ("assistant",), tmp_path)[1]
    first = "it sat" if template == MERGED else "<think>hm</think>it sat"
    assert [k.strip() for k in kept] == [first, "ran on a mat"]
    kept = masked(turns, template, ("system",), tmp_path)[1]
    assert [k.strip() for k in kept] == ["be kind"]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), SPOKEN), min_size=1, max_size=4))
def test_marked_tokens_are_those_that_the_library_calls_the_assistants(tmp_path_factory, turns):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    rows = [{"role": role, "content": text} for role, text in turns]
    theirs = tokenizer.apply_chat_template(
        rows, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    packed = tmp_path_factory.mktemp("talk", numbered=True)
    path = packed / "talk.jsonl"
    path.write_text(json.dumps({"messages": rows}) + "\n")
    cfg = HarvestConfig(
        text=TextConfig(path=str(path), field="messages"), seq_len=999, pack=False, roles=("assistant",)
    )  # fmt: skip
    (found,) = (Packer(cfg, tokenizer, heldout=False).whole(d, 0) for d in documents(cfg.text))
    assert found.ids[: found.length].tolist() == theirs["input_ids"]
    assert found.said[: found.length].astype(int).tolist() == theirs["assistant_masks"]


def test_roles_need_conversations_a_template_and_turns_that_can_be_told_apart(tmp_path):
    turns = [("user", "the cat"), ("assistant", "sat")]
    for template, message in (
        (None, "has no chat template"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
            "cannot be told apart",
        ),
        ("{{ raise_exception('no') }}", "refuses all 1 conversations"),
    ):
        with pytest.raises(UserError, match=message):
            masked(turns, template, ("assistant",), tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    for row in ({"messages": "plain"}, {"messages": [4, 5]}):
        (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
        text = TextConfig(path=str(tmp_path / "b.jsonl"), field="messages")
        cfg = HarvestConfig(text=text, roles=("user",), heldout_fraction=0, heldout_tokens=0)
        with pytest.raises(UserError, match="document 0: field 'messages' holds no conversation"):
            list(Packer(cfg, tokenizer, heldout=False).sequences())


def test_token_ids_are_taken_as_they_are_and_must_be_the_tokenizers(tmp_path):
    path, tokenizer = tmp_path / "a.jsonl", make_tokenizer(bos=True)
    path.write_text('{"input_ids": [0, 40, 41]}\n{"input_ids": []}\n{"input_ids": [42, 1]}\n')
    text = TextConfig(path=str(path), field="input_ids")
    cfg = HarvestConfig(text=text, seq_len=16, heldout_tokens=0, heldout_fraction=0)
    (sequence,) = Packer(cfg, tokenizer, heldout=False).sequences()
    assert sequence.ids[: sequence.length].tolist() == [0, 40, 41, 1, 42, 1]
    path.write_text('{"input_ids": [5]}\n{"input_ids": [50256]}\n')
    with pytest.raises(UserError, match="document 1: token id 50256, but .* ids up to"):
        list(Packer(cfg, tokenizer, heldout=False).sequences())


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
    positions = token_positions(torch.arange(seq) < lengths[:, None])
    reasons = rule.by_token(ids, positions)
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
            heard = REASONS[int(rule.by_token(ids, positions, ids > 6)[b, p])]
            unkept = expected == "kept" and int(ids[b, p]) <= 6
            assert heard == ("other roles" if unkept else expected)
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
    assert "".join(table[i] for i in ids) == "the cat sat</s>"
    assert np.array(ids).dtype.kind == "i"
