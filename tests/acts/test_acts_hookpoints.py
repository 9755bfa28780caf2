"""The probe: which modules give a row for each token, in which order, for how long, and what is refused."""

import dataclasses

import pytest
import torch
import transformers
from acts_architectures import BLOCKS, GROUPED, few_ids, hook_of, tiny
from acts_models import hooks_of, make_model
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from wsae.acts.capture import Capture, splice, tokens
from wsae.acts.hookpoints import probe, taken
from wsae.acts.language import load_language
from wsae.core.errors import UserError


@pytest.fixture(scope="module", params=["llama", "neox"])
def language(request, tmp_path_factory):
    return load_language(str(make_model(tmp_path_factory.mktemp(request.param), request.param)))


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
        ("electra", False, 16),
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
