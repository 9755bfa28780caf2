"""The recovery scores of `wsae.recovery` beside SAELens' synthetic evaluation: the same SAE, features and rows.

    pip install sae-lens==6.54.12          (an environment of its own is best: it brings about a hundred packages)
    python benchmarks/saelens_parity.py [--features 60] [--d-in 20] [--latents 80] [--sparsity 0.95] [--rows 8192]

Trains a ReLU and a Top-k SAE with wsae, carries their weights into SAELens' classes, runs
`eval_sae_on_synthetic_data` there, and prints both numbers and their difference. Exit code 1 when a score that has the
same definition in both differs by more than 1e-4 (SAELens sums in fp32).
"""

import argparse
import importlib.metadata
import sys
from typing import Any

import torch

import wsae
from wsae.sae import ReLU

TOLERANCE = 1e-4
SAME = {
    "true_l0": "true_l0",
    "sae_l0": "l0",
    "dead_latents": "dead_frac",
    "shrinkage": "norm_ratio",
    "explained_variance": "fvu",
    "mcc": "mcc_direction",
    "uniqueness": "uniqueness",
    "classification/precision": "latent_precision",
    "classification/recall": "latent_recall",
    "classification/f1_score": "latent_f1",
    "classification/accuracy": "latent_accuracy",
}
"""SAELens' name -> ours, where the definition is the same (dead_latents is divided by d_sae, fvu taken from 1)."""
KIN = {
    "classification/precision": "precision",
    "classification/recall": "recall",
    "classification/f1_score": "f1",
    "shrinkage": "shrinkage_code",
}
"""SAELens' name -> ours, where a like word means something else."""


class Replay:
    """Stands in for SAELens' ActivationGenerator: hands out given features, batch after batch."""

    def __init__(self, features: torch.Tensor) -> None:
        self.left = features

    def sample(self, batch_size: int) -> torch.Tensor:
        batch, self.left = self.left[:batch_size], self.left[batch_size:]
        return batch


def world(args: argparse.Namespace, rows: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features, uniform (0, 1] with probability 1 - S and else 0, and random unit directions W_p [d_in, n]."""
    g = torch.Generator().manual_seed(seed)
    x = 1 - torch.rand(rows, args.features, generator=g)
    x *= torch.rand(rows, args.features, generator=g) >= args.sparsity
    directions = torch.randn(args.d_in, args.features, generator=torch.Generator().manual_seed(0))
    return x, torch.nn.functional.normalize(directions, dim=0)


def exported(sae: wsae.SAE) -> Any:
    """The same SAE as SAELens' class."""
    from sae_lens import StandardSAE, StandardSAEConfig, TopKSAE, TopKSAEConfig

    if isinstance(sae.cfg.activation, ReLU):
        other = StandardSAE(StandardSAEConfig(d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae))
    else:
        k = sae.cfg.activation.k
        other = TopKSAE(
            TopKSAEConfig(
                d_in=sae.cfg.d_in, d_sae=sae.cfg.d_sae, k=k, rescale_acts_by_decoder_norm=False
            )
        )
    assert sae.biases is not None
    tensors = {
        "W_enc": sae.W_enc,
        "W_dec": sae.W_dec,
        "b_enc": sae.biases[0],
        "b_dec": sae.biases[1],
    }
    other.load_state_dict({name: t.detach().clone().contiguous() for name, t in tensors.items()})
    return other


def theirs(sae: Any, x: torch.Tensor, W_p: torch.Tensor) -> dict[str, float]:
    """SAELens' synthetic evaluation on exactly these features."""
    from sae_lens.synthetic import FeatureDictionary, eval_sae_on_synthetic_data

    dictionary = FeatureDictionary(*x.shape[1:], W_p.shape[0], bias=False, initializer=None)
    dictionary.feature_vectors.data = W_p.T.contiguous()
    replay: Any = Replay(x)
    found = eval_sae_on_synthetic_data(sae, dictionary, replay, num_samples=len(x), batch_size=2048)
    return found.to_log_dict()


def same_scale(key: str, value: float, d_sae: int) -> float:
    """Our score in the form of SAELens' score `key`."""
    return {"dead_latents": value * d_sae, "explained_variance": 1 - value}.get(key, value)


def compare(name: str, sae: wsae.SAE, x: torch.Tensor, W_p: torch.Tensor) -> float:
    """Print both evaluations of one SAE; return the largest difference in scores of the same definition."""
    acts = x @ W_p.T
    other = exported(sae)
    with torch.no_grad():
        gap = float((other.encode(acts) - sae.encode(acts)).abs().max())
    ours, lens = wsae.recovery(sae, x, acts, W_p).scores, theirs(other, x, W_p)
    print(f"\n{name}: latents differ by at most {gap:.1e}")
    print(f"  {'SAELens':26}{'wsae':20}{'SAELens':>12}{'wsae':>12}{'difference':>12}")
    worst = 0.0
    for table, note in ((SAME, ""), (KIN, "  another definition")):
        for key, own in table.items():
            value = same_scale(key, ours[own], sae.cfg.d_sae)
            difference = value - lens[key]
            worst = max(worst, abs(difference)) if table is SAME else worst
            numbers = f"{lens[key]:12.6f}{value:12.6f}{difference:12.1e}"
            print(f"  {key:26}{own:20}{numbers}{note}")
    print(f"  chance level of mcc for random directions: {ours['mcc_direction_chance']:.4f}")
    return worst


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    for name, default in (("features", 60), ("d-in", 20), ("latents", 80), ("rows", 8192)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.95)
    args = parser.parse_args()
    try:
        version = importlib.metadata.version("sae-lens")
    except importlib.metadata.PackageNotFoundError:
        print("this comparison needs SAELens: pip install sae-lens==6.54.12", file=sys.stderr)
        return 2
    print(f"wsae {wsae.__version__}, SAELens {version}, torch {torch.__version__}")
    train, W_p = world(args, 65_536, seed=1)
    x, _ = world(args, args.rows, seed=2)
    options = {"d_sae": args.latents, "lr": 3e-3, "tokens": 500_000, "batch_size": 1024}
    kinds: dict[str, dict[str, Any]] = {
        "ReLU with an L1 penalty": {"activation": "relu", "l1": 0.1},
        "Top-k, k = 4": {"activation": "topk", "k": 4},
    }
    differences = [
        compare(name, wsae.fit(train @ W_p.T, **kind, **options), x, W_p)
        for name, kind in kinds.items()
    ]
    print(f"\nlargest difference in a score of the same definition: {max(differences):.1e}")
    return int(max(differences) > TOLERANCE)


if __name__ == "__main__":
    sys.exit(main())
