"""What training through the model gains: one SAE of SmolLM2-135M's block 9 goes on in three ways on the same tokens.

    python benchmarks/through_model.py SAE --out DIR --seeds 0 1 2

The reconstruction's error (mse), the cross-entropy of the next token (ce) and the divergence from the untouched model's
predictions (kl), at one learning rate, on the shipped text in sequences of 128 tokens. Then the SAE as it was and all
that came of it are spliced into the model on the same held-out sequences. Prints a row for each and paired differences
from mse. Runs are kept in DIR: what was finished there is not trained again.
"""

import argparse
import json
import sys
from pathlib import Path

from wsae.acts.config import HarvestConfig, LiveConfig
from wsae.acts.live import LiveSource
from wsae.core.progress import quiet
from wsae.evals.config import EvalConfig
from wsae.evals.measure import EvaluatedSaes
from wsae.evals.run import evaluate_families
from wsae.sae.model import SAE
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import Start
from wsae.train.run import train_run

LOSSES = ("mse", "ce", "kl")
HOOK = "layers.9"
SHOWN = ("fvu", "l0", "ce_loss_recovered_zero", "ce_delta", "kl")


def tuned(start: Start, loss: str, seed: int, given: argparse.Namespace) -> SAE:
    """Return the SAE that comes of `start`, trained or found in the folder."""
    sae = start.saes[HOOK].cfg
    member = MemberConfig(d_sae=sae.d_sae, activation=sae.activation, lr=given.lr)
    cfg = TrainConfig(
        members=(member,),
        tokens=given.tokens,
        batch_size=given.batch_size,
        seed=seed,
        loss=None if loss == "mse" else loss,
    )
    harvest = HarvestConfig(hooks=(HOOK,), seq_len=128, tokens=given.tokens)
    source = LiveSource(harvest, LiveConfig(stats_tokens=4096))
    out = given.out / f"{loss}-{seed}"
    run = train_run(cfg, source, out, quiet, resume=True, start=start)
    print(f"{loss} {seed}: trained", file=sys.stderr)
    return next(iter(run.saes[HOOK].values()))


def main() -> None:
    """Train, evaluate, print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("sae", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--tokens", type=int, default=30_720)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--splice-tokens", type=int, default=4096)
    given = parser.parse_args()
    start = Start({HOOK: SAE.load(given.sae)}, str(given.sae))
    saes, twins = {"before": start.saes[HOOK]}, {}
    for seed in given.seeds:
        for loss in LOSSES:
            saes[f"{loss}-{seed}"] = tuned(start, loss, seed, given)
            twins |= {} if loss == "mse" else {f"{loss}-{seed}": f"mse-{seed}"}
    harvest = HarvestConfig(
        hooks=(HOOK,), seq_len=128, tokens=1024, heldout_tokens=given.splice_tokens
    )
    source, about = LiveSource(harvest), {name: {"gamma": {"rule": "none"}} for name in saes}
    cfg = EvalConfig(splice_tokens=given.splice_tokens)
    families = {HOOK: EvaluatedSaes(saes, twins, about)}
    found = evaluate_families(families, source, cfg, source.language).record["hooks"][HOOK]
    for name in saes:
        metrics = found["members"][name]["metrics"]
        print(json.dumps({"sae": name, **{key: metrics[key] for key in SHOWN if key in metrics}}))
    for line in found["comparisons"]:
        if line["metric"] in SHOWN and line["b"] in saes:
            print(json.dumps(line))


if __name__ == "__main__":
    main()
