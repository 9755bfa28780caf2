"""Transcoders and skip transcoders in training: their equations, the compiled step, preconditioners, scales, resume."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import wsae
from wsae.acts.source import AlignedSource, ArraySource
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.core.progress import quiet
from wsae.evals.config import EvalConfig
from wsae.sae import SAE, SAEConfig
from wsae.sae.config import make_activation
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import finished
from wsae.train.loop import run_steps
from wsae.train.run import start_family, train_run
from wsae.train.state import make_batch
from wsae.train.step import eager_step, start_decoder, unit_rows_

D_IN, D_OUT = 24, 17


def sides() -> tuple[Tensor, Tensor]:
    """Return a module's inputs and outputs, the outputs of another width, mean and scale."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(1200, D_IN, generator=g) + 2
    y = 40 * (x @ torch.randn(D_IN, D_OUT, generator=g)).relu() + 300
    return x, y


X, Y = sides()
BOTH = AlignedSource(ArraySource(X.numpy(), name="in"), ArraySource(Y.numpy(), name="out"))


def config(steps: int = 20, kernels: str = "eager", **fields: object) -> TrainConfig:
    setting = {"d_sae": 96, "activation": {"kind": "topk", "k": 4}, "lr": 3e-3, **fields}
    return TrainConfig.parse(
        {
            "members": (MemberConfig.parse(setting),),
            "tokens": steps * 100,
            "batch_size": 100,
            "kernels": kernels,
            "dead_after": 500,
            "hook_out": {"in": "out"},
        }
    )


def trained(**fields: object) -> tuple[SAE, dict[str, float]]:
    cfg = config(**fields)
    family = start_family(cfg, BOTH, BOTH.stats())
    (member,) = family.members["in"]
    member.sparse.fill_(True)
    with quiet("train", None, "tokens") as tick:
        run_steps(cfg, family, BOTH.stream(100, 0), 0, tick, lambda _: None)
    sums = {name: float(value) for name, value in member.sums.items()}
    return finished(member), sums


KINDS = ("topk", "group_topk", "batch_topk", "relu", "jumprelu")


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_step_descends_the_gradient_of_the_dense_equations(kind: str) -> None:
    cfg = config(activation=make_activation(kind, 4), skip=True, auxk=0, gamma={"rule": "variance"})
    (member,) = start_family(cfg, BOTH, BOTH.stats()).members["in"]
    sae, g = member.sae, torch.Generator().manual_seed(1)
    assert sae.W_skip is not None
    sae.W_skip.data.normal_(0, 0.1, generator=g)
    sae.W_dec.data.normal_(generator=g)
    with torch.no_grad():
        unit_rows_(sae)
    x, y = X[:100] / member.scale_in, Y[:100] / member.scale
    assert (member.scale_in, member.scale) == (1.0, 128.0)
    eager_step(member, make_batch(X[:100], member, Y[:100]), 0.0, cfg, 0)
    found = {name: p.grad.clone() for name, p in sae.named_parameters() if p.grad is not None}
    leaves = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    pre = x.double() @ leaves["W_enc_t"].T + leaves["b_enc"]
    z = sae.encode(x).double().detach() > 0 if kind != "batch_topk" else None
    if z is None:
        z = pre >= pre.detach().flatten().topk(400).values[-1]
    y_hat = (pre * z) @ leaves["W_dec"] + leaves["b_dec"] + x.double() @ leaves["W_skip"].T
    loss = ((y_hat - y) * sae.gamma.double()).square().sum() / 100
    loss.backward()
    for name in ("W_enc_t", "b_enc", "b_dec", "W_skip"):
        torch.testing.assert_close(found[name].double(), leaves[name].grad, rtol=1e-4, atol=1e-4)
    sse = (y_hat.detach() - y).square().sum() * member.scale**2
    assert float(member.sums["sse"]) == pytest.approx(float(sse), rel=1e-5)
    about = (Y[:100] - BOTH.stats()["out"].kept.mean).square().sum()
    assert float(member.sums["variance"]) == pytest.approx(float(about), rel=1e-5)
    radial = (leaves["W_dec"].grad * leaves["W_dec"]).sum(1, keepdim=True)
    tangent = leaves["W_dec"].grad - radial * leaves["W_dec"]
    torch.testing.assert_close(found["W_dec"].double(), tangent, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["topk", "gated", "jumprelu"])
