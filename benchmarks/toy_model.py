"""Time and quality of the trained toy models: 11 levels of S side by side, n = 200 features in d_in = 20. Prints JSON.

    python benchmarks/toy_model.py --schedule fast --threads 2

`fast` is `wsae.toy.config.FAST`, `full` the reference's 10,000 steps. Per level: the loss on fresh rows beside that of
the best linear model with a bias, (1 - d_in / n) Var(x_i); the number of features with ||W_i|| > 1/2; the shares of
their pairs that interfere positively and negatively (the theory assumes no positive one).
"""

import argparse
import json
import resource
import time

import torch

from wsae.toy.config import FAST, FeatureConfig, ToyModelConfig
from wsae.toy.features import feature_moments
from wsae.toy.model import train_toy_models
from wsae.toy.world import superposition

LEVELS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--schedule", choices=("fast", "full"), default="fast")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--n", type=int, default=200, help="features")
    parser.add_argument("--d-in", type=int, default=20)
    parser.add_argument("--steps", type=int, help="steps instead of the schedule's")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    schedule = FAST if args.schedule == "fast" else {}
    schedule = schedule | ({"steps": args.steps} if args.steps else {})
    features = [FeatureConfig(n_features=args.n, sparsity=s) for s in LEVELS]
    cfgs = [ToyModelConfig(features=f, d_in=args.d_in, **schedule) for f in features]
    began = time.perf_counter()
    models = train_toy_models(cfgs)
    seconds = time.perf_counter() - began
    rows = []
    for i, cfg in enumerate(features):
        mean, second = feature_moments(cfg)
        found = superposition(models.W_p[i])
        linear = (1 - args.d_in / args.n) * float((second - mean.square()).mean())
        rows.append(
            {
                "sparsity": cfg.sparsity,
                "loss": float(models.loss[i]),
                "best_linear": linear,
                "represented": found.represented,
                "positive_share": found.positive_share,
                "negative_share": found.negative_share,
                "squared_norm": float(found.norms.square().sum()),
            }
        )
    usage = resource.getrusage(resource.RUSAGE_SELF)
    steps = len(cfgs) * cfgs[0].steps
    head = {
        "seconds": seconds,
        "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "microseconds_per_model_step": 1e6 * seconds / steps,
        "model_steps": steps,
        "threads": args.threads,
    }
    print(json.dumps({**head, "levels": rows}, indent=1))


if __name__ == "__main__":
    main()
