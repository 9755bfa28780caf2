"""The fit of every kind beside its peers: FVU and L0 after the same batches, with the same optimiser.

    pip install sae-lens==6.54.12 dictionary-learning eai-sparsify==1.3.3     (in an environment of its own)
    python benchmarks/fits.py STORE [--kinds jumprelu relu] [--tokens 240000] [--d-sae 1152] [--l0 32] [--seeds 3]
    python benchmarks/fits.py SIDES --kinds transcoder skip_transcoder --hook layers.9.mlp.input --hook-out layers.9.mlp

Every trainer sees the same batches of 2,048 rows, scaled to variance 1, with Adam, the same learning rate and its
schedule (5 % up, 20 % down), b_dec starting at the data's mean; all else is each tool's own, such as the limit of 1 on
the gradient's norm of SAELens and of most trainers of dictionary_learning. Adam then takes longer steps in the end, so
that tools differ in the learning rate they want: try several (`--lr`). What has a coefficient is brought to the L0 that
is asked for: with the first seed coefficients are tried (steps of Newton's in logarithms, four tries at most), the
others take the one found. Of dictionary_learning's JumpReLU it is the value at which thresholds start: what its
penalty, of `--penalty`, does in so few steps depends on it far more than on its coefficient. No peer revives dead
latents in so short a run: their windows are 1,000 steps and 10 M rows. Scored on 8,192 held-out rows, batch Top-k kinds
over batches as in training. Prints one JSON line a run. Ours is worse where its lowest FVU of three seeds is above the
other's highest at the same L0.
"""

import argparse
import importlib
import itertools
import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize
from torch.nn.utils import clip_grad_norm_

from wsae.acts.source import open_source
from wsae.sae.forward import training_forward
from wsae.train.config import TrainConfig
from wsae.train.family import finished, make_family
from wsae.train.loop import run_steps
from wsae.train.step import lr_factor

BATCH, HELD = 2048, 8192
P_END, ANNEAL_FROM = 0.2, 0.1
FRACTIONS = (1 / 32, 2 / 32, 4 / 32, 8 / 32, 17 / 32)
"""Shares of the latents that each level of a Matryoshka SAE adds (ours by default)."""
SAELENS, DL, SPARSIFY = "saelens", "dictionary_learning", "sparsify"
PEERS = {
    "topk": (SAELENS, DL, SPARSIFY),
    "jumprelu": (SAELENS, DL),
    "relu": (SAELENS, DL),
    "p_anneal": (DL,),
    "gated": (SAELENS, DL),
    "batch_topk": (SAELENS, DL),
    "matryoshka": (SAELENS, DL),
    "transcoder": (SPARSIFY,),
    "skip_transcoder": (SPARSIFY,),
}
BY_K = ("topk", "batch_topk", "matryoshka", "transcoder", "skip_transcoder")
Encoder = Callable[[Tensor], tuple[Tensor, Tensor]]
"""x to (z, x_hat), or of a transcoder y_hat."""


