"""The toy model: gradients against autograd, a member against its lone run, and the results that are known."""

import math
import threading
from contextlib import AbstractContextManager, nullcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.core.errors import UserError
from wsae.toy import model as descent
from wsae.toy.config import (
    Correlated,
    DecayingImportance,
    EqualImportance,
    ToyModelConfig,
)
from wsae.toy.model import (
    AdamW,
    Gradients,
    Parameters,
    ToyModels,
    importances,
    initial,
    lr_factor,
    toy_loss,
    train_toy_models,
)
from wsae.toy.world import superposition

PLANE = {"d_in": 2, "steps": 1500, "lr": 5e-3, "decay": 0.5, "batch": 256}


def config(n: int = 6, sparsity: float = 0.5, **fields) -> ToyModelConfig:
    features = {"n_features": n, "sparsity": sparsity, **fields.pop("features", {})}
    data = {"features": features, "d_in": 3, "steps": 20, "batch": 16, "lr": 0.02, **fields}
    return ToyModelConfig.parse(data)


def random_parameters(seed: int, models: int, d_in: int, n: int, rows: int):
    made = torch.Generator().manual_seed(seed)
    W_p, b, weight, x = (
        torch.randn(*shape, generator=made, dtype=torch.float64)
        for shape in ((models, d_in, n), (models, n), (models, n), (models, rows, n))
    )
    return Parameters(W_p, b), weight.abs(), x.relu()


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    models=st.integers(1, 4),
    d_in=st.integers(1, 4),
    n=st.integers(1, 7),
    rows=st.integers(1, 9),
)
def test_gradients_are_those_of_autograd(seed, models, d_in, n, rows):
    parameters, weight, x = random_parameters(seed, models, d_in, n, rows)
    leaves = [t.clone().requires_grad_() for t in parameters]
    h = torch.einsum("mrn,mdn->mrd", x, leaves[0])
    x_hat = (torch.einsum("mrd,mdn->mrn", h, leaves[0]) + leaves[1][:, None]).relu()
    loss = (weight[:, None] * (x - x_hat) ** 2).mean((1, 2))
    torch.testing.assert_close(toy_loss(parameters, weight, x), loss.detach())
    expected = torch.autograd.grad(loss.sum(), leaves)
    found = parameters.zeros()
    Gradients(models + 1, rows, parameters)(parameters, weight, x, found)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-12)


