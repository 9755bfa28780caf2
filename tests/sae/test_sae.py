"""The SAE by its equations: every activation's definition, tied and untied, files, scaling."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wsae.api import fit
from wsae.core.errors import UserError
from wsae.evals.run import evaluate
from wsae.sae import SAE, SAEConfig, make_activation
from wsae.sae.architectures import jumprelu, step
from wsae.sae.config import JumpReLU, Matryoshka
from wsae.sae.forward import (
    Price,
    also_loss,
    penalty,
    training_forward,
    weighted_reconstruction_loss,
)

KINDS = (
    "topk",
    "group_topk",
    "multi_topk",
    "batch_topk",
    "matryoshka",
    "relu",
    "gated",
    "jumprelu",
)
FORMS = [
    (kind, tied) for kind in KINDS for tied in (False, True) if (kind, tied) != ("gated", True)
]
BY_K = ("topk", "group_topk", "multi_topk")


def make(kind: str, tied: bool = False, d_in: int = 6, d_sae: int = 16, k: int = 4) -> SAE:
    cfg = SAEConfig(d_in=d_in, d_sae=d_sae, activation=make_activation(kind, k), tied=tied)
    sae = SAE(cfg, seed=3).double()
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in sae.parameters():
            p += 0.3 * torch.randn(p.shape, generator=g, dtype=p.dtype)
        if kind == "jumprelu":
            sae.threshold.abs_()
        else:
            sae.threshold.fill_(0.7)
    return sae


def batch(n: int = 9, d_in: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(n, d_in, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@torch.no_grad()
def by_the_book(sae: SAE, x: Tensor) -> Tensor:
    """z, one number at a time."""
    b_enc = sae.b_enc if sae.b_enc is not None else torch.zeros(sae.cfg.d_sae)
    b_dec = sae.b_dec if sae.b_dec is not None else torch.zeros(sae.cfg.d_in)
    z = torch.zeros(len(x), sae.cfg.d_sae, dtype=torch.float64)
    for b in range(len(x)):
        pre = [float((x[b] - b_dec) @ sae.W_enc[:, j] + b_enc[j]) for j in range(sae.cfg.d_sae)]
        match sae.cfg.activation.kind:
            case "topk" | "multi_topk":
                on = sorted(range(len(pre)), key=lambda j: -pre[j])[: sae.cfg.activation.k]  # noqa: B023
            case "group_topk":
                size = len(pre) // sae.cfg.activation.k
                groups = [range(s, s + size) for s in range(0, len(pre), size)]
                on = [max(g, key=lambda j: pre[j]) for g in groups]  # noqa: B023
            case "batch_topk" | "matryoshka":
                on = [j for j, p in enumerate(pre) if p > float(sae.threshold)]
            case "relu":
                on = list(range(len(pre)))
            case "gated":
                on = [j for j, p in enumerate(pre) if p > 0]
                for j in on:
                    pre[j] = float((pre[j] - b_enc[j]) * sae.r_mag[j].exp() + sae.b_mag[j])
            case _:
                on = [j for j, p in enumerate(pre) if p > float(sae.threshold[j])]
        for j in on:
            z[b, j] = max(pre[j], 0.0) if sae.cfg.activation.kind != "jumprelu" else pre[j]
    return z


@pytest.mark.parametrize(("kind", "tied"), FORMS)
def test_encode_decode_and_forward_follow_the_definition(kind: str, tied: bool) -> None:
    sae, x = make(kind, tied), batch()
    z = by_the_book(sae, x)
    bias = 0 if tied else sae.b_dec
    torch.testing.assert_close(sae.encode(x), z)
    torch.testing.assert_close(sae.encode_code(x).dense(16), z)
    values, indices = sae.encode_sparse(x)
    torch.testing.assert_close(torch.zeros_like(z).scatter_add(1, indices, values.detach()), z)
    if kind in BY_K:
        assert values.shape == (9, 4)
        assert sae.encode_sparse(x[:0])[1].shape == (0, 4)
    torch.testing.assert_close(sae.decode(z), z @ sae.W_dec + bias)
    torch.testing.assert_close(sae(x), z @ sae.W_dec + bias)
    if tied:
        assert torch.equal(sae.W_enc, sae.W_dec.T)


@pytest.mark.parametrize(
    ("kind", "tied"), [form for form in FORMS if form[0] not in ("batch_topk", "matryoshka")]
)
def test_training_pass_equals_inference(kind: str, tied: bool) -> None:
    sae, x = make(kind, tied), batch()
    forward = training_forward(sae, x)
    torch.testing.assert_close(forward.x_hat, sae(x))
    torch.testing.assert_close(forward.code.dense(16), sae.encode(x))
    norms = sae.W_dec.norm(dim=1) if tied else torch.ones(16, dtype=torch.float64)
    price = penalty(forward.entries, Price(l1=1.0), len(x))
    if kind in ("topk", "group_topk", "relu"):
        torch.testing.assert_close(price, (sae.encode(x) * norms).sum(1).mean())
    if kind == "jumprelu":
        active = (sae.encode(x) > 0).double().sum(1).mean()
        torch.testing.assert_close(penalty(forward.entries, Price(l0=2.0), len(x)), 2 * active)


def test_batch_topk_trains_on_the_batch_and_infers_by_threshold() -> None:
    sae, x = make("batch_topk"), batch(32)
    code = training_forward(sae, x).code
    pre = sae.pre(sae.centre(x)).detach().relu()
    assert int((code.values > 0).sum()) == 32 * 4
    sae.threshold.fill_(float(pre.flatten().topk(32 * 4 + 1).values[-1]))
    torch.testing.assert_close(sae.encode(x).detach(), code.dense(16))
    torch.testing.assert_close(sae.encode(x[:1]), sae.encode(x)[:1])  # no dependence on the batch


@settings(max_examples=30, deadline=None)
@given(kind=st.sampled_from(KINDS), order=st.permutations(range(16)), seed=st.integers(0, 50))
def test_permuting_latents_permutes_codes_and_changes_no_reconstruction(
    kind: str, order: list[int], seed: int
) -> None:
    if kind == "group_topk":
        return  # its groups are contiguous: the order is part of the model
    sae, x = make(kind), batch(seed=seed)
    other = make(kind)
    tensors = sae.tensors()
    tensors |= {"W_enc": tensors["W_enc"][:, order], "W_dec": tensors["W_dec"][order]}
    for name, tensor in tensors.items():
        if tensor.shape == (16,):
            tensors[name] = tensor[order]
    other.set_tensors(tensors)
    torch.testing.assert_close(other.encode(x), sae.encode(x)[:, order])
    torch.testing.assert_close(other(x), sae(x))


@pytest.mark.parametrize(("kind", "tied"), FORMS)
def test_scaling_by_a_power_of_two_is_exact(kind: str, tied: bool) -> None:
    sae, x = make(kind, tied).float(), batch().float()
    scaled = sae.scaled(8.0)
    assert torch.equal(scaled.encode(8 * x), 8 * sae.encode(x))
    assert torch.equal(scaled(8 * x), 8 * sae(x))


@pytest.mark.parametrize(("kind", "tied"), FORMS)
def test_folding_the_decoders_norms_keeps_latents_up_to_them_and_reconstructions(
    kind: str, tied: bool
) -> None:
    sae, x = make(kind, tied), batch()
    if kind in BY_K:
        with pytest.raises(UserError, match=f"{kind} would choose other latents"):
            sae.fold_decoder_norm()
        with torch.no_grad():
            sae.W_dec *= 3 / sae.W_dec.norm(dim=1, keepdim=True)
    norm = sae.W_dec.norm(dim=1)
    folded = sae.fold_decoder_norm()
    torch.testing.assert_close(folded.W_dec.norm(dim=1), torch.ones_like(norm))
    torch.testing.assert_close(folded.encode(x), sae.encode(x) * norm)
    torch.testing.assert_close(folded(x), sae(x))
    assert (folded.dtype, folded.device) == (torch.float64, sae.device)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_of_length_1_in_half_precision_are_of_one_length(dtype: torch.dtype) -> None:
    sae = SAE(SAEConfig(d_in=32, d_sae=200, activation=make_activation("topk", 4))).to(dtype)
    lengths = sae.W_dec.double().norm(dim=1)
    assert lengths.max() / lengths.min() > 1 + 1e-4  # as rounding leaves them
    folded = sae.fold_decoder_norm()
    torch.testing.assert_close(folded.W_dec.double().norm(dim=1), lengths, rtol=0.02, atol=0)
    assert folded.dtype == dtype
    read = SAE(sae.cfg)  # as from a file: the same numbers in float32
    read.set_tensors(sae.tensors())
    read.fold_decoder_norm()
    for start in (sae, read):
        begun = fit(torch.randn(200, 32), 4, 200, tokens=200, batch_size=100, init_from=start)
        assert begun.dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_x_through_the_active_latents(kind: str) -> None:
    sae, x = make(kind), batch().requires_grad_()
    (grad,) = torch.autograd.grad((sae(x) * torch.arange(1.0, 7.0)).sum(), x)
    on = (sae.encode(x) != 0).double()
    back = (torch.arange(1.0, 7.0).double() @ sae.W_dec.T) * on
    back = back * sae.r_mag.exp() if kind == "gated" else back
    torch.testing.assert_close(grad, back @ sae.W_enc.T)


COMPILE = """
import torch
from wsae.sae import SAE, SAEConfig, make_activation
x = torch.randn(9, 6)
for kind in ("topk", "batch_topk", "jumprelu"):
    sae = SAE(SAEConfig(d_in=6, d_sae=16, activation=make_activation(kind, 4)))
    compiled = torch.compile(sae, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), sae(x))