def test_a_decoder_starts_along_its_errors_and_the_encoder_at_least_squares(kind: str) -> None:
    cfg = config(activation=make_activation(kind, 4))
    (member,) = start_family(cfg, BOTH, BOTH.stats()).members["in"]
    sae, batch = member.sae, make_batch(X[:300], member, Y[:300])
    before, code = sae.W_enc.detach().clone(), sae.encode(batch.x).double().detach()
    start_decoder(member, batch)
    error = (batch.target - sae.b_dec.detach()).double()
    sums = code.T @ error
    along = torch.nn.functional.normalize(sums, dim=1)
    torch.testing.assert_close(sae.W_dec.detach().double(), along, rtol=1e-4, atol=1e-5)
    others = sums - code[:, :, None] * error[:, None]  # without each row's own share
    made = torch.einsum("bj,bjd->bd", code, others / sums.norm(dim=1).clamp_min(1e-9)[:, None])
    scale = (made * error).sum() / (code @ along).square().sum()
    torch.testing.assert_close(sae.W_enc.detach(), before * scale.float(), rtol=1e-4, atol=1e-6)
    found = sae.encode(batch.x).detach().double()  # the same latents, each as much smaller
    torch.testing.assert_close(found, code * scale, rtol=1e-3, atol=1e-5)
    kept = sae.W_dec.detach().clone()
    start_decoder(member, make_batch(X[300:600], member, Y[300:600]))
    assert torch.equal(kept, sae.W_dec.detach())  # what has moved stays


CASES = {
    "skip, dead latents": {"skip": True, "lr": 3e-2},
    "whitened input": {"skip": True, "precondition": {"kind": "whiten"}},
    "whitened errors": {"gamma": {"rule": "whiten"}, "skip": True},
    "latent variance, batch": {
        "gamma": {"rule": "latent_variance"},
        "activation": {"kind": "batch_topk", "k": 4},
    },
    "jumprelu": {"activation": {"kind": "jumprelu", "threshold": 0.1}, "l0": 3e-3},
    "gated, skip": {"activation": {"kind": "gated"}, "l1": 0.05, "skip": True},
    "matryoshka, skip": {
        "activation": {"kind": "matryoshka", "k": 4, "widths": (8, 20)},
        "skip": True,
    },
}


def test_a_preconditioner_maps_what_is_read_and_gamma_weighs_what_is_given() -> None:
    cfg = config(precondition={"kind": "whiten"}, gamma={"rule": "variance"}, skip=True)
    (member,) = start_family(cfg, BOTH, BOTH.stats()).members["in"]
    train = BOTH.stats()["out"].kept.variance
    torch.testing.assert_close(
        member.sae.gamma.double(), train / train.square().mean().sqrt(), rtol=1e-5, atol=0
    )
    member.sae.W_skip.data.normal_(generator=torch.Generator().manual_seed(0))
    batch = make_batch(X[:50], member, Y[:50])
    whitened = batch.x * member.scale_in
    inner, outer = member.sae(batch.x) * member.scale, finished(member)(X[:50])
    torch.testing.assert_close(outer, inner, rtol=1e-4, atol=1e-2)
    assert float((torch.cov(whitened.T) - torch.eye(D_IN)).abs().max()) > 0.01  # not x itself
    assert torch.equal(finished(member).gamma, member.sae.gamma)


def test_a_stopped_run_ends_as_an_undisturbed_one(tmp_path: Path, monkeypatch) -> None:
    cfg = config(steps=12, kernels="auto", skip=True)
    whole = train_run(cfg, BOTH, tmp_path / "whole").saes["in"]

    class Halted(AlignedSource):
        def stream(self, *args):
            stream = super().stream(*args)
            inner, count = stream.next, iter(range(7))

            def counted():
                next(count, None) is None and (_ for _ in ()).throw(RuntimeError("halted"))
                return inner()

            stream.next = counted
            return stream

    parts = (ArraySource(X.numpy(), name="in"), ArraySource(Y.numpy(), name="out"))
    monkeypatch.setattr("wsae.train.loop.CHECKPOINT_SECONDS", -1.0)
    with pytest.raises(RuntimeError, match="halted"):
        train_run(cfg, Halted(*parts), tmp_path / "cut")
    resumed = train_run(cfg, BOTH, tmp_path / "cut", resume=True).saes["in"]
    for name, sae in whole.items():
        assert sae.cfg == SAEConfig(
            d_in=D_IN, d_sae=96, activation=sae.cfg.activation, d_out=D_OUT, skip=True
        )
        for key, tensor in sae.tensors().items():
            assert torch.equal(tensor, resumed[name].tensors()[key]), key


