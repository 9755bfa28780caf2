"""A world whose features are known, an SAE trained on it, and how much of the truth it recovered.

    python examples/toy_world.py --sparsity 0.95

About ten seconds. Try --sparsity 0.7: the activations are reconstructed far better, the features hardly at all.
"""

import argparse

import wsae
from wsae.theory.geometry import random_unit
from wsae.toy.config import FeatureConfig
from wsae.toy.world import World


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--features", type=int, default=64)
    parser.add_argument("--d-in", type=int, default=20)
    parser.add_argument("--sparsity", type=float, default=0.95)
    parser.add_argument(
        "--k", type=int, help="active latents; default: the mean number of features"
    )
    parser.add_argument("--rows", type=int, default=100_000)
    args = parser.parse_args()

    # 1. A world: 64 features share 20 dimensions, each is active in one row of twenty.
    W_p = random_unit(args.d_in, args.features, seed=0)  # [d_in, n], unit columns
    world = World(W_p, FeatureConfig(n_features=args.features, sparsity=args.sparsity))
    _, acts = world.sample(args.rows, seed=1)  # training never sees the features

    # 2. An SAE with as many latents as there are features.
    k = args.k or max(1, round(args.features * (1 - args.sparsity)))
    sae = wsae.fit(acts, k=k, d_sae=args.features, lr=3e-3, tokens=10 * args.rows, batch_size=1024)

    # 3. What it recovered, on rows it has not seen.
    x, acts = world.sample(8192, seed=2)
    found = wsae.recovery(sae, x, acts, W_p)
    s = found.scores
    print(f"unexplained variance of the activations    {s['fvu']:.3f}")
    print(
        f"directions: mean |cos| of matched pairs    {s['mcc_direction']:.3f}"
        f"   (random directions: {s['mcc_direction_chance']:.3f})"
    )
    print(f"codes: mean correlation of matched pairs   {s['mcc_code']:.3f}")
    print(
        f"loss against the features, relative        {s['gt_scaled_rel']:.3f}"
        f"   (zeros: {s['gt_zero_rel']:.3f}, linear readout: {s['gt_linear_rel']:.3f})"
    )
    print(f"features that answer to one latent         {s['activated_participation']:.1f}")

    # 4. Feature by feature: which ones were not found?
    worst = found.per_feature["correlation"].nan_to_num().argsort()[:5].tolist()
    print("least recovered features, with their latent, its correlation, precision and recall:")
    for i in worst:
        latent = int(found.assignment["code"][i])
        numbers = [
            float(found.per_feature[key][i]) for key in ("correlation", "precision", "recall")
        ]
        print(f"  feature {i:>3}  latent {latent:>3}  " + "  ".join(f"{v:.2f}" for v in numbers))


if __name__ == "__main__":
    main()
