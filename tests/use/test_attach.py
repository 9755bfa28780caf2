"""SAEs in a running model: what a pass finds, what edits move, and that nothing else changes."""

import subprocess
import sys

import pytest
import torch
from acts_models import VOCABULARY, WIDTH, untrained
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

import wsae
from wsae.acts.capture import Capture, one_hook, splice
from wsae.acts.config import HarvestConfig
from wsae.acts.flow import KEPT, SkipRule
from wsae.core.errors import UserError
from wsae.sae import BatchTopK, JumpReLU, ReLU, SAEConfig, TopK
from wsae.use.attach import Add, Clamp, Scale, Set, Zero, attach

LATENTS, EOS = 40, 2
HOOK = "layers.0"


SPECIAL = {"bos_token_id": 1, "eos_token_id": EOS, "pad_token_id": 0}


def llama():
    return untrained(LlamaForCausalLM, LlamaConfig, **SPECIAL)


def mamba():
    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "num_hidden_layers": 2}
    made = MambaForCausalLM(MambaConfig(**sizes, state_size=4, initializer_range=0.5, **SPECIAL))
    return made.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def sae():
    return make(TopK(k=4))


def make(activation, seed=0, input_norm=None):
    cfg = SAEConfig(d_in=WIDTH, d_sae=LATENTS, activation=activation, input_norm=input_norm)
    made = wsae.SAE(cfg, seed)
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
    for none in (-1, LATENTS):
        with pytest.raises(UserError, match=f"latent {none}: the SAE has 40 latents"):
            acts.latent(none)


EDITS = {
    Set(5, 8.0): lambda z: torch.full_like(z, 8.0),
    Add(6, -1.5): lambda z: z - 1.5,
    Scale(7, 3.0): lambda z: 3 * z,
    Clamp(8, 0.5): lambda z: z.clamp(max=0.5),
    Zero(9): torch.zeros_like,
}


@pytest.mark.parametrize(
    ("activation", "norm"),
    [
        (TopK(k=4), None),
        (BatchTopK(k=4), None),
        (JumpReLU(threshold=0.3), None),
        (ReLU(), None),
        (TopK(k=4), "layer_norm"),
    ],
    ids=lambda a: getattr(a, "kind", a),
)
def test_an_edit_moves_the_hook_by_the_latents_decoder_row_times_the_change(
    model, rows, activation, norm
):
    made, ids = make(activation, input_norm=norm), some_ids()
    x = rows(ids)
    z = made.encode(x)
    scale = torch.ones(2, 7) if norm is None else x.std(2)
    expected = x.clone()
    for edit, new in EDITS.items():
        change = new(z[..., edit.latent]) - z[..., edit.latent]
        change[:, 0] = 0
        expected += (scale * change)[..., None] * made.W_dec[edit.latent].detach()
    with attach(model, {HOOK: made}) as a:
        a.edit(*EDITS)
        seen = rows(ids)
    torch.testing.assert_close(seen, expected)
    assert torch.equal(seen[:, 0], x[:, 0])


@pytest.mark.parametrize("kind", [LlamaForCausalLM, MambaForCausalLM])
def test_every_token_of_a_generation_is_edited_as_in_one_pass_over_the_whole(kind, model, sae):
    if kind is MambaForCausalLM:  # its state does not say how many tokens it has read
        model = mamba()
    prompt = some_ids(2, 5)
    prompt[1, 3] = EOS
    pads = torch.tensor([[0, 0], [0, 0]])
    left = torch.cat([pads[:, :2], prompt], dim=1)
    mask = (torch.arange(7) >= 2).long().expand(2, 7)
    edits = (Set(5, 6.0, positions=(2, 6, 8)), Scale(7, 3.0), Add(9, 4.0, positions=7))
    with attach(model, {HOOK: sae}) as a, torch.no_grad():
        plain = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
        a.edit(*edits)
        cached = model.generate(prompt, max_new_tokens=5, do_sample=False, eos_token_id=None)
        again = model.generate(
            left, attention_mask=mask, max_new_tokens=5, do_sample=False, eos_token_id=None
        )
        whole = logits(model, cached)
        assert torch.equal(a.acts[HOOK].kept[:, 1:], cached[:, 1:] != EOS)
        uncached = model.generate(
            prompt, max_new_tokens=5, do_sample=False, eos_token_id=None, use_cache=False
        )
    assert not torch.equal(plain, cached)
    assert torch.equal(cached[:, 5:], whole[:, 4:-1].argmax(-1))
    assert torch.equal(cached, uncached)
    assert torch.equal(cached, again[:, 2:])


