"""The Python interface does what the command line does, on arrays in memory."""

from pathlib import Path

import numpy as np
import pytest
import torch

import wsae
from test_train import files_of, world
from wsae.acts.source import ArraySource
from wsae.core.errors import UserError
from wsae.losses.gamma import gamma_from_proxy
from wsae.train.batched import fits_a_bank
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.covariance import covariances
from wsae.train.family import make_family
from wsae.train.run import train_run

QUICK = {"tokens": 8_000, "batch_size": 200, "seed": 3}


def test_fit_returns_an_sae_that_reconstructs() -> None:
    x = world()
    sae = wsae.fit(x, k=4, d_sae=64, lr=5e-3, tokens=40_000, batch_size=200)
    with torch.no_grad():
        fvu = float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())
        assert int((sae.encode(x) != 0).sum(1).max()) <= 4
    assert fvu < 0.3
    assert torch.equal(sae.gamma, torch.ones(16))


@pytest.mark.parametrize("kind", ["numpy", "torch", "npy", "source"])
def test_every_form_of_the_same_data_gives_the_same_sae(tmp_path: Path, kind: str) -> None:
    x = world(1000)
    np.save(tmp_path / "x.npy", x.numpy())
    forms = {
        "numpy": x.numpy(),
        "torch": x,
        "source": ArraySource(x, heldout_fraction=0.0),
        "npy": ArraySource(tmp_path / "x.npy", heldout_fraction=0.0),
    }
    sae = wsae.fit(forms[kind], k=4, d_sae=32, gamma="variance", **QUICK)
    reference = wsae.fit(x, k=4, d_sae=32, gamma="variance", **QUICK)
    assert torch.equal(sae.W_enc, reference.W_enc)


def test_a_family_shares_batches_and_equals_the_run_on_disk(tmp_path: Path) -> None:
    members = [
        wsae.Member(gamma="none", k=4, d_sae=48),
        wsae.Member(gamma="variance", alpha=0.5, k=4, d_sae=48),
    ]
    source = ArraySource(world(), heldout_fraction=0.1)
    family = wsae.fit_family(source, members, **QUICK)
    assert family.names == ["plain", "variance-a0.5"]
    cfg = TrainConfig(members=tuple(members), **QUICK)
    on_disk = train_run(cfg, source, tmp_path / "run").saes["acts"]
    for name, sae in zip(family.names, family.saes, strict=True):
        assert torch.equal(sae.W_dec, on_disk[name].W_dec)
    assert "members/acts/plain/sae.safetensors" in files_of(tmp_path / "run")
    assert family.gamma["variance-a0.5"]["heaviest"][0][0] == 5


def test_gamma_may_be_a_vector_or_come_from_labels() -> None:
    x = world(1000)
    proxy = np.linspace(1, 2, 16)
    sae = wsae.fit(x, k=4, d_sae=32, gamma=proxy, alpha=2.0, normalise="none", **QUICK)
    torch.testing.assert_close(sae.gamma.double(), torch.from_numpy(proxy) ** 2, rtol=1e-6, atol=0)
    labels = (x[:, 0] > x[:, 0].median()).long().numpy()
    positive = x.clone()
    positive[:, 3] = torch.from_numpy(labels).float()  # active on one class alone: beta = 1
    fitted = wsae.fit(
        positive, k=4, d_sae=32, gamma="consistency", normalise="none", labels=labels, **QUICK
    )
    assert float(fitted.gamma[3]) == 1
    assert float(fitted.gamma[7]) < 0.7


def test_evaluate_measures_held_out_rows() -> None:
    x = world()
    sae = wsae.fit(x[:3000], k=4, d_sae=48, **QUICK)
    metrics = wsae.evaluate(sae, x[3000:])["metrics"]
    y = x[3000:].double()
    with torch.no_grad():
        error = (sae(x[3000:]).double() - y).square().sum()
    fvu = float(error / (y - y.mean(0)).square().sum())
    assert metrics["fvu"]["value"] == pytest.approx(fvu, rel=1e-5)
    assert metrics["fvu"]["low"] < fvu < metrics["fvu"]["high"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"k": 40}, "k = 40 active latents of only d_sae = 32"),
        ({"activation": "topp"}, "activation 'topp' is unknown"),
        ({"gamma": "variances"}, "rule"),
        ({"alhpa": 1.0}, r"unknown key 'alhpa'"),
        ({"gamma": np.ones(3)}, "3 entries, the activations 16"),
        ({"gamma": "consistency"}, "needs labels"),
        ({"labels": np.zeros(7, dtype=np.int64)}, "7 labels for 500 rows"),
    ],
)
def test_wrong_options_are_one_clear_line(options: dict[str, object], says: str) -> None:
    defaults: dict[str, object] = {"d_sae": 32, "k": 4}
    with pytest.raises(UserError, match=says) as caught:
        wsae.fit(world(500), **{**defaults, **QUICK, **options})
    assert "\n" not in str(caught.value)