def test_updates_are_those_of_torchs_adamw():
    parameters, _, _ = random_parameters(0, 2, 3, 4, 1)
    leaves = [t.clone().requires_grad_() for t in parameters]
    theirs = torch.optim.AdamW(leaves, lr=1.0, weight_decay=0.3)
    ours, made = AdamW(parameters, 0.3), torch.Generator().manual_seed(1)
    for step in range(25):
        gradients = [torch.randn(t.shape, generator=made, dtype=t.dtype) ** 3 for t in leaves]
        theirs.param_groups[0]["lr"] = lr = 0.01 * (1 + step % 4)
        for leaf, gradient in zip(leaves, gradients, strict=True):
            leaf.grad = gradient
        theirs.step()
        ours.step(Parameters(*gradients), lr)
    for one, other in zip(parameters, leaves, strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("cache_bytes", [1, 5_000, descent._CACHE_BYTES])
@pytest.mark.parametrize("threads", [1, 2])
def test_a_member_equals_its_lone_run(monkeypatch, cache_bytes, threads):
    """Whatever the others are, however they are cut into chunks, on however many cores."""
    monkeypatch.setattr(descent, "_CACHE_BYTES", cache_bytes)
    cfgs = [
        config(seed=0),
        config(seed=0, sparsity=0.9),
        config(seed=1, importance={"kind": "decay", "base": 0.8}),
        config(seed=2, features={"structure": Correlated(), "magnitudes": "exponential"}),
        config(seed=1, sparsity=0.0),
    ]
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        together = train_toy_models(cfgs, dtype=torch.float64)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    for i, cfg in enumerate(cfgs):
        lone = train_toy_models([cfg], dtype=torch.float64)
        for name in ("W_p", "b", "loss"):
            ours, theirs = getattr(together, name)[i], getattr(lone, name)[0]
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


def test_a_run_is_gradient_descent_written_plainly():
    """The whole loop again with autograd and torch's AdamW on the same rows."""
    cfg = config(n=5, decay=0.5, importance={"kind": "decay", "last": 0.1}, seed=3)
    start = initial([cfg], "cpu", torch.float64)
    leaves = [t[0].clone().requires_grad_() for t in start]
    optimiser = torch.optim.AdamW(leaves, lr=cfg.lr, weight_decay=cfg.weight_decay)
    from wsae.core.seeds import seed_for
    from wsae.toy.features import FeatureStream

    def rows(use: str, step: int) -> torch.Tensor:
        return (
            FeatureStream([cfg.features], [seed_for(3, "toy", use)], cfg.batch)
            .batch(step)[0]
            .double()
        )

    def loss_of(x: torch.Tensor) -> torch.Tensor:
        error = x - torch.relu(x @ leaves[0].T @ leaves[0] + leaves[1])
        return (error.square() * importances(cfg)).mean()

    for step in range(cfg.steps):
        optimiser.param_groups[0]["lr"] = cfg.lr * min(1.0, (20 - step) / 10)
        optimiser.zero_grad()
        loss_of(rows("train", step)).backward()
        optimiser.step()
    found = train_toy_models([cfg], dtype=torch.float64)
    torch.testing.assert_close(found.W_p[0], leaves[0].detach(), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(found.b[0], leaves[1].detach(), rtol=1e-9, atol=1e-11)
    with torch.no_grad():
        fresh = torch.stack([loss_of(rows("eval", step)) for step in range(20)]).mean()
    torch.testing.assert_close(found.loss[0], fresh)


def test_learning_rates_and_importances_by_hand():
    assert [lr_factor(s, 10, 0.5) for s in (0, 5, 6, 9)] == [1.0, 1.0, 0.8, 0.2]
    assert {lr_factor(s, 10, 0.0) for s in range(10)} == {1.0}
    assert importances(config(n=3)).tolist() == [1, 1, 1]
    decayed = config(n=3, importance=DecayingImportance(base=0.5))
    assert importances(decayed).tolist() == [1, 0.5, 0.25]
    ended = config(n=3, importance=DecayingImportance(last=0.01))
    np.testing.assert_allclose(importances(ended), [1, 0.1, 0.01])
    assert importances(config(n=1, importance=DecayingImportance(last=0.01))).tolist() == [1]


def test_progress_counts_every_model_step():
    counted = []

    def progress(task: str, total: int | None, unit: str, done: int = 0) -> AbstractContextManager:
        counted.extend([f"{task}, {unit}", total, done])
        return nullcontext(lambda n, **_: counted.append(n))

    train_toy_models([config(steps=230), config(steps=230, seed=1)], progress)
    assert counted[:3] == ["toy models, model steps", 460, 0]
    assert sum(counted[3:]) == 460
    assert len(counted) >= 6, "more than once a run"


def test_one_failure_stops_every_core():
    """Untold steps remain to the other core: without the stop this test never ends."""
    failed = threading.Lock()

    def tick(n: int, **fields: float | str) -> None:
        if failed.acquire(blocking=False):
            raise ValueError(f"enough after {n}, {fields}")

    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        with pytest.raises(ValueError, match="enough"):
            train_toy_models(
                [config(steps=10**9), config(steps=10**9, seed=1)],
                lambda *_: nullcontext(tick),
            )
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    models = train_toy_models([config(), config(sparsity=0.9, seed=1)])
    path = tmp_path_factory.mktemp("toy") / "models"
    models.save(path)
    return path, models


def test_models_come_back_from_disk(saved):
    path, models = saved
    again = ToyModels.load(path)
    assert again.configs == models.configs
    for name in ("W_p", "b", "loss"):
        assert torch.equal(getattr(again, name), getattr(models, name))
    assert again.represented(0.1) == [int((w.norm(dim=0) > 0.1).sum()) for w in models.W_p]


def test_damaged_models_are_refused(saved, tmp_path):
    path, models = saved
    with pytest.raises(UserError, match="no such directory"):
        ToyModels.load(tmp_path / "nothing")
    models.save(tmp_path)
    (tmp_path / "toy.safetensors").write_bytes(b"short")
    with pytest.raises(UserError, match="cut or altered"):
        ToyModels.load(tmp_path)
    cut = ToyModels(models.W_p[:1], models.b[:1], models.loss[:1], models.configs)
    cut.save(tmp_path)
    with pytest.raises(UserError, match="manifest's models"):
        ToyModels.load(tmp_path)
    assert ToyModels.load(path).configs == models.configs


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"lr": 0.1}, r"differ in lr \(\[0.02, 0.1\]\)"),
        ({"d_in": 4}, "differ in d_in"),
        ({"batch": 5}, "differ in batch"),
        ({"n": 7}, r"differ in n_features \(\[6, 7\]\)"),
    ],
)
def test_models_that_do_not_go_together_are_refused(other, words):
    with pytest.raises(UserError, match=words):
        train_toy_models([config(), config(**other)])