@pytest.mark.parametrize("side", ["left", "right"])
def test_sequences_of_a_padded_batch_are_edited_as_each_alone(model, sae, side):
    long, short = some_ids(1, 8), some_ids(1, 5, seed=4)
    pads = torch.zeros(1, 3, dtype=torch.long)
    parts = (pads, short) if side == "left" else (short, pads)
    ids = torch.cat([long, torch.cat(parts, dim=1)])
    mask = ids != 0
    own = slice(3, 8) if side == "left" else slice(0, 5)
    with attach(model, {HOOK: sae}) as a:
        a.edit(Set(5, 6.0, positions=[2, 4]), Add(6, 1.0))
        both = logits(model, ids, attention_mask=mask.long())
        batch = a.acts[HOOK]
        alone = logits(model, short)
        single = a.acts[HOOK]
        torch.testing.assert_close(both[1:, own], alone, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(batch.dense()[1:, own], single.dense())
        torch.testing.assert_close(both[:1], logits(model, long), rtol=1e-4, atol=1e-4)
        assert not batch.kept[1, mask[1].logical_not()].any()
        assert not batch.dense()[1, mask[1].logical_not()].any()


def test_conditions_see_the_pass_and_edits_act_in_order(model, sae, rows):
    ids = some_ids()
    x, target = rows(ids), int(ids[0, 3])
    with attach(model, {HOOK: sae}) as a:
        a.edit(
            Set(5, 2.0, condition=lambda acts: acts.call.ids == target),
            Scale(5, 3.0, condition=lambda acts: acts.latent(5) < 100),
            Add(6, 1.0, condition=lambda acts: acts.latent(6) > 0),
        )
        seen, acts = rows(ids), a.acts[HOOK]
    z = acts.latent(5)
    five = torch.where(ids == target, 6.0, 3 * z)
    five[:, 0] = z[:, 0]
    six = (acts.latent(6) > 0).float()
    expected = x + (five - z)[..., None] * sae.W_dec[5] + six[..., None] * sae.W_dec[6]
    torch.testing.assert_close(seen, expected.detach())


def test_without_the_error_term_reconstructions_stand_in_for_the_kept_rows(model, sae, rows):
    ids = some_ids()
    x = rows(ids)
    with attach(model, {HOOK: sae}, error=False) as a:
        seen = rows(ids)
        a.edit(Add(5, 2.0))
        moved = rows(ids)
    expected = torch.cat([x[:, :1], sae(x[:, 1:]).detach()], dim=1)
    torch.testing.assert_close(seen, expected)
    torch.testing.assert_close(
        moved[:, 1:] - seen[:, 1:], (2 * sae.W_dec[5]).detach().expand(2, 6, -1)
    )
    assert torch.equal(seen[:, 0], x[:, 0])


def test_an_attention_sink_is_left_alone_by_the_rule_of_the_harvest(model, sae, rows):
    ids = some_ids()
    norms = rows(ids).norm(dim=-1)
    rule = SkipRule(HarvestConfig(skip_first=0, sink_norm_ratio=1.2), [int(ids[0, 1])])
    with attach(model, {HOOK: sae}, exclude=rule) as a:
        logits(model, ids)
    reasons = rule.by_token(ids, torch.arange(7).expand(2, 7))
    median = norms[reasons == KEPT].median()
    kept = (reasons == KEPT) & (norms <= 1.2 * median)
    assert torch.equal(a.acts[HOOK].kept, kept)
    assert 0 < kept.sum() < kept.numel() - 1
    with attach(model, {HOOK: sae}, exclude=None) as a:
        logits(model, ids)
        assert a.acts[HOOK].kept.all()


def test_several_saes_each_see_what_the_edits_before_them_made(model, sae, rows):
    ids, other = some_ids(), make(JumpReLU(threshold=0.3), seed=1)
    later = Capture(model, [one_hook(model, "layers.1")])
    with attach(model, {"blocks.0.hook_resid_post": sae, "layers.1": other}) as a:
        with pytest.raises(UserError, match="edit Add of latent 5: say which hook: blocks.0"):
            a.edit(Add(5, 3.0))
        a.edit(Add(5, 3.0, hook=HOOK), Zero(3, hook="layers.1"))
        logits(model, ids)
    x = rows(ids)
    x[:, 1:] += 3.0 * sae.W_dec[5].detach()
    with splice(model, HOOK, lambda _x, _call: x):
        expected = later(ids)["layers.1"]
    torch.testing.assert_close(a.acts["layers.1"].dense()[:, 1:], other.encode(expected)[:, 1:])


def test_a_model_in_bfloat16_keeps_its_bits_and_its_edits(sae):
    model = untrained(GPTNeoXForCausalLM, GPTNeoXConfig, **SPECIAL).to(torch.bfloat16)
    ids = some_ids()
    capture = Capture(model, [one_hook(model, HOOK)])
    plain, x = logits(model, ids), capture(ids)[HOOK].clone()
    with attach(model, {HOOK: sae}) as a:
        assert torch.equal(logits(model, ids), plain)
        torch.testing.assert_close(a.acts[HOOK].dense()[:, 1:], sae.encode(x)[:, 1:])
        a.edit(Add(5, 2.0, positions=3))
        seen = capture(ids)[HOOK]
    expected = x.float()
    expected[:, 3] += 2 * sae.W_dec[5].detach()
    assert torch.equal(seen, expected.bfloat16())


def test_gradients_pass_an_edit_as_they_pass_its_formula(model, sae):
    ids, x = some_ids(1, 4), None

    def loss(change):
        def swap(rows, _call):
            z = sae.encode(rows)[..., 5:6]
            return torch.cat([rows[:, :1], (rows + change(z) * sae.W_dec[5])[:, 1:]], dim=1)

        return swap

    vectors = model.get_input_embeddings()(ids).detach()
    with attach(model, {HOOK: sae}) as a:
        a.edit(Scale(5, 3.0))
        x = vectors.clone().requires_grad_()
        (mine,) = torch.autograd.grad(model(inputs_embeds=x).logits[0, -1, 7], x)
    with splice(model, HOOK, loss(lambda z: 2 * z)):
        x = vectors.clone().requires_grad_()
        (theirs,) = torch.autograd.grad(model(inputs_embeds=x).logits[0, -1, 7], x)
    torch.testing.assert_close(mine, theirs)


BAD = [
    (
        lambda a: a.edit(Set(40, 1.0)),
        r"edit Set of latent 40: the SAE at layers.0 has 40 latents, 0 to 39",
    ),
    (lambda a: a.edit(Set(-1, 1.0)), "0 to 39"),
    (lambda a: a.edit(Zero(3, hook="layers.1")), r"'layers.1' \(nearest: layers.0\)"),
    (lambda _a: Set(3, float("nan")), "nan is no finite number"),
    (lambda a: a.edit(Set(3, -1e39)), "-1e[+]39 is beyond 3.40282e[+]38"),
    (lambda _a: Set(3, 1.0, positions=[-1]), "positions count from 0"),
]


@pytest.mark.parametrize(("do", "says"), BAD, ids=[says[:20] for _, says in BAD])
def test_an_edit_that_cannot_be_is_refused_in_one_line(model, sae, do, says):
    with pytest.raises(UserError, match=says), attach(model, {HOOK: sae}) as a:
        do(a)


NEWCOMERS = """
import numpy as np, torch, wsae
for number in (np.int64, torch.tensor):
    made = wsae.Set(number(5), 1.0, positions=number(2))
    assert made == wsae.Set(5, 1.0, positions=number(2)) and made.places == (2,)
assert wsae.Zero(3, positions=torch.tensor([1, 2])).places == (1, 2)
bad = {
    "Set of latent 1.5: give the latent's number": lambda: wsae.Set(1.5, 1.0),
    "Set of latent 5: positions 'abc' are no whole numbers": lambda: wsae.Set(5, 1.0, positions="abc"),
    "exclude 'none': give": lambda: wsae.attach(torch.nn.Linear(1, 1), {}, exclude="none").__enter__(),
    "method 'ig': is neither": lambda: wsae.attribute(None, {}, [1], wsae.Loss(), method="ig"),
    "ids: torch.int64 of shape (1, 2); give the": lambda: wsae.attribute(None, {}, [[1, 2]], wsae.Loss()),
    "ids: torch.float64 of": lambda: wsae.attribute(None, {}, [1.5, 2.0], wsae.Loss()),
    "verify -1: give how many": lambda: wsae.attribute(None, {}, [1], wsae.Loss(), verify=-1),
    "saes: give the SAE at each hook": lambda: wsae.attach(torch.nn.Linear(1, 1), {}).__enter__(),
    "Set of latent 5: '8' is no finite": lambda: wsae.Set(5, "8"),
    "edit: given list": lambda: wsae.use.attach.Attached({}).edit([wsae.Set(5, 1.0)]),
}
for says, call in bad.items():
    try:
        call()
    except wsae.UserError as error:
        assert says in str(error), error
    else:
        raise AssertionError(says)
"""


def test_what_newcomers_type_is_understood_or_refused_by_name():
    # in a process of its own: the checks of types that run in the tests would see it first
    subprocess.run([sys.executable, "-c", NEWCOMERS], check=True, timeout=250)


@pytest.mark.parametrize(
    ("place", "says"),
    [(9, "position 9 is not there; the last of the pass was 6"), (0, r"0 is left alone \(first\)")],
)
def test_a_position_that_no_pass_had_is_told_at_the_end(model, sae, place, says):
    def use():
        with attach(model, {HOOK: sae}) as a:
            a.edit(Set(5, 1.0, positions=(2, place)))
            logits(model, some_ids())

    with pytest.raises(UserError, match=says):
        use()


def test_what_does_not_fit_is_refused_and_no_hook_stays_behind(model, sae):
    ids = some_ids()
    plain = logits(model, ids)
    wide = wsae.SAE(SAEConfig(d_in=8, d_sae=16, activation=TopK(k=2)))
    for saes, says in (
        ({HOOK: wide}, "'layers.0': 16 wide, and its SAE takes rows 8 wide"),
        ({"layer.0": sae}, r"no such module \(nearest: layers.0"),
        ({"layers.*": sae}, "names 2 modules"),
        ({HOOK: sae, "blocks.0.hook_resid_post": sae}, "the same place as 'layers.0'"),
    ):
        with pytest.raises(UserError, match=says), attach(model, saes):
            pass
    with (
        attach(model, {HOOK: sae}),
        pytest.raises(UserError, match="has SAEs attached"),
        attach(model, {"layers.1": sae}),
    ):
        pass

    def broken(_acts):
        raise ZeroDivisionError

    with attach(model, {HOOK: sae}) as a:
        a.edit(Set(5, 9.0))
        assert not torch.equal(logits(model, ids), plain)
        a.edit(Set(5, 9.0, condition=broken))
        with pytest.raises(ZeroDivisionError):
            logits(model, ids)
    with attach(model, {HOOK: sae}), pytest.raises(UserError, match="outside a call of its model"):
        model.model(input_ids=ids)
    assert torch.equal(logits(model, ids), plain)
    assert not any(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("named", ["default", "by name"])
def test_a_transcoder_reads_a_modules_input_and_changes_its_output(model, named):
    cfg = SAEConfig(d_in=WIDTH, d_sae=LATENTS, activation=TopK(k=4), d_out=WIDTH, skip=True)
    coder, ids = wsae.SAE(cfg, 1).requires_grad_(False), some_ids()
    coder.W_skip.normal_(generator=torch.Generator().manual_seed(2))
    hook, more = "layers.0.mlp.input", {}
    if named == "by name":  # what the norm gives is what the MLP takes
        hook = "layers.0.post_attention_layernorm"
        more = {"hook_out": {hook: "layers.0.mlp"}}
    mlp = model.model.layers[0].mlp
    with mlp.register_forward_hook(lambda _module, args, _out: coder(args[0])):
        wanted = logits(model, ids)
    with attach(model, {hook: coder}, error=False, exclude=None, **more):
        torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-5, atol=1e-5)
    latent = 7
    with mlp.register_forward_hook(
        lambda _module, args, out: (
            out + (2.0 - coder.encode(args[0])[..., latent, None]) * coder.W_dec[latent]
        )
    ):
        wanted = logits(model, ids)
    plain = logits(model, ids)
    with attach(model, {hook: coder}, exclude=None, **more) as a:
        assert torch.equal(logits(model, ids), plain)
        a.edit(Set(latent, 2.0))
        torch.testing.assert_close(logits(model, ids), wanted, rtol=1e-5, atol=1e-5)


def test_a_transcoder_that_does_not_say_what_it_changes_is_refused(model):
    cfg = SAEConfig(d_in=WIDTH, d_sae=LATENTS, d_out=WIDTH)
    with pytest.raises(UserError, match="hook_out=.*HOOK"), attach(model, {HOOK: wsae.SAE(cfg)}):
        pass