def test_gamma_from_proxy_is_what_a_run_uses() -> None:
    x = world(1000)
    sae = wsae.fit(x, k=4, d_sae=32, gamma="variance", alpha=0.5, robust="winsor", **QUICK)
    cfg = wsae.Member(gamma="variance", alpha=0.5, robust="winsor").gamma
    expected = gamma_from_proxy(cfg, x.double().var(0, correction=0))
    torch.testing.assert_close(sae.gamma.double(), expected, rtol=1e-6, atol=0)


def many(**fields: object) -> list[MemberConfig]:
    rules = [("none", 1.0), ("variance", 1.0), ("variance", 0.5), ("gap", 1.0)]
    return [
        wsae.Member(gamma=rule, alpha=alpha, k=4, d_sae=48, lr=3e-3, seed=seed, **fields)
        for rule, alpha in rules
        for seed in range(3)
    ]


def batched(members: list[MemberConfig], **data: object) -> bool:
    cfg = TrainConfig(members=tuple(members), **data)
    source = ArraySource(world(), heldout_fraction=0.0)
    stats = source.stats()
    family = make_family(cfg, stats, "cpu", covariances(cfg, source, stats))
    return fits_a_bank(cfg, family, source)


def test_many_small_members_train_together_as_they_would_in_turn() -> None:
    x, data = world(), {"tokens": 12_000, "batch_size": 200, "seed": 3, "dead_after": 400}
    together = wsae.fit_family(x, many(), **data)
    in_turn = wsae.fit_family(x, many(), kernels="eager", **data)
    assert batched(many(), **data)
    for mine, other, name in zip(together.saes, in_turn.saes, together.names, strict=True):
        for key, tensor in other.tensors().items():
            torch.testing.assert_close(
                mine.tensors()[key], tensor, rtol=5e-3, atol=2e-3, msg=lambda m, n=name: n + m
            )
    for mine, other in zip(together.metrics, in_turn.metrics, strict=True):
        assert mine.keys() == other.keys()
        assert mine["fvu"] == pytest.approx(other["fvu"], rel=0.2)  # last batch, last window
        assert abs(mine["dead_frac"] - other["dead_frac"]) < 0.05


@pytest.mark.parametrize(
    "change",
    [{"kernels": "eager"}, {"dtype": "bfloat16"}, {"batch_size": 4000}],
)
def test_members_that_ask_for_more_than_a_bank_has_train_in_turn(change: dict[str, object]) -> None:
    assert not batched(many(), **({"tokens": 12_000, "batch_size": 200} | change))


def test_members_with_a_learning_rate_each_train_in_turn() -> None:
    each = [m.model_copy(update={"lr": 1e-3 * (1 + i)}) for i, m in enumerate(many())]
    assert not batched(each, tokens=12_000, batch_size=200)


class Counted(ArraySource):
    """Counts the batches read."""

    reads = 0

    def stream(self, *args: object, **kwargs: object) -> object:
        stream = super().stream(*args, **kwargs)
        read = stream.next

        def counted() -> object:
            self.reads += 1
            return read()

        stream.next = counted
        return stream


class Endless(ArraySource):
    """Does not know how many rows it has, as a live model."""

    @property
    def n_rows(self) -> None:
        return


def test_a_bank_reads_the_data_once_and_none_of_a_live_source() -> None:
    members = [m for m in many() if m.gamma.rule != "gap"]  # a covariance reads the data too
    run = {"tokens": 12_000, "batch_size": 200}
    source = Counted(world(), heldout_fraction=0.0)
    wsae.fit_family(source, members, **run)
    assert source.reads == 60 + 1  # one group of members; its first batch is looked at before
    assert batched(members, **run)
    live, cfg = Endless(world(), heldout_fraction=0.0), TrainConfig(members=tuple(members), **run)
    assert not fits_a_bank(cfg, make_family(cfg, live.stats()), live)