"""


def test_it_compiles_as_one_graph() -> None:
    # in a process of its own: the checks of shapes that run in the tests do not compile
    subprocess.run([sys.executable, "-c", COMPILE], check=True, timeout=250)


@pytest.mark.parametrize(("kind", "tied"), FORMS)
def test_files_bring_back_the_same_sae(tmp_path: Path, kind: str, tied: bool) -> None:
    sae, x = make(kind, tied).float(), batch().float()
    sae.gamma.copy_(torch.rand(6))
    sae.save(tmp_path / "sae")
    back = SAE.load(tmp_path / "sae")
    assert back.cfg == sae.cfg
    for name, tensor in sae.tensors().items():
        assert torch.equal(tensor, back.tensors()[name]), name
    assert torch.equal(back(x), sae(x))


@pytest.mark.parametrize("kind", KINDS)
def test_pytorchs_own_ways_of_keeping_a_module_bring_back_the_same_sae(kind: str) -> None:
    sae, x = make(kind), batch()
    sae.set_gamma(torch.eye(6) + 1)  # as of the rule whiten
    other = SAE(sae.cfg).double()
    held = torch.nn.ModuleDict({"sae": other})
    held.load_state_dict(torch.nn.ModuleDict({"sae": sae}).state_dict())
    for again in (other, copy.deepcopy(sae), pickle.loads(pickle.dumps(sae))):
        assert torch.equal(again(x), sae(x))
        assert torch.equal(again.gamma, sae.gamma)


@pytest.mark.parametrize("theirs", ["config.json", "manifest.json"])
def test_an_sae_is_not_saved_over_a_run_a_store_or_a_model(tmp_path: Path, theirs: str) -> None:
    (tmp_path / theirs).write_text("{}")
    with pytest.raises(UserError, match=f"its {theirs} is of no SAE"):
        make("topk").save(tmp_path)
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [(theirs, "{}")]
    make("topk").save(tmp_path / "sae")
    other = make("relu")
    other.save(tmp_path / "sae")
    assert SAE.load(tmp_path / "sae").cfg == other.cfg


def test_damaged_or_foreign_files_are_refused(tmp_path: Path) -> None:
    make("topk").float().save(tmp_path / "sae")
    weights = tmp_path / "sae" / "sae.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 4
    weights.write_bytes(bytes(content))
    with pytest.raises(UserError, match=r"sae\.safetensors: checksum"):
        SAE.load(tmp_path / "sae")
    with pytest.raises(UserError, match="no such directory"):
        SAE.load(tmp_path / "nowhere")
    other = make("topk", d_sae=20)
    with pytest.raises(UserError, match=r"W_dec is \(16, 6\), config.json says \(20, 6\)"):
        other.set_tensors(
            {k: v for k, v in make("topk").tensors().items() if k != "b_enc"}
            | {"b_enc": torch.zeros(20)}
        )


@pytest.mark.parametrize(
    ("kind", "d_sae", "k", "says"),
    [
        ("topk", 8, 9, "k = 9 active latents of only d_sae = 8"),
        ("group_topk", 100, 32, "use d_sae 96 or 128"),
        ("matryoshka", 8, 9, "k = 9 active latents of only d_sae = 8"),
    ],
)
def test_k_that_does_not_fit_is_refused(kind: str, d_sae: int, k: int, says: str) -> None:
    data = {"d_in": 4, "d_sae": d_sae, "activation": {"kind": kind, "k": k}}
    with pytest.raises(UserError, match=says):
        SAEConfig.parse(data)


def test_width_mismatch_names_both_widths() -> None:
    with pytest.raises(UserError, match=r"\(2, 5\) where this SAE needs \[\.\.\., 6\]"):
        make("topk").encode(torch.zeros(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("kind", ["topk", "batch_topk", "jumprelu"])
def test_any_leading_axes_are_encoded_row_by_row(kind: str) -> None:
    sae = SAE(SAEConfig(d_in=6, d_sae=24, activation=make_activation(kind, 3)))
    x = torch.randn(2, 5, 6)
    z, values, indices = sae.encode(x), *sae.encode_sparse(x)
    flat = x.view(10, 6)
    assert torch.equal(z, sae.encode(flat).view(2, 5, 24))
    assert torch.equal(torch.zeros(2, 5, 24).scatter_add(2, indices, values), z)
    assert torch.equal(sae.decode(z), sae.decode(z.view(10, 24)).view(2, 5, 6))
    assert torch.equal(sae(x), sae(flat).view(2, 5, 6))
    torch.testing.assert_close(sae.encode(x[0, 0]), z[0, 0])
    assert sae.encode(x[:, :0]).shape == (2, 0, 24)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("kind", KINDS)
def test_an_sae_of_another_type_computes_in_it_and_is_saved(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    sae = SAE(SAEConfig(d_in=6, d_sae=24, activation=make_activation(kind, 3)))
    sae.threshold.data.fill_(0.25)
    x = torch.randn(40, 6, generator=torch.Generator().manual_seed(1))
    other = copy.deepcopy(sae).to(dtype)
    for batch in (x, x.double(), x.half(), x.numpy(), x.to(dtype)):
        x_hat = other(batch)
        assert x_hat.dtype == other.encode(batch).dtype == dtype
        near = (x_hat.float() - sae(x)).abs().amax(1) < 0.05
        assert near.float().mean() > 0.9  # at a tie another latent is chosen
    other.save(tmp_path / "sae")
    loaded = SAE.load(tmp_path / "sae")
    assert {t.dtype for t in loaded.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.W_dec, sae.W_dec, rtol=0.01, atol=0.01)
    assert set(evaluate(other, x)["metrics"]) == set(evaluate(sae, x)["metrics"])


def test_inputs_elsewhere_are_refused() -> None:
    sae = SAE(SAEConfig(d_in=6, d_sae=24, activation=make_activation("topk", 3)))
    with pytest.raises(UserError, match=r"input on meta, this SAE is on cpu; move one with .to"):
        sae.encode(torch.randn(2, 6, device="meta"))
    assert sae.to("meta").encode(torch.randn(2, 6, device="meta")).shape == (2, 24)


def test_untied_start_is_unit_decoder_and_its_transpose() -> None:
    sae = SAE(SAEConfig(d_in=5, d_sae=40), seed=4)
    torch.testing.assert_close(sae.W_dec.norm(dim=1), torch.ones(40))
    assert torch.equal(sae.W_enc, sae.W_dec.T)
    again = SAE(SAEConfig(d_in=5, d_sae=40), seed=4)
    assert torch.equal(sae.W_dec, again.W_dec)


def test_jumprelu_gradients_are_the_stated_estimators() -> None:
    width = 0.5
    pre = torch.linspace(-1, 2, 3001, dtype=torch.float64)[:, None].requires_grad_()
    threshold = torch.tensor([0.6], dtype=torch.float64, requires_grad=True)
    near = ((pre - threshold).abs() < width / 2).double().detach()
    (g_pre, g_threshold) = torch.autograd.grad(
        jumprelu(pre, threshold, width).sum(), (pre, threshold)
    )
    assert torch.equal(g_pre, (pre > threshold).double())
    assert float(g_threshold) == pytest.approx(float(-(0.6 / width) * near.sum()))
    (g_step,) = torch.autograd.grad(step(pre, threshold, width).sum(), threshold)
    # the rectangle integrates to 1: summing over a grid of spacing 1e-3 gives -1 / 1e-3
    assert float(g_step) * 1e-3 == pytest.approx(-1, rel=5e-3)
    assert JumpReLU(threshold=0.2).threshold == 0.2


@pytest.mark.parametrize("kind", ["multi_topk", "matryoshka", "gated"])
def test_the_plain_form_of_a_kind_has_the_same_latents(kind: str) -> None:
    sae, x = make(kind), batch()
    plain = sae.plain()
    assert plain.cfg.activation.kind == {"multi_topk": "topk", "matryoshka": "batch_topk"}.get(
        kind, "jumprelu"
    )
    torch.testing.assert_close(plain.encode(x), sae.encode(x))
    torch.testing.assert_close(plain(x), sae(x))
    assert plain.plain() is plain


def nested_losses(sae: SAE, x: Tensor, z: Tensor, widths: list[int]) -> Tensor:
    """The sum of the prefixes' losses, written out."""
    parts = [z[:, :w] @ sae.W_dec[:w] + sae.b_dec for w in widths]
    return sum((x - part).square().sum(1).mean() for part in parts)


