"""Do loss weights bring an SAE's code nearer to the true features? Random W_p, exact losses, many starts.

    python examples/weights_and_truth.py --worlds 24

For each W_p (non-positive interference, d_sae = n < 2 d_in, loss above 0) and sparsity S it searches the minimiser of
every rule's loss and compares L_GT, latents matched to features, with the plain minimiser's. About a minute.
"""

import argparse
import statistics

from wsae.theory.claims.weights import RULES, reweighted, unfinished

FAR = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worlds", type=int, default=24)
    parser.add_argument("--starts", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    half = flags.worlds // 2
    worlds = unfinished(flags.seed, flags.worlds - half, 3, 4) + unfinished(flags.seed, half, 4, 5)
    print("S     rule            better  worse  median   least   most   (L_GT against plain)")
    for sparsity in (0.2, 0.5, 0.8):
        search = {"starts": flags.starts, "steps": 250, "polished": 2, "seed": flags.seed}
        found = [reweighted(W_p, sparsity, **search) for W_p in worlds]
        for rule in RULES:
            change = [f[rule].truth / f["plain"].truth - 1 for f in found]
            better, worse = sum(c < -FAR for c in change), sum(c > FAR for c in change)
            spread = statistics.median(change), min(change), max(change)
            cells = "  ".join(f"{value:+6.1%}" for value in spread)
            print(f"{sparsity:<5} {rule:<15} {better:>6} {worse:>6}  {cells}", flush=True)


if __name__ == "__main__":
    main()
