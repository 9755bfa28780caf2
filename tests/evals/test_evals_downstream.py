"""Splicing reconstructions into a model, against one plain forward pass per variant computed by hand."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from acts_models import VOCABULARY, WIDTH, make_tokenizer, untrained
from torch import nn
from transformers import (
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from wsae.acts.capture import Capture, one_hook, splice
from wsae.core.errors import UserError
from wsae.evals import downstream
from wsae.evals.config import EvalConfig
from wsae.evals.downstream import (
    Place,
    SplicedSequence,
    splice_arrays,
    spliced_losses,
    unrecovered,
)
from wsae.sae import SAE, SAEConfig
from wsae.sae.config import ReLU, TopK

LENGTH = 12
BIG = 1 << 27


def llama():
    return untrained(LlamaForCausalLM, LlamaConfig, 3)


def neox():
    return untrained(GPTNeoXForCausalLM, GPTNeoXConfig, 3)


def sequences(n=4):
    g = torch.Generator().manual_seed(1)
    out = []
    for seq in range(n):
        ids = torch.randint(3, VOCABULARY, (LENGTH,), generator=g)
        kept = torch.rand(LENGTH, generator=g) > 0.3
        kept[0] = False
        target = torch.rand(LENGTH, generator=g) > 0.2
        out.append(SplicedSequence(10 + seq, ids, kept, target))
    return out


VARIANTS = {
    "zero": torch.zeros_like,
    "same": lambda x: x,
    "half": lambda x: 0.5 * x + 1,
    "noise": lambda x: x + torch.randn(x.shape, generator=torch.Generator().manual_seed(0)),
}


def losses_at(model, hook, *rest):
    return spliced_losses(model, Place(one_hook(model, hook)), *rest)


def direct(model, hook, sequence, replace):
    """[CE, KL] of one sequence from whole forward passes with the plain splice."""
    ids, kept = sequence.ids, sequence.kept

    def put(x, _call):
        new = x.clone()
        new[0, kept] = replace(x[0, kept])
        return new

    clean = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    with splice(model, hook, put):
        other = model(input_ids=ids[None]).logits[0].double().log_softmax(-1)
    scored = [t for t in range(len(ids) - 1) if sequence.target[t + 1]]
    ce = -sum(float(other[t, ids[t + 1]]) for t in scored)
    kl = sum(float(F.kl_div(other[t], clean[t], log_target=True, reduction="sum")) for t in scored)
    return ce, kl


@pytest.mark.parametrize("make", [llama, neox])
@pytest.mark.parametrize("hook", ["layers.1", "layers.1.mlp", "layers.2.mlp"])
def test_sae_equal_whole_forward_passes_one_variant_at_a_time(make, hook):
    model, data = make(), sequences()
    whole = [
        {name: direct(model, hook, full.trimmed(), replace) for name, replace in VARIANTS.items()}
        for full in data
    ]
    for max_logits in (BIG, 2 * VOCABULARY * LENGTH, 1):
        found = losses_at(model, hook, data, VARIANTS, max_logits)
        assert found.shared, "both families of models can share the layers before the hook"
        assert found.seq.tolist() == [10, 11, 12, 13]
        for i, full in enumerate(data):
            assert found.targets[i] == int(full.trimmed().target[1:].sum())
            for name, (ce, kl) in whole[i].items():
                assert float(found.ce[name][i]) == pytest.approx(ce, rel=1e-4)
                assert float(found.kl[name][i]) == pytest.approx(kl, rel=1e-3, abs=1e-5)
            assert float(found.ce_clean[i]) == pytest.approx(whole[i]["same"][0], rel=1e-4)


def test_a_transcoder_is_spliced_where_its_module_gives_from_what_it_takes():
    model, data = llama(), sequences(2)
    W = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(5))
    place = Place(one_hook(model, "layers.1.mlp"), one_hook(model, "layers.1.mlp.input"))
    found = spliced_losses(model, place, data, {"map": lambda x: x @ W}, BIG)
    assert found.shared
    for i, full in enumerate(data):
        s = full.trimmed()

        def put(_module, args, out, s=s):
            new = out.clone()
            new[0, s.kept] = args[0][0, s.kept] @ W
            return new

        with model.model.layers[1].mlp.register_forward_hook(put):
            logs = model(input_ids=s.ids[None]).logits[0].double().log_softmax(-1)
        scored = [t for t in range(len(s.ids) - 1) if s.target[t + 1]]
        ce = -sum(float(logs[t, s.ids[t + 1]]) for t in scored)
        assert float(found.ce["map"][i]) == pytest.approx(ce, rel=1e-4)


def mixtral():
    experts = {"num_key_value_heads": 2, "num_local_experts": 4}
    return untrained(MixtralForCausalLM, MixtralConfig, **experts)


def xlnet():
    torch.manual_seed(0)
    config = XLNetConfig(vocab_size=VOCABULARY, d_model=WIDTH, n_layer=2, n_head=2, d_inner=32)
    return XLNetLMHeadModel(config).eval().requires_grad_(False)


@pytest.mark.parametrize(
    ("make", "hook", "shared"),
    [
        (llama, "layers.1.self_attn.o_proj.input", True),
        (llama, "layers.1.input", True),
        (llama, "blocks.1.hook_resid_post", True),
        (mixtral, "layers.1.mlp.experts", False),
        (xlnet, "layer.1", None),
    ],
)
def test_inputs_and_other_orders_are_spliced_as_whole_forward_passes(make, hook, shared):
    model, data = make(), sequences(2)
    found = losses_at(model, hook, data, VARIANTS, BIG)
    assert shared is None or found.shared is shared
    for i, full in enumerate(data):
        for name, replace in VARIANTS.items():
            ce, kl = direct(model, hook, full.trimmed(), replace)
            assert float(found.ce[name][i]) == pytest.approx(ce, rel=1e-4)
            assert float(found.kl[name][i]) == pytest.approx(kl, rel=1e-3, abs=1e-5)


BESIDE = ("layers.2.mlp", "layers.1")
"""Not in the order in which they run."""


def beside(model):
    points = tuple(one_hook(model, name) for name in BESIDE)
    return Place(points[0], beside=points)


def two_saes():
    """Return an SAE for each hook, and the crosscoder that is both: its weights are theirs in blocks."""
    saes = [SAE(SAEConfig(d_in=WIDTH, d_sae=24, activation=ReLU()), seed) for seed in (0, 1)]
    parts = [{"name": name, "width": WIDTH} for name in BESIDE]
    cfg = SAEConfig(d_in=2 * WIDTH, d_sae=48, activation=ReLU(), sources=parts)
    both = SAE(cfg)
    for sae in saes:
        torch.nn.init.normal_(sae.requires_grad_(False).b_dec, std=0.3)
    one, other = (sae.tensors() for sae in saes)
    for name, tensor in both.state_dict().items():
        mine, theirs = (t.get(name, t["W_enc"].T) for t in (one, other))
        if name.startswith("W_"):
            tensor.copy_(torch.block_diag(mine, theirs))
        elif tensor.ndim:
            tensor.copy_(torch.cat([mine, theirs]))
    return saes, both


@pytest.mark.parametrize("max_logits", [BIG, 1])
def test_a_crosscoders_hooks_are_replaced_by_their_parts_of_an_untouched_passes_code(max_logits):
    model, data, (saes, both) = llama(), sequences(), two_saes()
    language = SimpleNamespace(model=model, tokenizer=make_tokenizer())
    cfg = EvalConfig(splice_logits=max_logits)
    mean = torch.zeros(2 * WIDTH, dtype=torch.float64)
    found = splice_arrays(language, beside(model), {"both": both}, mean, data, cfg)["both"]
    points = beside(model).beside
    for i, full in enumerate(data):
        s, clean = full.trimmed(), Capture(model, points)(full.trimmed().ids[None])
        for name, sae in zip(BESIDE, saes, strict=True):  # alone: as the SAE of that hook
            ce, kl = direct(model, name, s, sae)
            assert float(found[f"splice_ce[{name}]"][i]) == pytest.approx(ce, rel=1e-4)
            assert float(found[f"splice_kl[{name}]"][i]) == pytest.approx(kl, rel=1e-3, abs=1e-5)
            zero, _ = direct(model, name, s, torch.zeros_like)
            assert float(found[f"splice_ce_zero[{name}]"][i]) == pytest.approx(zero, rel=1e-4)

        first, last = (
            sae(clean[name][0, s.kept].clone()) for name, sae in zip(BESIDE, saes, strict=True)
        )

        def put(x, _call, s=s, first=first):
            new = x.clone()
            new[0, s.kept] = first
            return new

        with splice(model, points[0], put):
            whole, _ = direct(model, points[1], s, lambda _, last=last: last)
        assert float(found["splice_ce"][i]) == pytest.approx(whole, rel=1e-4)


def test_a_crosscoder_that_gives_all_back_costs_nothing():
    model, data = llama(), sequences()
    for alone in (None, *beside(model).beside):
        place = beside(model)._replace(alone=alone)
        found = spliced_losses(model, place, data, {"same": lambda x: x}, BIG)
        torch.testing.assert_close(found.ce["same"], found.ce_clean, rtol=1e-5, atol=0)


def test_a_perfect_reconstruction_costs_nothing_and_an_ablation_costs_something():
    found = losses_at(llama(), "layers.1", sequences(), VARIANTS, BIG)
    torch.testing.assert_close(found.ce["same"], found.ce_clean, rtol=1e-5, atol=0)
    assert found.kl["same"].abs().max() < 1e-4
    assert (found.kl["zero"] > 1e-3).all()
    assert all((kl > -1e-4).all() for kl in found.kl.values()), "KL is not negative"


def test_an_ablation_that_costs_nothing_is_named():
    model = llama()
    head = model.get_output_embeddings()
    head.weight.data = torch.zeros_like(head.weight)  # all tokens as likely, whatever is spliced
    sae, mean = SAE(SAEConfig(d_in=WIDTH, d_sae=WIDTH, activation=TopK(k=2))), torch.zeros(WIDTH)
    place, language = (
        Place(one_hook(model, "layers.1")),
        SimpleNamespace(model=model, tokenizer=make_tokenizer()),
    )
    found = splice_arrays(language, place, {"sae": sae}, mean.double(), sequences(), EvalConfig())
    zero, average = unrecovered("layers.1", found["sae"])
    nats = f"{np.log(VOCABULARY):.4g}"
    assert zero.startswith("layers.1: cross-entropy recovered (zero) is not defined")
    assert zero.endswith(f"({nats} nats a token, untouched {nats})")
    assert "(mean)" in average
    better = {**found["sae"], "splice_ce_zero": found["sae"]["splice_ce_zero"] + 1}
    assert unrecovered("layers.1", better) == [average]


def test_the_direction_is_kl_of_clean_from_spliced():
    clean = torch.tensor([[2.0, 0.0, -1.0]])
    other = torch.tensor([[0.0, 1.0, 0.5]])
    ce, kl = downstream._compare(clean, other, torch.tensor([1])).tolist()
    p, q = clean.softmax(-1)[0], other.softmax(-1)[0]
    assert ce == pytest.approx(-float(q[1].log()), rel=1e-5)
    assert kl == pytest.approx(float((p * (p / q).log()).sum()), rel=1e-5)
    assert kl != pytest.approx(float((q * (q / p).log()).sum()), rel=1e-2)


def test_skipped_positions_keep_their_true_activation():
    seen = []

    def watch(x):
        seen.append(len(x))
        return x

    data = sequences(1)
    losses_at(llama(), "layers.1", data, {"watch": watch}, BIG)
    assert seen == [int(data[0].kept.sum())]
    nothing = data[0]._replace(kept=torch.zeros(LENGTH, dtype=torch.bool))
    found = losses_at(llama(), "layers.1", [nothing, *data], VARIANTS, BIG)
    assert found.seq.tolist() == [10], "a sequence with nothing to replace is left out"


def test_a_model_that_cannot_be_widened_runs_once_per_variant():
    model = llama()

    class OneRow(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, **rest):
            if len(x) != 1:
                raise RuntimeError("one row only")
            return self.layer(x, **rest)

    hook = one_hook(model, "layers.1")
    model.model.layers[2] = OneRow(model.model.layers[2])
    data = sequences(2)
    found = spliced_losses(model, Place(hook), data, VARIANTS, BIG)
    assert not found.shared
    whole = losses_at(llama(), "layers.1", data, VARIANTS, BIG)
    for name in VARIANTS:
        torch.testing.assert_close(found.ce[name], whole.ce[name], rtol=1e-4, atol=0)


def test_a_model_that_mixes_batch_rows_is_not_widened():
    model = llama()

    class Mixing(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, **rest):
            return self.layer(x + torch.arange(len(x))[:, None, None], **rest)

    hook = one_hook(model, "layers.1")
    model.model.layers[2] = Mixing(model.model.layers[2])
    assert not spliced_losses(model, Place(hook), sequences(1), VARIANTS, BIG).shared


def test_no_hook_is_left_behind():
    model = llama()
    losses_at(model, "layers.1", sequences(1), VARIANTS, BIG)
    assert not any(module._forward_hooks for module in model.modules())


def test_nan_in_the_loss_names_the_variant():
    with pytest.raises(UserError, match=r"NaN or infinite with broken in place"):
        losses_at(
            llama(),
            "layers.1",
            sequences(1),
            {"same": lambda x: x, "broken": lambda x: x * torch.nan},
            BIG,
        )


def test_an_unknown_hook_names_the_nearest():
    with pytest.raises(UserError, match="layers"):
        losses_at(llama(), "layer.1", sequences(1), VARIANTS, BIG)
