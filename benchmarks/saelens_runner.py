"""Seconds per training step of SAELens' synthetic runner; `benchmarks/bank.py --saelens-python` starts it.

    pip install sae-lens==6.54.12          (an environment of its own is best: it brings about a hundred packages)
    python benchmarks/saelens_runner.py --n 200 --d-in 20 --d-sae 200 --threads 2

Reads lines "BATCH STEPS" from stdin and answers each with one JSON line; between them it sleeps. A world of features
with P(active) = 1 - S in random directions, and a standard SAE (ReLU, untied, biases, no L1, Adam), as in its examples.
The runner's own work is timed: drawing data, the step, its progress bar; not its construction nor its evaluation.
"""

import argparse
import json
import logging
import sys
import time


def seconds_per_step(args: argparse.Namespace, batch: int, steps: int) -> float:
    from sae_lens.config import LoggingConfig
    from sae_lens.saes.standard_sae import StandardTrainingSAEConfig
    from sae_lens.synthetic import (
        ConstantFiringProbabilityConfig,
        SyntheticModelConfig,
        SyntheticSAERunner,
        SyntheticSAERunnerConfig,
    )

    world = SyntheticModelConfig(
        num_features=args.n,
        hidden_dim=args.d_in,
        seed=0,
        bias=False,
        firing_probability=ConstantFiringProbabilityConfig(probability=1 - args.sparsity),
        mean_firing_magnitudes=0.5,
        std_firing_magnitudes=0.29,  # it has no uniform (0, 1]; same mean and deviation
        orthogonalization=None,
    )
    cfg = SyntheticSAERunnerConfig(
        synthetic_model=world,
        sae=StandardTrainingSAEConfig(d_in=args.d_in, d_sae=args.d_sae, l1_coefficient=0.0),
        training_samples=batch * steps,
        batch_size=batch,
        lr=1e-3,
        device="cpu",
        output_path=None,
        checkpoint_path=None,
        run_final_eval=False,
        logger=LoggingConfig(log_to_wandb=False),
    )
    runner = SyntheticSAERunner(cfg)
    started = time.perf_counter()
    runner.run()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("n", 200), ("d-in", 20), ("d-sae", 200), ("threads", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sparsity", type=float, default=0.9)
    args = parser.parse_args()
    answers, sys.stdout = sys.stdout, sys.stderr  # the library prints
    import importlib.metadata

    import torch

    torch.set_num_threads(args.threads)
    logging.disable(logging.WARNING)
    version = importlib.metadata.version("sae-lens")
    print(json.dumps({"sae_lens": version, "torch": torch.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        batch, steps = map(int, line.split())
        seconds = seconds_per_step(args, batch, steps)
        print(json.dumps({"seconds_per_step": seconds}), file=answers, flush=True)


if __name__ == "__main__":
    main()
