"""Controls are ordinary SAEs and ordinary contexts: what they compute, recomputed another way."""

import numpy as np
import pytest
import torch
from acts_models import make_model, make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import load_language, reinitialised
from wsae.acts.live import LiveSource
from wsae.acts.source import ArraySource, StoreSource
from wsae.core.errors import UserError
from wsae.evals.control import (
    derangement,
    neurons,
    pca,
    random_model,
    shuffled,
)
from wsae.evals.interpret.windows import Collected, LatentContexts, Shown, Windows
from wsae.sae import TopK
from wsae.sae.config import GammaConfig
from wsae.stats.moments import Covariance, Moments
from wsae.train.config import MemberConfig, TrainConfig

HOOK = "layers.1"


def rows(n: int = 400, d_in: int = 6, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(d_in, d_in, generator=generator) * torch.logspace(0, 2, d_in)
    return torch.randn(n, d_in, generator=generator) @ mixing + 5


def statistics(x: torch.Tensor) -> tuple[Moments, Covariance]:
    moments, covariance = Moments(x.shape[1]), Covariance(x.shape[1])
    moments.update(x)
    covariance.update(x)
    return moments, covariance


def test_neurons_are_the_standardised_dimensions_with_both_signs() -> None:
    x = rows()
    moments, _ = statistics(x)
    z = neurons(moments.mean, moments.variance, l0=12.0).encode(x).numpy()
    wanted = (x.numpy() - x.numpy().mean(0)) / x.numpy().std(0)
    np.testing.assert_allclose(z[:, :6], np.maximum(wanted, 0), atol=2e-5)
    np.testing.assert_allclose(z[:, 6:], np.maximum(-wanted, 0), atol=2e-5)


def test_pca_latents_are_white_and_in_order_of_variance() -> None:
    x = rows()
    moments, covariance = statistics(x)
    sae = pca(moments.mean, covariance.covariance, l0=12.0)
    z = sae.encode(x).double()
    signed = z[:, :6] - z[:, 6:]
    np.testing.assert_allclose(signed.T @ signed / len(x), np.eye(6), atol=1e-3)
    lengths = sae.W_dec[:6].norm(dim=1).numpy()
    wanted = np.linalg.svd(x.numpy() - x.numpy().mean(0), compute_uv=False) / np.sqrt(len(x))
    np.testing.assert_allclose(lengths, wanted, rtol=1e-4)


@pytest.mark.parametrize("kind", ["neurons", "pca"])
def test_with_all_latents_a_direction_control_gives_the_rows_back(kind: str) -> None:
    x = rows()
    moments, covariance = statistics(x)
    sae = (
        neurons(moments.mean, moments.variance, 12.0)
        if kind == "neurons"
        else pca(moments.mean, covariance.covariance, 12.0)
    )
    torch.testing.assert_close(sae(x), x, rtol=1e-4, atol=1e-3)


@settings(max_examples=15)
@given(st.integers(1, 30))
def test_a_direction_control_is_as_sparse_as_it_is_told(l0: int) -> None:
    x = rows()
    moments, _ = statistics(x)
    z = neurons(moments.mean, moments.variance, float(l0)).encode(x)
    assert int((z != 0).sum(1).max()) <= min(l0, 12)
    strongest = z.amax(1)
    assert bool((strongest > 0).all()), "the largest deviation is always among the kept"


def test_a_constant_dimension_and_a_missing_direction_never_fire() -> None:
    x = rows()
    x[:, 2] = 3.0
    moments, covariance = statistics(x)
    z = neurons(moments.mean, moments.variance, 12.0).encode(x)
    assert not z[:, [2, 8]].any()
    z = pca(moments.mean, covariance.covariance, 12.0).encode(x)
    assert not z[:, [5, 11]].any(), "rounding is no direction"
    assert z[:, :5].any(0).all()


def some_contexts(n: int) -> Collected:
    windows = Windows(
        np.zeros((n, 4), np.int32),
        np.arange(n),
        np.zeros(n, np.int64),
        np.arange(n),
        lambda ids: [f" t{i}" for i in ids],
    )

    def shown(i: int) -> Shown:
        return Shown(np.array([i]), np.ones((1, 4), np.float32))

    latents = [LatentContexts(j, 0.1, 1.0, *(shown(j),) * 4) for j in range(n)]
    return Collected(windows, latents, {"few windows": 2}, left_out={98: "few windows"})


@settings(max_examples=25)
@given(st.integers(2, 40), st.integers(0, 10))
def test_nobody_keeps_their_own_explaining_windows_and_each_is_used_once(n: int, seed: int) -> None:
    own = some_contexts(n)
    other = shuffled(own, seed, "hook")
    givers = [int(latent.explain.window[0]) for latent in other.latents]
    assert sorted(givers) == list(range(n))
    assert all(giver != latent.latent for giver, latent in zip(givers, other.latents, strict=True))
    for before, after in zip(own.latents, other.latents, strict=True):
        assert after.positive is before.positive
        assert after.negative is before.negative
    assert givers == [int(j) for j in derangement_of(n, seed)]


def derangement_of(n: int, seed: int) -> list[int]:
    return [int(one.explain.window[0]) for one in shuffled(some_contexts(n), seed, "hook").latents]


def test_a_derangement_is_one_cycle() -> None:
    order = derangement(17, seed=3)
    seen, at = [], 0
    for _ in range(17):
        seen.append(at)
        at = int(order[at])
    assert at == 0
    assert sorted(seen) == list(range(17))


def test_a_lone_latent_has_no_other_s_windows_and_is_counted() -> None:
    other = shuffled(some_contexts(1), 0)
    assert other.latents == []
    assert other.skipped == {"alone": 1}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("random-model")
    model = make_model(root / "model")
    cfg = HarvestConfig(
        model=str(model),
        text=TextConfig(path=str(make_text(root / "text.jsonl", 120))),
        hooks=(HOOK,),
        seq_len=32,
        tokens=1500,
        heldout_tokens=300,
        heldout_fraction=0.3,
    )
    harvest(cfg, root / "store")
    return root, cfg, load_language(str(model))


def control(source, language, place, seed=0):
    """Train the plain member of a small family again, on the model with random weights."""
    members = tuple(
        MemberConfig(gamma=GammaConfig(rule=rule), d_sae=48, activation=TopK(k=4), label=rule)
        for rule in ("none", "variance")
    )
    train = TrainConfig(members=members, tokens=2000, batch_size=200)
    return random_model(source, language, train, "none", place, seed)


def test_fresh_weights_are_drawn_by_the_seed_and_the_trained_ones_stay(world) -> None:
    _, _, language = world
    before = {k: v.clone() for k, v in language.model.state_dict().items()}
    state = torch.get_rng_state()
    first, again, other = (reinitialised(language, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    name = "model.layers.1.mlp.gate_proj.weight"
    weights = [m.model.state_dict()[name] for m in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], before[name])
    assert all(torch.equal(v, before[k]) for k, v in language.model.state_dict().items())
    assert first.digest == again.digest != other.digest
    assert not any(p.requires_grad for p in first.model.parameters())


def test_the_control_is_the_plain_member_trained_on_the_random_model_s_rows(
    world, tmp_path
) -> None:
    root, cfg, language = world
    saes, live = control(StoreSource(root / "store"), language, tmp_path / "c")
    sae = saes[HOOK]
    assert (sae.cfg.d_sae, sae.cfg.activation.k) == (48, 4)
    assert not (tmp_path / "c" / "store").exists(), "activations are not kept"
    (chunk,) = live.heldout(10_000)
    true = next(StoreSource(root / "store").heldout(10_000))
    assert torch.equal(chunk.seq, true.seq), "the same text"
    assert torch.equal(chunk.pos, true.pos)
    apart = (chunk.x[HOOK] - true.x[HOOK]).square().sum() / true.x[HOOK].square().sum()
    assert apart > 0.5, "of another model"
    error = (sae(chunk.x[HOOK]) - chunk.x[HOOK]).square().sum()
    spread = (chunk.x[HOOK] - chunk.x[HOOK].mean(0)).square().sum()
    assert error < spread, "it was trained on this model"


def test_a_finished_control_is_opened_and_another_seed_makes_another(
    world, tmp_path, monkeypatch
) -> None:
    root, _, language = world
    source = StoreSource(root / "store")
    first, _ = control(source, language, tmp_path / "c")
    with monkeypatch.context() as patch:
        patch.setattr("wsae.train.run.train_run", None)
        again, _ = control(source, language, tmp_path / "c")
    assert torch.equal(first[HOOK].W_dec, again[HOOK].W_dec)
    other, _ = control(source, language, tmp_path / "c", seed=1)
    assert not torch.equal(first[HOOK].W_dec, other[HOOK].W_dec)


def test_a_killed_control_goes_on_and_ends_alike(world, tmp_path, monkeypatch) -> None:
    root, _, language = world
    source = StoreSource(root / "store")
    whole, _ = control(source, language, tmp_path / "whole")

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("wsae.train.run.train_run", killed)
        with pytest.raises(KeyboardInterrupt):
            control(source, language, tmp_path / "cut")
    assert (tmp_path / "cut" / "store" / "manifest.json").exists(), "the harvest is kept"
    cut, _ = control(source, language, tmp_path / "cut")
    assert torch.equal(cut[HOOK].W_dec, whole[HOOK].W_dec)


def test_a_live_run_needs_no_store_and_an_array_has_no_model(world, tmp_path) -> None:
    _, cfg, language = world
    live = LiveSource(cfg, language=language)
    made, _ = control(live, language, tmp_path / "live")
    assert set(made) == {HOOK}
    array = ArraySource(np.zeros((50, 16), dtype=np.float32), name=HOOK)
    for source, model in ((array, language), (live, None)):
        with pytest.raises(UserError, match="control random_model: .* leave it out"):
            control(source, model, tmp_path / "none")