def test_fit_takes_a_target_and_evaluate_scores_it() -> None:
    sae = wsae.fit(X, target=Y, k=4, d_sae=96, skip=True, tokens=3000, batch_size=100)
    assert sae.decode(sae.encode(X[:3]), X[:3]).shape == (3, D_OUT)
    cfg = EvalConfig(n_latents=0, draws=100, random_control=False)
    found = wsae.evaluate(sae, X, cfg, target=Y)["metrics"]["fvu"]["value"]
    wanted = (sae(X) - Y).double().square().sum() / (Y - Y.mean(0)).double().square().sum()
    assert found == pytest.approx(float(wanted), rel=1e-4)
    with pytest.raises(UserError, match="a skip transcoder needs its input too"):
        sae.decode(sae.encode(X[:3]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: wsae.fit(X, target=Y[:-1]), "1199 training rows and .* 1200.*row by row"),
        (
            lambda: AlignedSource(*(ArraySource(np.ones((n, 2)), name=str(n)) for n in (545, 546))),
            "rows are not of the same tokens",  # 491 of each to train on
        ),
        (lambda: wsae.fit(X, skip=True), "skip: is of transcoders"),
        (lambda: wsae.fit(X, target=Y, tied=True), "tied: is of SAEs"),
        (lambda: wsae.evaluate(SAE(SAEConfig(d_in=24, d_sae=48, d_out=17)), X), "give its target"),
        (lambda: config().read(["in"]), "needs a module's input and its output"),
    ],
)
def test_one_side_alone_is_refused_in_one_line(call, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def test_two_files_of_the_same_rows_are_trained_and_evaluated_on(tmp_path: Path, capsys) -> None:
    for name, array in (("read", X), ("given", Y)):
        np.save(tmp_path / f"{name}.npy", array.numpy())
    out = str(tmp_path / "run")
    sides_ = [str(tmp_path / "read.npy"), "--hook-out", str(tmp_path / "given.npy")]
    shape = ["--d-sae", "96", "--k", "4", "--batch-size", "100", "--tokens", "1000", "--skip"]
    missing = ["--hook-out", str(tmp_path / "nothing.npy")]
    assert main(["train", sides_[0], *missing, *shape, "--out", out]) == 2
    assert "nothing.npy: no such file" in capsys.readouterr().err
    assert main(["train", *sides_, *shape, "--out", out]) == 0
    capsys.readouterr()
    weights = [Path(at) / "members/read/plain/sae.safetensors" for at in (out, f"{out}-again")]
    again = ["--config", f"{out}/config.json", "--out", f"{out}-again"]
    assert main(["train", *again]) == 0
    assert weights[0].read_bytes() == weights[1].read_bytes()
    for more, says in (
        (["--precondition", "residual"], "maps by the errors of what is read"),
        (["--labels", sides_[0]], "goes with an array file"),
    ):
        assert main(["train", *sides_, *shape, *more, "--out", f"{out}-no"]) == 2
        assert says in capsys.readouterr().err
    few = ["--draws", "10", "--n-latents", "0", "--no-random-control"]
    assert main(["evaluate", out, *few, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["hooks"]["read"]["members"]["plain"]
    sae = SAE.load(tmp_path / "run/members/read/plain").requires_grad_(False)
    held = ArraySource(X.numpy(), name="read").heldout_rows
    x, y = X[held], Y[held]
    fvu = (sae(x) - y).double().square().sum() / (y - y.mean(0)).double().square().sum()
    assert found["metrics"]["fvu"]["value"] == pytest.approx(float(fvu), rel=1e-4)
    assert main(["evaluate", out, "--source", sides_[0]]) == 2
    assert "a transcoder needs its input and its output" in capsys.readouterr().err
