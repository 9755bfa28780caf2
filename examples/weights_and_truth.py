"""Do loss weights bring an SAE's code nearer to the true features? Random W_p, exact losses, searches that agree.

    python examples/weights_and_truth.py

For each W_p (non-positive interference, d_sae = n < 2 d_in, loss above 0) and sparsity S two searches from independent
starts look for the minimiser of every rule's loss; L_GT, latents matched to features, is compared with the plain
minimiser's. Where the two disagree after 1,024 starts each, or find different L_GT, that is counted. Some eight minutes
on one core.
"""

import argparse
import statistics

from wsae.theory.claims.weights import FAR, RULES, Reweighted, reweighted, unfinished

SHAPES = ((3, 4), (4, 5), (3, 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=12, help="random W_p of each shape")
    parser.add_argument("--starts", type=int, default=256, help="random starts of each search")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    worlds = {f"{d} x {n}": unfinished(flags.seed, flags.worlds, d, n) for d, n in SHAPES}
    print(
        "S     shape  rule            better  worse  median   least   most   (L_GT against plain)"
    )
    unsure = 0
    for sparsity in (0.2, 0.5, 0.8):
        for shape, matrices in worlds.items():
            found = [
                reweighted(W_p, sparsity, seed=flags.seed, starts=flags.starts) for W_p in matrices
            ]
            unsure += sum(
                not one.agreed or one.spread > FAR / 10 for f in found for one in f.values()
            )
            for rule in RULES:
                print(f"{sparsity:<5} {shape}  {rule:<15} {line(found, rule)}", flush=True)
    print(f"{unsure} of {3 * len(SHAPES) * flags.worlds * len(RULES)} minimisers are not sure")


def line(found: list[dict[str, Reweighted]], rule: str) -> str:
    """Return how many worlds a rule makes better and worse, and its changes of L_GT."""
    change = [f[rule].truth / f["plain"].truth - 1 for f in found]
    better, worse = sum(c < -FAR for c in change), sum(c > FAR for c in change)
    spread = statistics.median(change), min(change), max(change)
    return f"{better:>6} {worse:>6}  " + "  ".join(f"{value:+6.2%}" for value in spread)


if __name__ == "__main__":
    main()
