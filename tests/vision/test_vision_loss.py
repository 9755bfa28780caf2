"""The contrastive loss, LARS, the schedule and the probes, each against the same thing computed another way."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from wsae.train.step import warmup_cosine
from wsae.vision.config import preset
from wsae.vision.pretrain import LARS, info_nce, knn_accuracy, linear_probe, pixels


def naive(z: Tensor, temperature: float) -> float:
    """The loss written out: one image after the other, one negative after the other, in float64."""
    rows = z.double().tolist()
    images = len(rows) // 2
    norms = [max(math.sqrt(sum(v * v for v in row)), 1e-12) for row in rows]

    def similarity(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(rows[i], rows[j], strict=True))
        return math.exp(dot / norms[i] / norms[j] / temperature)

    total = 0.0
    for i in range(len(rows)):
        positive = similarity(i, (i + images) % len(rows))
        others = [j for j in range(len(rows)) if j % images != i % images]
        total -= math.log(positive / (positive + sum(similarity(i, j) for j in others)))
    return total / len(rows)


@given(
    st.integers(2, 6), st.integers(1, 5), st.sampled_from([0.1, 0.2, 1.0]), st.integers(0, 10**6)
)
def test_the_loss_is_that_of_the_definition(
    images: int, width: int, temperature: float, seed: int
) -> None:
    z = torch.randn(2 * images, width, generator=torch.Generator().manual_seed(seed))
    for case in (z, z.relu()):  # relu: some rows may be all zero, as NCL's can be
        got = float(info_nce(case, case, 0, temperature))
        assert got == pytest.approx(naive(case, temperature), rel=2e-5, abs=1e-6)


def test_the_loss_of_parts_is_that_of_the_whole() -> None:
    """Two processes hold views [a1 a2] and [b1 b2]: the mean of their losses is the loss of all four images."""
    z = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
    whole = torch.cat([z[:2], z[4:6], z[2:4], z[6:]])  # first views of all, then second views
    parts = [info_nce(z[i : i + 4], z, i, 0.2) for i in (0, 4)]
    torch.testing.assert_close(torch.stack(parts).mean(), info_nce(whole, whole, 0, 0.2))


def test_the_loss_has_its_gradient_and_is_float32_under_autocast() -> None:
    z = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda a: info_nce(a, a, 0, 0.2), z.clone().requires_grad_())
    assert float(info_nce(z, z, 0, 0.2)) == pytest.approx(naive(z, 0.2), rel=1e-12)
    with torch.autocast("cpu", torch.bfloat16):
        loss = info_nce(z.bfloat16(), z.bfloat16(), 0, 0.2)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(naive(z.bfloat16(), 0.2), rel=1e-5)
    with pytest.raises(ValueError, match="not two views"):
        info_nce(z[:5], z[:5], 0, 0.2)


def test_the_loss_knows_the_pairs_and_the_temperature() -> None:
    paired = torch.eye(4).repeat(2, 1)
    assert float(info_nce(paired, paired, 0, 0.2)) == pytest.approx(
        math.log1p(6 * math.exp(-5)), rel=1e-5
    )
    same = torch.ones(8, 3)
    assert float(info_nce(same, same, 0, 0.2)) == pytest.approx(math.log(7), rel=1e-5)


@pytest.mark.parametrize("lr", [0.003, 0.4, 50.0])
def test_lars_steps_as_solo_learn_writes_it(lr: float) -> None:
    eta, momentum, decay = 0.02, 0.9, 1e-2
    g = torch.Generator().manual_seed(0)
    shapes = [(5, 3), (4, 2, 3, 3), (7,), (3, 3)]
    weights = [torch.randn(s, generator=g) for s in shapes]
    weights[3] = torch.zeros(3, 3)  # no norm: plain SGD
    ours = [torch.nn.Parameter(w.clone()) for w in weights]
    optimizer = LARS(
        [{"params": ours[:2]}, {"params": ours[2:], "decay": 0.0}], eta, momentum, decay
    )
    theirs, buffers = [w.clone() for w in weights], [None] * 4
    for _ in range(3):
        gradients = [torch.randn(s, generator=g) for s in shapes]
        for i, w in enumerate(theirs):
            wd = decay if i < 2 else 0.0
            d_p, p_norm, g_norm = gradients[i], w.norm(), gradients[i].norm()
            if w.ndim != 1 and p_norm != 0 and g_norm != 0:
                rate = eta * p_norm / (g_norm + p_norm * wd + 1e-8)
                d_p = (d_p + wd * w) * min(rate / lr, torch.tensor(1.0))
            buffer = buffers[i]
            buffers[i] = d_p.clone() if buffer is None else buffer * momentum + d_p
            w -= lr * buffers[i]
        for parameter, gradient in zip(ours, gradients, strict=True):
            parameter.grad = gradient.clone()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-5, atol=1e-6)


def test_the_learning_rate_rises_from_its_start_and_falls_along_a_cosine() -> None:
    rates = [warmup_cosine(s, 100, 10, 3e-5, 0.4) for s in range(101)]
    steps = [b - a for a, b in zip(rates[:9], rates[1:10], strict=True)]
    assert rates[0] == 3e-5
    assert steps == pytest.approx([(0.4 - 3e-5) / 9] * 9)
    assert rates[9] == rates[10] == pytest.approx(0.4)
    assert rates[55] == pytest.approx(0.2)
    assert rates[100] == pytest.approx(0, abs=1e-12)
    assert warmup_cosine(0, 5, 0, 3e-5, 0.4) == 0.4


def test_presets_are_those_of_the_papers_code() -> None:
    big, cifar = preset("imagenet100"), preset("cifar")
    assert (big.lr, big.classifier_lr) == (0.15, 0.05)
    assert (big.projector_hidden, big.projector_out, big.positivity) == (16384, 2048, "relu")
    assert (big.epochs, big.warmup_epochs, big.size, big.stem) == (100, 10, 224, "imagenet")
    assert (cifar.lr, cifar.classifier_lr, cifar.epochs) == (0.4, 0.1, 200)
    assert (cifar.projector_hidden, cifar.projector_out, cifar.positivity) == (
        2048,
        256,
        "rep_relu",
    )
    assert (cifar.size, cifar.stem, cifar.batch_size) == (32, "small", 256)
    assert preset("cifar", method="simclr").positivity == "none"
    for cfg in (big, cifar):
        assert (cfg.lars.eta, cfg.lars.weight_decay, cfg.lars.warmup_from) == (0.02, 1e-4, 3e-5)
        assert cfg.temperature == 0.2
        assert cfg.augment.model_dump() == {
            "crop": (0.08, 1.0), "flip": 0.5, "jitter": (0.8, 0.8, 0.8, 0.2), "jitter_p": 0.8,
            "grey": 0.2, "blur": 0.5,
        }  # fmt: skip


def test_nearest_neighbours_vote_by_their_cosine() -> None:
    """Two far neighbours of class 0 outvote one near neighbour of class 1 only when the temperature is high."""
    train = torch.tensor([[1.0, 0.1], [1.0, 1.0], [1.0, 1.0], [-1.0, 0.0]])
    labels = torch.tensor([1, 0, 0, 1])
    test, truth = torch.tensor([[2.0, 0.0]]), torch.tensor([1])
    assert knn_accuracy(train, labels, test, truth, k=3, temperature=0.07) == 1
    assert knn_accuracy(train, labels, test, truth, k=3, temperature=100.0) == 0
    assert knn_accuracy(train, labels, test, truth, k=1, temperature=100.0) == 1


def test_the_linear_probe_sees_directions_whatever_their_scale() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(600, 5, generator=g)
    y = (x[:, 0] > 0).long() + 2 * (x[:, 1] > 0).long()
    x = x * torch.tensor([1e-2, 1e3, 1.0, 1.0, 1.0]) + 7
    found = linear_probe(x[:400], y[:400], x[400:], y[400:])
    assert found.accuracy > 0.9
    assert (found.train, found.test, found.converged) == (400, 200, True)
    chance = linear_probe(x[:400], y[torch.randperm(400, generator=g)], x[400:], y[400:])
    assert chance.accuracy < 0.4


def test_raw_pixels_of_large_images_are_averaged_down() -> None:
    image = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    image[0, 0, :2, :2] = torch.tensor([[255, 0], [0, 255]])
    rows = pixels(image)
    assert rows.shape == (1, 1024)
    assert rows[0, 0] == 0.5
    assert torch.equal(pixels(image[..., :8, :8]), image[..., :8, :8].flatten(1) / 255)