def test_nothing_to_train_is_refused():
    with pytest.raises(UserError, match="at least one"):
        train_toy_models([])
    with pytest.raises(UserError, match="sparsity 1 leaves no feature ever active"):
        config(sparsity=1.0)


def test_a_loss_that_leaves_the_finite_numbers_is_reported():
    with pytest.raises(UserError, match="sparsity 0.5, seed 4.*lower lr"):
        train_toy_models([config(seed=4, lr=1e30)])


def cosines(W_p: torch.Tensor) -> torch.Tensor:
    unit = W_p / W_p.norm(dim=0)
    return unit.T @ unit


@pytest.fixture(scope="module")
def plane():
    """Five features in the plane (Elhage et al. 2022): decaying and equal importance, three seeds each."""
    decay, equal = DecayingImportance(base=0.7), EqualImportance()
    kinds = {"dense": (decay, 0.0), "pairs": (decay, 0.9), "pentagon": (equal, 0.95)}
    names = [(name, seed) for name in kinds for seed in range(3)]
    cfgs = [
        config(n=5, sparsity=kinds[name][1], importance=kinds[name][0], seed=seed, **PLANE)
        for name, seed in names
    ]
    models = train_toy_models(cfgs)
    return {
        name: models.W_p[[i for i, (which, _) in enumerate(names) if which == name]]
        for name in kinds
    }


def test_dense_features_the_most_important_are_kept_orthogonal_the_rest_dropped(plane):
    for W_p in plane["dense"]:
        norms = W_p.norm(dim=0)
        assert norms[:2].min() > 0.95
        assert norms[2:].max() < 0.4
        assert cosines(W_p)[0, 1].abs() < 0.1


def test_sparse_features_share_a_dimension_in_antipodal_pairs(plane):
    for W_p in plane["pairs"]:
        found = superposition(W_p)
        kept = (found.norms > 0.5).nonzero()[:, 0]
        assert len(kept) == 4
        between = cosines(W_p)[kept][:, kept]
        assert int((between < -0.99).sum()) == 4, "two pairs, each seen from both sides"
        assert int((between.abs() < 0.1).sum()) == 8, "and the pairs are orthogonal"
        assert found.dimensionality[kept].sub(0.5).abs().max() < 0.06


def test_very_sparse_features_of_equal_importance_form_a_pentagon(plane):
    regular = sorted(math.cos(2 * math.pi * k / 5) for k in range(5))
    for W_p in plane["pentagon"]:
        found = superposition(W_p)
        assert found.dimensionality.sub(2 / 5).abs().max() < 0.02
        for row in cosines(W_p).double():
            np.testing.assert_allclose(row.sort().values, regular, atol=0.06)
        assert found.positive_share == 0.5, "a pentagon's neighbours interfere positively"


def test_a_dense_wide_model_keeps_the_most_important_features_orthogonal():
    importance = DecayingImportance(last=0.001)
    cfg = config(
        n=40, sparsity=0.0, importance=importance, d_in=8, steps=2000, batch=128, decay=0.5
    )
    W_p = train_toy_models([cfg]).W_p[0]
    norms = W_p.norm(dim=0)
    assert norms[:7].min() > 0.9
    assert norms[10:].max() < 0.3
    assert (cosines(W_p)[:7, :7] - torch.eye(7)).abs().max() < 0.15
