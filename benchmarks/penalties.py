"""JumpReLU at a target L0 beside SAELens' and dictionary_learning's: FVU and L0 after the same data and optimiser.

    pip install sae-lens==6.54.12 dictionary-learning     (in an environment of its own)
    python benchmarks/penalties.py STORE [--hook layers.9] [--tokens 240000] [--d-sae 1152] [--targets 32] [--seeds 3]

Every trainer sees the same batches, with Adam, the same learning rate and its schedule (5 % up, 20 % down), b_dec
starting at the data's mean; all else is each tool's default. Both others need a coefficient: each of --coefficients is
tried, and all are shown. Scored on 8,192 rows that no one trained on; one JSON line a run.
"""

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from wsae.acts.source import open_source
from wsae.train.config import TrainConfig
from wsae.train.family import finished, make_family
from wsae.train.state import make_batches
from wsae.train.step import lr_factor, train_step

BATCH, HELD = 2048, 8192
Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x to (z, x_hat)."""


def batches(args: argparse.Namespace, seed: int) -> Iterator[Tensor]:
    stream = open_source(Path(args.store), hooks=(args.hook,)).stream(BATCH, seed)
    while True:
        yield stream.next()[args.hook].float()


def held(args: argparse.Namespace) -> Tensor:
    source = open_source(Path(args.store), hooks=(args.hook,))
    parts = [
        rows.x[args.hook].float() for rows in itertools.islice(source.heldout(BATCH), HELD // BATCH)
    ]
    return torch.cat(parts)


def ours(args: argparse.Namespace, seed: int, target: float, coefficient: float) -> Encoder:
    """Ours, with no coefficient at all."""
    assert not coefficient
    source = open_source(Path(args.store), hooks=(args.hook,))
    activation = {"kind": "jumprelu"}
    member = {"d_sae": args.d_sae, "activation": activation, "lr": args.lr, "target_l0": target}
    cfg = TrainConfig.parse({"members": (member,), "tokens": args.tokens, "seed": seed})
    ((_, state),) = make_family(cfg, source.stats()).all()
    for step, x in zip(range(cfg.steps), batches(args, seed), strict=False):
        train_step(state, make_batches(x, [state])[0], step, cfg)
    sae = finished(state)
    return lambda x: (sae.encode(x), sae(x))


def scaled(args: argparse.Namespace) -> tuple[Tensor, float]:
    """The data's mean, and what brings rows to a mean squared length of d_in."""
    source = open_source(Path(args.store), hooks=(args.hook,))
    kept = source.stats()[args.hook].kept
    return kept.mean.float(), float(kept.variance.mean().sqrt())


def trained(
    args: argparse.Namespace,
    seed: int,
    loss: Callable[[Tensor, int], Tensor],
    parameters: list[Tensor],
    after: Callable[[], None],
) -> None:
    """The loop of both others: Adam on the loss of each scaled batch."""
    optimizer, steps = torch.optim.Adam(parameters, lr=args.lr), args.tokens // BATCH
    _, scale = scaled(args)
    for step, x in zip(range(steps), batches(args, seed), strict=False):
        optimizer.param_groups[0]["lr"] = args.lr * lr_factor(step, steps, 0.05, 0.2)
        optimizer.zero_grad()
        loss(x / scale, step).backward()
        optimizer.step()
        after()


def saelens(args: argparse.Namespace, seed: int, target: float, coefficient: float) -> Encoder:
    """JumpReLUTrainingSAE with the quadratic penalty."""
    from sae_lens.saes.jumprelu_sae import JumpReLUTrainingSAE, JumpReLUTrainingSAEConfig
    from sae_lens.saes.sae import TrainStepInput

    torch.manual_seed(seed)
    mean, scale = scaled(args)
    sae = JumpReLUTrainingSAE(
        JumpReLUTrainingSAEConfig(
            len(mean), args.d_sae, jumprelu_sparsity_loss_mode="quadratic", target_l0=target
        )
    )
    sae.b_dec.data.copy_(mean / scale)
    if args.threshold is not None:
        sae.threshold.data.fill_(args.threshold)

    def loss(x: Tensor, step: int) -> Tensor:  # noqa: ARG001
        given = TrainStepInput(x, {"l0": coefficient}, None, 0, False)
        return sae.training_forward_pass(given).loss

    trained(args, seed, loss, list(sae.parameters()), lambda: None)

    def coded(x: Tensor) -> tuple[Tensor, Tensor]:
        z = sae.encode(x / scale)
        return z, sae.decode(z) * scale

    return coded


def dictionary_learning(
    args: argparse.Namespace, seed: int, target: float, coefficient: float
) -> Encoder:
    """JumpReluTrainer's loss and its constraint on the decoder, with the optimiser of the others."""
    from dictionary_learning.trainers.jumprelu import JumpReluTrainer
    from dictionary_learning.trainers.trainer import set_decoder_norm_to_unit_norm

    torch.manual_seed(seed)
    mean, scale = scaled(args)
    steps = args.tokens // BATCH
    trainer = JumpReluTrainer(
        steps=steps, activation_dim=len(mean), dict_size=args.d_sae, layer=0, lm_name="none",
        sparsity_penalty=coefficient, target_l0=target, warmup_steps=1, sparsity_warmup_steps=None,
    )  # fmt: skip
    ae = trainer.ae
    ae.b_dec.data.copy_(mean / scale)
    if args.threshold is not None:
        ae.threshold.data.fill_(args.threshold)

    def after() -> None:
        ae.W_dec.data = set_decoder_norm_to_unit_norm(ae.W_dec.T, len(mean), args.d_sae).T

    trained(args, seed, trainer.loss, list(ae.parameters()), after)

    def coded(x: Tensor) -> tuple[Tensor, Tensor]:
        z = ae.encode(x / scale)
        return z, ae.decode(z) * scale

    return coded


TRAINERS = {"wsae": ours, "saelens": saelens, "dictionary_learning": dictionary_learning}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store")
    parser.add_argument("--hook", default="layers.9")
    parser.add_argument("--tokens", type=int, default=240_000)
    parser.add_argument("--d-sae", type=int, default=1152)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--targets", type=float, nargs="+", default=[32.0])
    parser.add_argument("--coefficients", type=float, nargs="+", default=[0.1, 1.0])
    about = "where the others' thresholds start, rows having variance 1 (default: as they do)"
    parser.add_argument("--threshold", type=float, help=about)
    parser.add_argument("--tools", nargs="+", choices=list(TRAINERS), default=list(TRAINERS))
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    x = held(args)
    for seed in range(args.seeds):
        for target in args.targets:
            for tool in args.tools:
                for coefficient in [0.0] if tool == "wsae" else args.coefficients:
                    begin = time.process_time()
                    code = TRAINERS[tool](args, seed, target, coefficient)
                    spent = time.process_time() - begin
                    with torch.no_grad():
                        z, x_hat = code(x)
                    fvu = float((x_hat - x).square().sum() / (x - x.mean(0)).square().sum())
                    row = {"tool": tool, "seed": seed, "target": target, "coefficient": coefficient}
                    row |= {"l0": float((z != 0).sum(1).float().mean()), "fvu": fvu, "cpu_s": spent}
                    print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
