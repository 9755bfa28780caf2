"""Names of hooks: patterns, the names that other tools use, and the nearest of what is not there."""

import pytest
import torch
from acts_architectures import few_ids, hook_of, tiny
from acts_models import WIDTH, hooks_of, make_model
from torch import nn

from wsae.acts.capture import Capture, tokens
from wsae.acts.hooknames import HookPlace, among, canonical_names, hook_name, match
from wsae.acts.hookpoints import probe
from wsae.acts.language import load_language
from wsae.core.errors import UserError


@pytest.fixture(scope="module", params=["llama", "neox"])
def language(request, tmp_path_factory):
    return load_language(str(make_model(tmp_path_factory.mktemp(request.param), request.param)))


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