class Data(NamedTuple):
    """The rows read and those to be given, which are the same of an SAE: scaled by the roots of their variances."""

    args: argparse.Namespace
    means: tuple[Tensor, Tensor]
    scales: tuple[float, float]
    held: tuple[Tensor, Tensor]
    """In their own units."""

    @classmethod
    def of(cls, args: argparse.Namespace) -> "Data":
        """Read the statistics and the held-out rows."""
        source, pair = opened(args), (args.hook, args.hook_out or args.hook)
        kept = [source.stats()[hook].kept for hook in pair]
        rows = list(itertools.islice(source.heldout(BATCH), HELD // BATCH))
        x, y = (torch.cat([part.x[hook].float() for part in rows]) for hook in pair)
        sizes = [float(k.variance.mean().sqrt()) for k in kept]
        means = [k.mean.float() / size for k, size in zip(kept, sizes, strict=True)]
        return cls(args, (means[0], means[1]), (sizes[0], sizes[1]), (x, y))

    def batches(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield a run's scaled batches."""
        stream, args = opened(self.args).stream(BATCH, seed), self.args
        for _ in range(args.tokens // BATCH):
            rows = stream.next()
            pair = rows[args.hook].float(), rows[args.hook_out or args.hook].float()
            yield pair[0] / self.scales[0], pair[1] / self.scales[1]

    @torch.no_grad()
    def score(self, code: Encoder) -> dict[str, float]:
        """Return L0, FVU and the share of latents that never fire on the held-out rows."""
        parts = [code(x) for x in self.held[0].split(BATCH)]
        z, y_hat, y = *(torch.cat([p[i] for p in parts]) for i in (0, 1)), self.held[1]
        fvu = (y_hat - y).square().sum() / (y - y.mean(0)).square().sum()
        active = z != 0
        found = {
            "l0": active.sum(1).double().mean(),
            "fvu": fvu,
            "dead": 1 - active.any(0).double().mean(),
        }
        return {name: float(value) for name, value in found.items()}


def opened(args: argparse.Namespace) -> Any:
    hooks = (args.hook,) if args.hook_out is None else (args.hook, args.hook_out)
    return open_source(Path(args.store), hooks=hooks, verify=False)


def ours(data: Data, kind: str, seed: int, coefficient: float) -> Encoder:
    """Ours, with its defaults; JumpReLU by target_l0."""
    args, k = data.args, round(data.args.l0)
    penalty = {"kind": "relu"}
    own: dict[str, Any] = {
        "jumprelu": {"activation": {"kind": "jumprelu"}, "target_l0": args.l0},
        "relu": {"activation": penalty, "l1": coefficient},
        "p_anneal": {"activation": penalty, "l1": coefficient, "p_end": P_END},
        "gated": {"activation": {"kind": "gated"}, "l1": coefficient},
        "topk": {"activation": {"kind": "topk", "k": k}},
        "batch_topk": {"activation": {"kind": "batch_topk", "k": k}},
        "matryoshka": {"activation": {"kind": "matryoshka", "k": k}},
        "transcoder": {"activation": {"kind": "topk", "k": k}},
        "skip_transcoder": {"activation": {"kind": "topk", "k": k}, "skip": True},
    }[kind]
    member = {"d_sae": args.d_sae, "lr": args.lr, **own}
    given = None if args.hook_out is None else {args.hook: args.hook_out}
    whole = {"members": (member,), "tokens": args.tokens, "seed": seed, "hook_out": given}
    cfg, source = TrainConfig.parse({**whole, "batch_size": BATCH}), opened(args)
    family = make_family(cfg, source.stats())
    run_steps(cfg, family, source.stream(BATCH, seed), 0, lambda _: None, lambda _: None)
    sae = finished(family.all()[0][1])

    def coded(x: Tensor) -> tuple[Tensor, Tensor]:
        if kind not in BY_K:
            return sae.encode(x), sae(x)
        made = training_forward(sae, x)
        return made.code.dense(args.d_sae), made.x_hat

    return coded


class Peer(NamedTuple):
    """A trainer of another tool, of scaled rows."""

    parameters: list[Tensor]
    loss: Callable[[Tensor, Tensor, int], Tensor]
    code: Encoder
    decoder: Tensor | None = None
    """Its rows, or columns, are kept at norm 1."""
    axis: int = 1
    clip: bool = False
    """Whether its trainer holds the gradient's norm at 1 at most."""


def saelens(data: Data, kind: str, coefficient: float, steps: int) -> Peer:
    """Return SAELens' training class; JumpReLU as Anthropic trains it, its penalty rising until the end."""
    names = {
        "jumprelu": ("jumprelu", "JumpReLU"),
        "relu": ("standard", "Standard"),
        "gated": ("gated", "Gated"),
        "topk": ("topk", "TopK"),
        "batch_topk": ("batchtopk", "BatchTopK"),
        "matryoshka": ("matryoshka_batchtopk", "MatryoshkaBatchTopK"),
    }
    args, (place, name) = data.args, names[kind]
    own: dict[str, Any] = {"k": round(args.l0)} if kind in BY_K else {}
    if kind == "jumprelu":
        own = {"jumprelu_sparsity_loss_mode": "tanh", "jumprelu_ste_to_input": True}
        own |= {"jumprelu_bandwidth": 2.0, "jumprelu_init_threshold": 0.1}
    if kind == "matryoshka":
        own["matryoshka_widths"] = [round(args.d_sae * e) for e in itertools.accumulate(FRACTIONS)]
    module = importlib.import_module(f"sae_lens.saes.{place}_sae")
    given = importlib.import_module("sae_lens.saes.sae").TrainStepInput
    d_in = len(data.means[0])
    sae = getattr(module, f"{name}TrainingSAE")(
        getattr(module, f"{name}TrainingSAEConfig")(d_in=d_in, d_sae=args.d_sae, **own)
    )
    sae.b_dec.data.copy_(data.means[0])

    def loss(x: Tensor, _: Tensor, step: int) -> Tensor:
        prices = {"l0": coefficient * min(1.0, step / steps), "l1": coefficient}
        return sae.training_forward_pass(given(x, prices, None, step, False)).loss

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        z = sae.encode(x)
        return z, sae.decode(z)

    return Peer(list(sae.parameters()), loss, code, clip=True)


def dictionary_learning(data: Data, kind: str, coefficient: float, steps: int) -> Peer:
    """Return the loss of dictionary_learning's trainer, with its constraint on the decoder."""
    names = {
        "jumprelu": ("jumprelu", "JumpReluTrainer"),
        "relu": ("standard", "StandardTrainer"),
        "p_anneal": ("p_anneal", "PAnnealTrainer"),
        "gated": ("gdm", "GatedSAETrainer"),
        "topk": ("top_k", "TopKTrainer"),
        "batch_topk": ("batch_top_k", "BatchTopKTrainer"),
        "matryoshka": ("matryoshka_batch_top_k", "MatryoshkaBatchTopKTrainer"),
    }
    args, (place, name) = data.args, names[kind]
    module = importlib.import_module(f"dictionary_learning.trainers.{place}")
    own: dict[str, Any] = {"k": round(args.l0)} if kind in BY_K else {"sparsity_warmup_steps": None}
    own |= {"group_fractions": list(FRACTIONS)} if kind == "matryoshka" else {}
    own |= {"l1_penalty": coefficient} if kind in ("relu", "gated") else {}
    if kind == "jumprelu":
        own |= {"sparsity_penalty": args.penalty, "target_l0": args.l0}
        own |= {} if args.bandwidth is None else {"bandwidth": args.bandwidth}
    if kind == "p_anneal":
        own |= {
            "initial_sparsity_penalty": coefficient,
            "p_end": P_END,
            "sparsity_function": "Lp^p",
        }
        own |= {"anneal_start": int(ANNEAL_FROM * steps)}
    d_in = len(data.means[0])
    trainer = getattr(module, name)(
        steps=steps, activation_dim=d_in, dict_size=args.d_sae, layer=0, lm_name="none",
        warmup_steps=0, device="cpu", lr=args.lr, seed=torch.initial_seed(), **own,
    )  # fmt: skip
    ae = trainer.ae
    bias = next(b for b in ("b_dec", "decoder_bias", "bias") if hasattr(ae, b))
    getattr(ae, bias).data.copy_(data.means[0])
    decoder, axis = (ae.W_dec, 1) if hasattr(ae, "W_dec") else (ae.decoder.weight, 0)

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        z = ae.encode(x, use_threshold=False) if kind in BY_K else ae.encode(x)
        return z, ae.decode(z)

    if kind == "jumprelu":
        ae.threshold.data.fill_(coefficient)

    def loss(x: Tensor, _: Tensor, step: int) -> Tensor:
        return trainer.loss(x, step=step)

    clip = kind not in ("gated", "p_anneal")
    return Peer(list(ae.parameters()), loss, code, decoder, axis, clip)


def sparsify(data: Data, kind: str, coefficient: float, steps: int) -> Peer:  # noqa: ARG001
    """Return sparsify's SparseCoder as its Trainer uses it: a transcoder's decoder rows have any length there."""
    from sparsify import SparseCoderConfig
    from sparsify.sparse_coder import SparseCoder

    args, (mean, goal) = data.args, data.means
    skip, transcode = kind == "skip_transcoder", kind != "topk"
    cfg = SparseCoderConfig(
        num_latents=args.d_sae, k=round(args.l0), transcode=transcode, skip_connection=skip
    )
    sae = SparseCoder(len(mean), cfg, "cpu", dtype=torch.float32)
    if transcode:
        sae.encoder.bias.data = -mean @ sae.encoder.weight.data.T
    sae.b_dec.data.copy_(goal)

    def loss(x: Tensor, y: Tensor, step: int) -> Tensor:  # noqa: ARG001
        return sae(x=x, y=y, total_variance=(y - y.mean(0)).square().sum()).fvu

    def code(x: Tensor) -> tuple[Tensor, Tensor]:
        out = sae(x=x)
        z = x.new_zeros(len(x), args.d_sae).scatter_(1, out.latent_indices, out.latent_acts)
        return z, out.sae_out

    return Peer(list(sae.parameters()), loss, code, None if transcode else sae.W_dec)


MAKE = {SAELENS: saelens, DL: dictionary_learning, SPARSIFY: sparsify}


def trained(data: Data, tool: str, kind: str, seed: int, coefficient: float) -> Encoder:
    """Train a peer and return what it makes of rows in their own units."""
    torch.manual_seed(seed)
    args = data.args
    steps = args.tokens // BATCH
    peer = MAKE[tool](data, kind, coefficient, steps)
    optimizer = torch.optim.Adam(peer.parameters, lr=args.lr, fused=True)
    for step, (x, y) in enumerate(data.batches(seed)):
        optimizer.param_groups[0]["lr"] = args.lr * lr_factor(step, steps, 0.05, 0.2)
        optimizer.zero_grad()
        peer.loss(x, y, step).backward()
        if peer.decoder is not None:
            unit, grad = normalize(peer.decoder.detach(), dim=peer.axis), peer.decoder.grad
            assert grad is not None
            grad -= (grad * unit).sum(peer.axis, keepdim=True) * unit
        if peer.clip:
            clip_grad_norm_(peer.parameters, 1.0)
        optimizer.step()
        if peer.decoder is not None:
            peer.decoder.data.copy_(normalize(peer.decoder.data, dim=peer.axis))

    def coded(x: Tensor) -> tuple[Tensor, Tensor]:
        z, y_hat = peer.code(x / data.scales[0])
        return (z.to_dense() if z.is_sparse else z), y_hat * data.scales[1]

    return coded


def fit(data: Data, tool: str, kind: str, seed: int, coefficient: float) -> dict[str, float]:
    """Train once, print the scores and return them."""
    begin = time.process_time()
    make = ours if tool == "wsae" else lambda *rest: trained(data, tool, *rest[1:])
    found = data.score(make(data, kind, seed, coefficient))
    row = {"kind": kind, "tool": tool, "seed": seed, "coefficient": coefficient, **found}
    print(json.dumps(row | {"cpu_s": round(time.process_time() - begin, 1)}), flush=True)
    return found


CLOSE, TRIES = 0.08, 4


def searched(data: Data, tool: str, kind: str, first: float) -> float:
    """Return the coefficient with which the first seed comes nearest to the L0 asked for."""
    tries: list[tuple[float, float]] = []
    at, slope = math.log(first), -0.8
    for _ in range(TRIES):
        l0 = fit(data, tool, kind, 0, math.exp(at))["l0"]
        tries.append((at, math.log(max(l0, 1e-3) / data.args.l0)))
        if abs(tries[-1][1]) < CLOSE:
            break
        if len(tries) > 1 and tries[-1][0] != tries[-2][0]:
            rise = (tries[-1][1] - tries[-2][1]) / (tries[-1][0] - tries[-2][0])
            slope = min(rise, -0.2)
        at -= max(-2.0, min(2.0, tries[-1][1] / slope))
    return math.exp(min(tries, key=lambda tried: abs(tried[1]))[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("store")
    parser.add_argument("--kinds", nargs="+", choices=list(PEERS), default=list(PEERS)[:7])
    parser.add_argument("--tools", nargs="+", choices=["wsae", *MAKE], default=["wsae", *MAKE])
    parser.add_argument("--hook", default="layers.9")
    parser.add_argument("--hook-out", help="what transcoders are to give")
    parser.add_argument("--tokens", type=int, default=240_000)
    parser.add_argument("--d-sae", type=int, default=1152)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--l0", type=float, default=32.0)
    parser.add_argument(
        "--first", type=float, default=1.0, help="the first coefficient (or threshold) tried"
    )
    about = "coefficient of dictionary_learning's JumpReLU penalty"
    parser.add_argument("--penalty", type=float, default=1.0, help=about)
    parser.add_argument("--bandwidth", type=float, help="that of dictionary_learning's JumpReLU")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    data = Data.of(args)
    for kind in args.kinds:
        for tool in [tool for tool in ("wsae", *PEERS[kind]) if tool in args.tools]:
            free = kind in BY_K or (kind == "jumprelu" and tool == "wsae")
            coefficient = 0.0 if free else searched(data, tool, kind, args.first)
            for seed in range(0 if free else 1, args.seeds):
                fit(data, tool, kind, seed, coefficient)


if __name__ == "__main__":
    main()
