"""Every gamma rule beside its plain twin on one store, several seeds: the table of docs/reproduction.md.

    python examples/gamma_rules.py STORE OUT [--seeds 0 1 2] [--passes 3]

Each seed is one family: other initial weights, other batch order, the same held-out rows. Prints, per member,
the metrics at each seed and their differences from the plain twin of that seed with 95 % bootstrap intervals.
"""

import argparse
import json
from pathlib import Path

from wsae.acts.source import StoreSource
from wsae.api import Member
from wsae.evals.config import EvalConfig
from wsae.evals.run import evaluate_run
from wsae.train.config import TrainConfig
from wsae.train.run import train_run

MEMBERS = (
    Member(),
    Member(gamma="variance", alpha=1.0),
    Member(gamma="variance", alpha=0.5),
    Member(gamma="variance", alpha=-0.5),
    Member(gamma="variance", alpha=1.0, robust="winsor", quantile=0.95),
    Member(gamma="variance", alpha=1.0, robust="rank"),
    Member(gamma="latent_variance", alpha=0.5),
)
METRICS = (
    "fvu",
    "fvu_weighted",
    "ev_dim_mean",
    "dead_frac",
    "dense_frac",
    "decoder_cosine_max_mean",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("store", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--passes", type=int, default=3)
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()
    source = StoreSource(args.store)
    members = tuple(m.model_copy(update={"lr": args.lr, "encoder_scale": 1.0}) for m in MEMBERS)
    for seed in args.seeds:
        cfg = TrainConfig(members=members, tokens=source.n_rows * args.passes, seed=seed)
        run = train_run(cfg, source, args.out / f"seed-{seed}", resume=True).path
        record = evaluate_run(run, source, EvalConfig(splice_tokens=0, n_latents=0))
        (hook,) = record["hooks"].values()
        for name, member in hook["members"].items():
            row = {"seed": seed, "member": name}
            row |= {m: (member["metrics"].get(m) or {}).get("value") for m in METRICS}
            for line in hook["comparisons"]:
                if line["a"] == name and line["metric"] in METRICS:
                    row[f"{line['metric']} - plain"] = [
                        line["difference"],
                        line["low"],
                        line["high"],
                    ]
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
