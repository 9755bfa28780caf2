"""Capture equals the full forward; splicing replaces just what it says, at outputs and at inputs."""

import pytest
import torch
from acts_architectures import BLOCKS, MODELS, few_ids, hook_of, tiny
from acts_models import LAYERS, WIDTH, hooks_of, make_model, some_ids
from torch import nn

from wsae.acts.capture import Capture, splice, tokens
from wsae.acts.hookpoints import probe
from wsae.acts.language import load_language
from wsae.core.errors import UserError


@pytest.fixture(scope="module", params=["llama", "neox"])
def language(request, tmp_path_factory):
    return load_language(str(make_model(tmp_path_factory.mktemp(request.param), request.param)))


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
