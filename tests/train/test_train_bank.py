"""A bank's members are what lone training gives: the main trainer, autograd and smaller banks are the references."""

import pytest
import torch

from wsae.core.errors import UserError
from wsae.sae.config import GammaConfig, make_activation
from wsae.sae.forward import stack_forward, stack_saes
from wsae.sae.model import SAE
from wsae.train import bank
from wsae.train.bank import Entry, Scratch, make_entry, relu_gradients, train_bank
from wsae.train.config import BankConfig, MemberConfig, TrainConfig
from wsae.train.state import make_batch, make_member
from wsae.train.step import train_step

D_IN, D_SAE, BATCH, WORLDS = 5, 12, 16, 3
KINDS = ["relu", "topk", "group_topk", "batch_topk", "jumprelu"]


def batches(step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(WORLDS, BATCH, D_IN, generator=generator) + 0.3


def data(worlds: list[int]):
    return lambda step: batches(step)[worlds]


def gamma(seed: int, matrix: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (D_IN, D_IN) if matrix else (D_IN,)
    return torch.rand(shape, generator=generator) + 0.5


def member(kind: str = "relu", tied: bool = False, **fields) -> MemberConfig:
    data = {"auxk": 0.0, "lr": 0.01, **fields}
    return MemberConfig(
        d_sae=D_SAE, activation=make_activation(kind, 3), tied=tied, label=None, **data
    )


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("matrix", [True, False])
@pytest.mark.parametrize("l1", [None, 0.3])
def test_hand_written_gradients_are_those_of_autograd(tied, matrix, l1):
    entries = [make_entry(member(tied=tied, seed=i), gamma(i), torch.ones(D_IN)) for i in range(2)]
    saes = [entry.sae for entry in entries]
    weights = torch.stack([gamma(i, matrix).view(-1, D_IN) for i in range(2)]).double()
    stack = stack_saes(saes, dtype=torch.float64)
    if stack.b_enc is not None:
        stack.b_enc.data.normal_(generator=torch.Generator().manual_seed(1))
    x = batches(0)[:2].double()
    penalty = None if l1 is None else torch.tensor([l1, 2 * l1], dtype=torch.float64)

    forward = stack_forward(stack, x)
    weighed = (
        torch.einsum("mbi,moi->mbo", x - forward.x_hat, weights)
        if matrix
        else ((x - forward.x_hat) * weights)
    )
    loss = weighed.square().sum((1, 2)) / BATCH
    total = loss if penalty is None else loss + penalty * forward.l1
    expected = torch.autograd.grad(total.sum(), stack.parameters())

    scratch = Scratch.like(stack, BATCH)
    by_hand = relu_gradients(stack, x, weights, penalty, scratch)
    torch.testing.assert_close(by_hand, loss.detach(), rtol=1e-12, atol=0)
    for parameter, wanted in zip(stack.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("fields", "weights"),
    [
        ({}, GammaConfig()),
        ({"l1": 0.05}, GammaConfig()),
        ({"auxk": 0.5, "k_aux": 2}, GammaConfig()),
        ({"l0": 0.02}, GammaConfig()),
        ({}, GammaConfig(rule="latent_variance", alpha=0.5)),
    ],
    ids=["plain", "l1", "auxk", "l0", "latent_variance"],
)
def test_a_member_is_what_the_main_trainer_makes_of_it(kind, fields, weights):
    cfg = member(kind, **fields).model_copy(update={"gamma": weights})
    steps, mean = 45, torch.full((D_IN,), 0.3)
    run = TrainConfig(
        members=(cfg,), tokens=steps * BATCH, batch_size=BATCH, warmup=0.1, decay=0.3, dead_after=40
    )
    alone = make_member("m", cfg, run, mean.double(), 1.0)
    alone.sae.gamma.copy_(gamma(0))
    for step in range(steps):
        train_step(alone, make_batch(batches(step)[1], alone), step, run)

    entry = make_entry(cfg, gamma(0), mean, world=1)
    shared = BankConfig(steps=steps, warmup=0.1, decay=0.3, dead_after=40, max_grad_norm=1.0)
    train_bank([make_entry(member(tied=True), gamma(2)), entry], data, shared)
    for name, tensor in alone.sae.state_dict().items():
        torch.testing.assert_close(
            entry.sae.state_dict()[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: n + m
        )
    assert not torch.equal(entry.sae.W_dec, SAE(entry.sae.cfg).W_dec)


def mixed() -> list[Entry]:
    """Members of several kinds, worlds, seeds, gammas and learning rates."""
    out = []
    for i, kind in enumerate(KINDS * 2):
        cfg = member(kind, seed=i, lr=0.01 if i % 3 else 0.003, l1=0.01 * (i % 2))
        out.append(make_entry(cfg, gamma(i, matrix=i == 6), world=i % WORLDS))
    return out + [make_entry(member(tied=True, seed=i), gamma(i), world=i) for i in range(3)]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_a_member_equals_its_lone_run(optimizer, monkeypatch):
    cfg = BankConfig(steps=60, dtype="float64", optimizer=optimizer, log_every=7)
    together = mixed()
    record = train_bank(together, data, cfg)
    alone = mixed()
    for i, entry in enumerate(alone):
        lone = train_bank([entry], data, cfg)
        torch.testing.assert_close(entry.sae.W_dec, together[i].sae.W_dec, rtol=1e-6, atol=1e-7)
        assert lone[:, 0] == pytest.approx(record[:, i], rel=1e-8)
    assert record.shape == (9, len(together))
    assert (record[-1] < record[0]).all()
    monkeypatch.setattr(bank, "CHUNK_BYTES", 1)
    split = mixed()
    assert len(bank.make_chunks(split, data, cfg)) == len(split)
    assert train_bank(split, data, cfg, threads=2) == pytest.approx(record, rel=1e-8)


def test_a_bank_repeats_to_the_bit():
    first, second = mixed(), mixed()
    cfg = BankConfig(steps=20)
    assert (train_bank(first, data, cfg) == train_bank(second, data, cfg)).all()
    for a, b in zip(first, second, strict=True):
        assert all(
            torch.equal(x, y) for x, y in zip(a.sae.parameters(), b.sae.parameters(), strict=True)
        )


def test_a_diverging_member_is_named():
    entries = [make_entry(member(tied=True), gamma(0)), make_entry(member(lr=1e30), gamma(0))]
    with pytest.raises(
        UserError, match=r"member 1 \(plain\): its loss is .* lower its learning rate"
    ):
        train_bank(entries, data, BankConfig(steps=50, log_every=10))


def test_an_empty_bank_is_refused():
    with pytest.raises(UserError, match="no members"):
        train_bank([], data, BankConfig())
