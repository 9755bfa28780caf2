"""Preconditioners and residual rules: the map, its folding, its metrics, and what a pilot leaves."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf
from torch import Tensor

import wsae
from wsae.acts.source import ArraySource
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.evals.run import find_twins
from wsae.interop import load as load_export
from wsae.interop import save as save_export
from wsae.kernels.native.build import why_not
from wsae.sae import SAE
from wsae.sae.config import GammaConfig, PreconditionConfig, SAEConfig, make_activation
from wsae.sae.gamma import gamma_from_residual
from wsae.sae.precondition import Preconditioner
from wsae.stats.moments import Covariance
from wsae.train.config import MemberConfig, TrainConfig, family
from wsae.train.family import finished
from wsae.train.loop import Recorder, Stopped
from wsae.train.run import residuals, start_family, train_run
from wsae.train.state import make_batch, metrics_row
from wsae.train.step import train_step

D_IN = 16
QUICK = {"tokens": 2000, "batch_size": 100, "lr": 1e-2}
KERNELS = ["eager", "native"] if why_not() is None else ["eager"]
KINDS = ("topk", "group_topk", "batch_topk", "relu", "jumprelu")


def world(n: int = 1200, seed: int = 0) -> Tensor:
    """Activations with correlated dimensions of standard deviations from about 0.1 to 10, far from 0."""
    g = torch.Generator().manual_seed(seed)
    z = (torch.rand(n, 40, generator=g) < 0.1) * torch.rand(n, 40, generator=g)
    x = z @ torch.randn(40, D_IN, generator=g) + 0.1 * torch.randn(n, D_IN, generator=g)
    turned = torch.linalg.qr(torch.randn(D_IN, D_IN, generator=g))[0]
    return x * torch.logspace(-1, 1, D_IN) @ turned + 5


def covariance_of(x: Tensor) -> Covariance:
    found = Covariance(x.shape[1])
    found.update(x)
    return found


def preconditioner(kind: str = "whiten", power: float = 1.0, **fields: object) -> Preconditioner:
    cfg = PreconditionConfig.parse({"kind": kind, "power": power, **fields})
    return Preconditioner.of(cfg, covariance_of(world()))


def dense(map: Tensor) -> Tensor:  # noqa: A002
    return map if map.ndim == 2 else map.diag()


@pytest.mark.parametrize("kind", ["standardise", "whiten"])
def test_the_map_does_what_it_says(kind: str) -> None:
    C = torch.from_numpy(np.cov(world().double().numpy().T, bias=True))
    whole, half = (dense(preconditioner(kind, power, shrinkage=0.0).map) for power in (1.0, 0.5))
    mapped = whole @ C @ whole
    if kind == "whiten":
        torch.testing.assert_close(
            mapped, mapped[0, 0] * torch.eye(D_IN).double(), atol=1e-9, rtol=0
        )
    torch.testing.assert_close(
        mapped.diagonal(), mapped[0, 0].expand(D_IN), atol=1e-9, rtol=0
    )  # all variances are equal
    twice = half @ half  # half the way and half the way again
    torch.testing.assert_close(twice / twice.trace(), whole / whole.trace())
    assert float((whole @ whole).trace()) == pytest.approx(D_IN)
    assert torch.allclose(dense(preconditioner(kind, 0.0).map), torch.eye(D_IN).double())


@settings(max_examples=25, deadline=None)
@given(
    kind=st.sampled_from(["standardise", "whiten"]),
    power=st.floats(0, 1),
    activation=st.sampled_from(KINDS),
    matrix=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_a_folded_sae_has_the_same_latents_and_gives_x_hat(kind, power, activation, matrix, seed):
    inside = preconditioner(kind, power)
    g = torch.Generator().manual_seed(seed)
    cfg = SAEConfig(d_in=D_IN, d_sae=24, activation=make_activation(activation, 4))
    sae = SAE(cfg, seed)
    sae.threshold.data.fill_(0.05)
    sae.b_enc.data.normal_(0, 0.1, generator=g)
    sae.b_dec.data.normal_(generator=g)
    if matrix:
        sae.set_gamma(torch.randn(D_IN, D_IN, generator=g))
    x = world(200, seed).double()
    y = x @ dense(inside.map)
    scale = float(y.std())
    sae.b_dec.data.copy_(y.mean(0) / scale)
    sae = sae.scaled(scale).double()
    folded = inside.fold(sae).double()
    with torch.no_grad():
        z = sae.encode(y)
        torch.testing.assert_close(folded.encode(x), z, atol=1e-5 * scale, rtol=1e-5)
        error, inner = x - folded(x), y - sae(y)
        torch.testing.assert_close(error @ dense(inside.map), inner, atol=1e-4 * scale, rtol=1e-4)
        outer = error @ dense(folded.gamma).T  # the loss is the same number
        weighed = inner @ dense(sae.gamma).T
        torch.testing.assert_close(outer.square().sum(), weighed.square().sum(), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("n", "d"), [(50, 20), (30, 40), (2000, 7)])
def test_shrinkage_is_that_of_ledoit_and_wolf_however_the_rows_are_split(n: int, d: int) -> None:
    g = torch.Generator().manual_seed(n)
    x = (torch.randn(n, d, generator=g).double() * torch.linspace(0.1, 3, d) + 7).square()
    first, second = Covariance(d), Covariance(d)
    for part in x[: n // 3].split(7):
        first.update(part)
    second.update(x[n // 3 :])
    first.merge(second)
    theirs, share = ledoit_wolf(x.numpy())
    assert first.ledoit_wolf() == pytest.approx(share, rel=1e-9)
    P = Preconditioner.of(PreconditionConfig(kind="whiten", shrinkage="ledoit-wolf"), first).map
    white = P @ torch.from_numpy(theirs) @ P
    torch.testing.assert_close(white / white[0, 0], torch.eye(d).double(), atol=1e-7, rtol=0)


def member(kind: str | None = "whiten", power: float = 1.0, **fields: object) -> MemberConfig:
    return wsae.Member(
        k=4, d_sae=48, precondition=kind or "none", **({"power": power} if kind else {}), **fields
    )


def config(*members: MemberConfig, **fields: object) -> TrainConfig:
    data = {"members": tuple(members), "tokens": 2000, "batch_size": 100, **fields}
    return TrainConfig.parse(data)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(
    "fields",
    [
        {"kind": "whiten", "power": 0.5},
        {"kind": "standardise", "gamma": "variance", "alpha": 0.5},
        {"kind": "whiten", "gamma": "whiten"},
        {"kind": "whiten", "power": 0.5, "activation": "jumprelu"},
    ],
    ids=["half", "standardised-weighted", "matrix", "jumprelu"],
)
def test_a_step_is_that_of_an_sae_of_mapped_activations(fields: dict, kernels: str) -> None:
    mapped = {key: fields[key] for key in ("kind", "power") if key in fields}
    rest = {key: value for key, value in fields.items() if key not in mapped}
    x, steps = world(), {"lr": 1e-2, **rest}
    cfg = config(member(**mapped, **steps), kernels=kernels, seed=3)
    source = ArraySource(x, heldout_fraction=0.0)
    inner = start_family(cfg, source, source.stats()).members["acts"][0]
    assert inner.inside is not None
    y = x.double() @ dense(inner.inside.map.double())
    run = {"tokens": 2000, "batch_size": 100, "kernels": kernels, "seed": 3}
    alone = wsae.fit_family(y.float(), member(None, **steps), **run)
    ours = wsae.fit_family(x, cfg.members[0], **run)
    with torch.no_grad():
        z, there = ours.saes[0].encode(x), alone.saes[0].encode(y)
    agree = ((z > 0) == (there > 0)).float().mean()
    assert agree > 0.995, "other latents are active"
    both = (z > 0) & (there > 0)
    torch.testing.assert_close(z[both], there[both], rtol=0.02, atol=0.02 * float(there.max()))


@pytest.mark.parametrize("kernels", KERNELS)
def test_training_tells_the_error_in_x_itself(kernels: str) -> None:
    x = world(1600)
    source = ArraySource(x, heldout_fraction=0.0)
    cfg = config(member(power=0.5), batch_size=1600, tokens=1600, kernels=kernels)
    (state,) = start_family(cfg, source, source.stats()).members["acts"]
    sae = state.inside.fold(state.sae.scaled(state.scale))
    with torch.no_grad():  # before the step: its metrics are of the weights it starts from
        error, spread = (x - sae(x)).double(), (x - x.mean(0)).double()
    train_step(state, make_batch(x, state), 0, cfg)
    first = slice(
        0, 1600 if kernels == "eager" else 100
    )  # the fast kernels look at one row in sixteen
    expected = error[first].square().sum() / spread[first].square().sum()
    row = metrics_row(state)
    assert row["fvu"] == pytest.approx(float(expected), rel=1e-4)
    weighed, spread = error @ dense(sae.gamma).double().T, spread @ dense(sae.gamma).double().T
    expected = weighed.square().sum() / spread.square().sum()
    assert row["fvu_weighted"] == pytest.approx(float(expected), rel=1e-4)


def test_in_bfloat16_the_map_is_the_rounded_one_and_folding_takes_it_back() -> None:
    source = ArraySource(world(1600), heldout_fraction=0.0)
    cfg = config(member(power=1.0), member(power=1.0, seed=1), dtype="bfloat16")
    state, second = start_family(cfg, source, source.stats()).members["acts"]
    exact = start_family(config(member(power=1.0)), source, source.stats()).members["acts"][0]
    P, x = state.inside.map.double(), world(1600).bfloat16()
    assert second.inside is state.inside, "one batch serves both"
    assert float(((P - exact.inside.map.double()).abs() / P.abs()).max()) <= 2**-8
    y = state.inside.rows(x.float())
    torch.testing.assert_close(y.double(), x.double() @ P, rtol=2**-8, atol=2**-8 * float(y.std()))
    for step in range(20):
        train_step(state, make_batch(x.float(), state), step, cfg)
    folded = finished(state)
    inner = state.sae.scaled(state.scale)
    with torch.no_grad():
        z, there = folded.encode(x.float()), inner.encode((x.double() @ P).float())
    torch.testing.assert_close(z, there, rtol=1e-3, atol=1e-4 * float(there.max()))


def test_a_stopped_run_resumes_bit_for_bit(tmp_path: Path, monkeypatch) -> None:
    again = member(None, gamma="residual_covariance", rounds=2)
    members = member(power=0.5), member("standardise", gamma="residual"), again, member("residual")
    cfg, source = config(*members), ArraySource(world())
    train_run(cfg, source, tmp_path / "whole")
    normal = Recorder.on_step

    def halting(recorder: Recorder, done: int) -> None:
        recorder.stop = done == 7
        normal(recorder, done)

    monkeypatch.setattr(Recorder, "on_step", halting)
    with pytest.raises(Stopped, match="step 7 of 20"):
        train_run(cfg, source, tmp_path / "cut")
    monkeypatch.setattr(Recorder, "on_step", normal)
    train_run(cfg, source, tmp_path / "cut", resume=True)
    whole, cut = (
        {p.relative_to(run): p.read_bytes() for p in run.rglob("*.safetensors")}
        for run in (tmp_path / "whole", tmp_path / "cut")
    )
    assert whole == cut
    assert len(whole) == 4


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("saelens", "topk"),
        ("sparsify", "topk"),
        ("dictionary_learning", "batch_topk"),
        ("saelens", "jumprelu"),
    ],  # fmt: skip
)
def test_every_format_takes_a_folded_sae(tmp_path: Path, name: str, kind: str) -> None:
    x = world()
    sae = wsae.fit(x, k=4, d_sae=48, precondition="whiten", power=1.0, activation=kind, **QUICK)
    folder = save_export(sae, tmp_path / "sae", name)
    for ours in ("manifest.json", "wsae.safetensors"):
        (folder / ours).unlink()
    alone = load_export(folder).sae
    with torch.no_grad():
        z = sae.encode(x)
        torch.testing.assert_close(alone.encode(x), z, atol=1e-5 * float(z.max()), rtol=1e-5)
        torch.testing.assert_close(alone(x), sae(x), atol=1e-3, rtol=1e-4)


def test_the_record_says_how_the_map_was_made(tmp_path: Path) -> None:
    cfg = config(*family([member(power=0.5, shrinkage="ledoit-wolf")]))
    assert cfg.names() == ["plain", "whiten-input-p0.5-shrinkledoit-wolf"]
    assert find_twins(cfg) == {cfg.names()[1]: "plain"}
    source = ArraySource(world(), heldout_fraction=0.0)
    run = wsae.Run(train_run(cfg, source, tmp_path / "run").path)
    record = run.gamma_record["acts"][cfg.names()[1]]["precondition"]
    assert (record["kind"], record["rows"]) == ("whiten", 1200)
    C, share = ledoit_wolf(world().double().numpy())
    assert record["shrunk"] == pytest.approx(share, rel=1e-3)
    P = run.saes["acts"][cfg.names()[1]].gamma.double()  # without weights gamma is the map itself
    whole = torch.linalg.matrix_power(P, 4) @ torch.from_numpy(C)
    torch.testing.assert_close(whole / whole[0, 0], torch.eye(D_IN).double(), atol=1e-2, rtol=0)
    before = np.linalg.eigvalsh(C)
    assert record["condition"] == pytest.approx((before[-1] / before[0]) ** 0.25, rel=1e-3)


def test_a_residual_map_is_made_of_what_a_plain_sae_leaves() -> None:
    x = world()
    source = ArraySource(x, heldout_fraction=0.0)
    members = member("residual", power=0.5, shrinkage=0.1), member("residual", gamma="variance")
    first, second = start_family(config(*members, seed=2), source, source.stats()).members["acts"]
    run = {"tokens": 500, "batch_size": 100, "seed": 2}
    (pilot,) = wsae.fit_family(source, member(None), **run).saes
    with torch.no_grad():
        left = torch.cov((x - pilot(x)).double().T, correction=0)
    for state, root, ridge in ((first, 4, 0.1), (second, 2, 0.01)):
        P = torch.linalg.matrix_power(state.inside.map.double(), root)
        whole = P @ (left + ridge * left.diagonal().mean() * torch.eye(D_IN))
        torch.testing.assert_close(whole / whole[0, 0], torch.eye(D_IN).double(), atol=1e-3, rtol=0)
        mapped = x.double() @ state.inside.map.double()
        torch.testing.assert_close(
            state.mean.double() * state.scale, mapped.mean(0), rtol=1e-4, atol=1e-4
        )


def test_one_pilot_serves_all_that_differ_in_weights_and_maps_alone() -> None:
    source = ArraySource(world(), heldout_fraction=0.0)
    members = [member("residual", power=power) for power in (0.5, 1.0)]
    members += [member(None, gamma="residual"), member("residual", seed=5)]
    cfg = config(*members)
    left = residuals(cfg, source, source.stats(), {})["acts"]
    half, whole, weighted, other = (left[name] for name in cfg.names())
    assert half is whole
    assert half is weighted
    assert not torch.equal(half.covariance, other.covariance)


def test_what_a_residual_map_does_not_go_with_is_told() -> None:
    x = world()
    begun = wsae.fit(x, k=4, d_sae=48, **QUICK)
    with pytest.raises(UserError, match="leave out one of --precondition and --init-from"):
        wsae.fit(x, k=4, d_sae=48, init_from=begun, precondition="residual", **QUICK)
    with pytest.raises(UserError, match="a transcoder's are of what it gives; use whiten"):
        config(member("residual"), hook_out={"here": "there"})


def test_residual_weights_are_one_over_what_is_left() -> None:
    e = torch.randn(5000, 4, generator=torch.Generator().manual_seed(0)).double()
    turned = torch.linalg.qr(torch.ones(4, 4).double() + torch.eye(4))[0]
    e = e * torch.tensor([1.0, 2.0, 4.0, 8.0]) @ turned
    C = np.cov(e.numpy().T, bias=True)
    cfg = GammaConfig(rule="residual", ridge=0.0)
    expected = 1 / np.sqrt(np.diag(C))
    found = gamma_from_residual(cfg, torch.from_numpy(C)).numpy()
    np.testing.assert_allclose(found / found[0], expected / expected[0], rtol=1e-12)
    matrix = GammaConfig(rule="residual_covariance", ridge=0.0)
    M = gamma_from_residual(matrix, torch.from_numpy(C)).numpy()
    precision = np.linalg.inv(C)  # Gauss and Markov
    np.testing.assert_allclose(
        M.T @ M / np.trace(M.T @ M), precision / np.trace(precision), rtol=1e-9
    )


def test_a_pilot_finds_the_noisy_dimensions_and_round_two_looks_again() -> None:
    g = torch.Generator().manual_seed(0)
    z = (torch.rand(6000, 12, generator=g) < 0.1) * torch.rand(6000, 12, generator=g) * 5
    noise = torch.tensor([0.05] * 6 + [1.0] * 6) * torch.randn(6000, 12, generator=g)
    x = z @ torch.nn.functional.normalize(torch.randn(12, 12, generator=g)) + noise
    members = [wsae.Member(gamma="residual", rounds=r, k=2, d_sae=24, lr=1e-2) for r in (None, 2)]
    found = wsae.fit_family(x, members, tokens=40_000, batch_size=200)
    for sae in found.saes:
        assert float(sae.gamma[:6].min()) > 1.2 * float(sae.gamma[6:].max())
    assert not torch.equal(found.saes[0].gamma, found.saes[1].gamma)
    again = wsae.fit_family(x, members, tokens=40_000, batch_size=200)
    assert torch.equal(found.saes[1].gamma, again.saes[1].gamma)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"precondition": "whiten", "tied": True}, "does not go with tied weights"),
        ({"precondition": "whiten", "power": 1.5}, "power"),
        ({"power": 0.5}, "power is of a preconditioner; give precondition"),
        ({"precondition": "sphere"}, "'standardise', 'whiten' or 'residual'"),
        ({"precondition": "residual", "gamma": "residual"}, "leave one of them out"),
        ({"precondition": "whiten", "gamma": "consistency"}, "leave the preconditioner out"),
        ({"gamma": "variance", "rounds": 2}, "rounds belong to the residual rules"),
        ({"gamma": "residual_covariance", "robust": "rank"}, "use a larger ridge"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(fields: dict, says: str) -> None:
    with pytest.raises(UserError, match=says):
        wsae.Member(**fields)


def test_bad_data_are_named_in_one_line() -> None:
    x = world()
    with pytest.raises(UserError, match="16 rows cannot give the covariance of 16 dimensions"):
        wsae.fit(x[:16], precondition="whiten", k=4, d_sae=32, tokens=160, batch_size=16)
    x[:, 3] = 7.0
    for kind, what in (("whiten", "directions"), ("standardise", "dimensions")):
        with pytest.raises(
            UserError, match=f"precondition {kind}: 1 of 16 {what} have no variance"
        ):
            wsae.fit(x, precondition=kind, shrinkage=0.0, k=4, d_sae=32, **QUICK)
        sae = wsae.fit(x, precondition=kind, k=4, d_sae=32, **QUICK)  # a ridge lets it pass
        assert bool(torch.isfinite(sae(x)).all())
    made_for = {"shrinkage": "ledoit-wolf", "tokens": 120, "batch_size": 12}
    few = wsae.fit(world(12), precondition="whiten", k=4, d_sae=32, **made_for)
    assert bool(torch.isfinite(few.W_dec).all())


def test_the_command_line_trains_each_power_beside_the_twin(tmp_path: Path, capsys) -> None:
    np.save(tmp_path / "x.npy", world(600).numpy())
    words = ["train", str(tmp_path / "x.npy"), "--d-sae", "32", "--k", "4", "--batch-size", "100"]
    mapped = ["--gamma", "none", "--precondition", "whiten", "--power", "0.5", "1"]
    assert main([*words, "--out", str(tmp_path / "run"), *mapped]) == 0
    names = ["plain", "whiten-input-p0.5", "whiten-input-p1"]
    assert list(wsae.Run(tmp_path / "run").saes["x"]) == names
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "run"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["hooks"]["x"]
    compared = {(line["a"], line["b"]) for line in found["comparisons"]}
    assert compared >= {(name, "plain") for name in names[1:]}
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]) == 0
    assert "whitened input (power " in (tmp_path / "r.html").read_text()
    for flags, says in (
        (["--power", "0.3"], "--power 0.3: is of a preconditioner"),
        (["--shrinkage", "0.3"], "--shrinkage 0.3: is of a preconditioner"),
        (["--precondition", "whiten", "--power", "2"], "--power: Input should be less"),
    ):
        assert main([*words, "--out", str(tmp_path / "no"), *flags]) == 2
        assert says in capsys.readouterr().err
    assert not (tmp_path / "no").exists()
