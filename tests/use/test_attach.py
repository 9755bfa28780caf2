"""SAEs in a running model: what a pass finds, what edits move, and that nothing else changes."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import wsae
from wsae.acts.capture import Capture, one_hook
from wsae.sae import BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from wsae.use.attach import Add, Clamp, Scale, Set, Zero, attach

VOCABULARY, WIDTH, LATENTS, EOS = 50, 16, 40, 2
HOOK = "layers.0"


def config(kind, **more):
    return kind(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        intermediate_size=32,
        num_attention_heads=2,
        initializer_range=0.5,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
        **more,
    )


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(config(LlamaConfig)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def sae():
    return make(TopK(k=4))


def make(activation, seed=0):
    made = wsae.SAE(SAEConfig(d_in=WIDTH, d_sae=LATENTS, activation=activation), seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        made.W_dec *= torch.rand(LATENTS, 1, generator=g) + 0.5
        made.b_enc += torch.randn(LATENTS, generator=g)
        made.b_dec += torch.randn(WIDTH, generator=g)
    return made


def some_ids(batch=2, seq=7, seed=3):
    return torch.randint(3, VOCABULARY, (batch, seq), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def rows(model):
    """Reads the hook's rows as what follows in the model gets them, inside an `attach` too."""
    capture = Capture(model, [one_hook(model, HOOK)])
    return lambda ids, mask=None: capture(ids, mask)[HOOK].clone()


@torch.no_grad()
def logits(model, ids, **more):
    return model(input_ids=ids, **more).logits


def test_a_pass_without_edits_is_the_models_own_to_the_bit_and_its_latents_are_the_saes(
    model, sae, rows
):
    ids = some_ids()
    ids[0, 4] = EOS
    plain = logits(model, ids)
    with attach(model, {HOOK: sae}) as a:
        assert torch.equal(logits(model, ids), plain)
    acts = a.acts[HOOK]
    kept = torch.ones(2, 7, dtype=torch.bool)
    kept[:, 0] = kept[0, 4] = False
    assert torch.equal(acts.kept, kept)
    expected = sae.encode(rows(ids)) * kept[..., None]
    torch.testing.assert_close(acts.dense(), expected)
    j = int(acts.code.indices[0])
    torch.testing.assert_close(acts.latent(j), expected[..., j])


EDITS = {
    Set(5, 8.0): lambda z: torch.full_like(z, 8.0),
    Add(6, -1.5): lambda z: z - 1.5,
    Scale(7, 3.0): lambda z: 3 * z,
    Clamp(8, 0.5): lambda z: z.clamp(max=0.5),
    Zero(9): torch.zeros_like,
}


@pytest.mark.parametrize(
    "activation", [TopK(k=4), BatchTopK(k=4), JumpReLU(threshold=0.3), ReLU()], ids=lambda a: a.kind
)
def test_an_edit_moves_the_hook_by_the_latents_decoder_row_times_the_change(
    model, rows, activation
):
    made, ids = make(activation), some_ids()
    x = rows(ids)
    z = made.encode(x)
    expected = x.clone()
    for edit, new in EDITS.items():
        change = new(z[..., edit.latent]) - z[..., edit.latent]
        change[:, 0] = 0
        expected += change[..., None] * made.W_dec[edit.latent].detach()
    with attach(model, {HOOK: made}) as a:
        a.edit(*EDITS)
        seen = rows(ids)
    torch.testing.assert_close(seen, expected)
    assert torch.equal(seen[:, 0], x[:, 0])