@pytest.mark.parametrize("over", ["topk", "batch_topk"])
def test_matryoshka_adds_the_losses_of_every_prefix(over: str) -> None:
    activation = Matryoshka(k=4, widths=(2, 7), over=over)
    sae = SAE(SAEConfig(d_in=6, d_sae=16, activation=activation), seed=3).double()
    x = batch()
    forward = training_forward(sae, x)
    loss = weighted_reconstruction_loss(x, forward.x_hat, sae.gamma) + also_loss(
        x, forward, sae.gamma
    )
    pre = sae.pre(sae.centre(x))
    flat = pre if over == "topk" else pre.reshape(1, -1)
    index = flat.topk(4 if over == "topk" else 36, dim=1).indices
    z = (torch.zeros_like(flat).scatter(1, index, 1.0) * flat.relu()).view_as(pre)
    wanted = nested_losses(sae, x, z, [2, 7, 16])
    torch.testing.assert_close(loss, wanted)
    for ours, theirs in zip(
        torch.autograd.grad(loss, list(sae.parameters())),
        torch.autograd.grad(wanted, list(sae.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)


def test_multi_topk_adds_an_eighth_of_the_loss_with_four_times_the_latents() -> None:
    sae, x = make("multi_topk", k=3), batch()
    forward = training_forward(sae, x)
    pre = sae.pre(sae.centre(x))

    def loss_of(k: int) -> Tensor:
        index = pre.topk(k, dim=1).indices
        z = torch.zeros_like(pre).scatter(1, index, 1.0) * pre.relu()
        return (x - sae.decode(z)).square().sum(1).mean()

    torch.testing.assert_close(
        weighted_reconstruction_loss(x, forward.x_hat, sae.gamma), loss_of(3)
    )
    torch.testing.assert_close(also_loss(x, forward, sae.gamma), loss_of(12) / 8)
    torch.testing.assert_close(forward.code.dense(16), sae.encode(x))


def test_a_gates_own_reconstruction_leaves_the_decoder_alone() -> None:
    sae, x = make("gated"), batch()
    forward = training_forward(sae, x)
    gate = sae.pre(sae.centre(x)).relu()
    wanted = (x - (gate @ sae.W_dec.detach() + sae.b_dec.detach())).square().sum(1).mean()
    loss = also_loss(x, forward, sae.gamma)
    torch.testing.assert_close(loss, wanted)
    torch.testing.assert_close(
        penalty(forward.entries, Price(l1=0.3), len(x)), 0.3 * gate.sum(1).mean()
    )
    grads = torch.autograd.grad(loss, list(sae.parameters()), allow_unused=True)
    by_name = dict(zip((name for name, _ in sae.named_parameters()), grads, strict=True))
    assert by_name["W_dec"] is None
    (b_dec,) = torch.autograd.grad(wanted, sae.b_dec)  # through the encoder alone
    torch.testing.assert_close(by_name["b_dec"], b_dec)


@pytest.mark.parametrize(
    ("widths", "says"), [((4, 4), "4 4 do not increase"), ((4, 20), "4 20 exceed d_sae = 16")]
)
def test_widths_that_cannot_nest_are_refused(widths: tuple[int, ...], says: str) -> None:
    data = {"d_in": 4, "d_sae": 16, "activation": {"kind": "matryoshka", "k": 2, "widths": widths}}
    with pytest.raises(UserError, match=says):
        SAEConfig.parse(data)


def test_the_default_widths_are_those_of_the_paper() -> None:
    assert Matryoshka().nested(65_536) == (2048, 6144, 14_336, 30_720, 65_536)


def test_a_gated_sae_has_biases() -> None:
    with pytest.raises(UserError, match="cannot be tied"):
        SAEConfig.parse({"d_in": 4, "d_sae": 8, "activation": {"kind": "gated"}, "tied": True})


def test_files_of_earlier_versions_hold_a_logarithm(tmp_path: Path) -> None:
    sae = make("jumprelu").float()
    sae.save(tmp_path / "sae")
    old = sae.tensors()
    old["log_threshold"] = old.pop("threshold").clamp_min(1e-9).log()
    old["threshold"] = torch.zeros((), dtype=torch.float64)
    other = make("jumprelu").float()
    other.set_tensors(old)
    torch.testing.assert_close(other.threshold, sae.threshold.clamp_min(1e-9))
