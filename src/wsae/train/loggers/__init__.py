"""Copies of a run's metrics for TensorBoard and Weights & Biases; `metrics.jsonl` stays the truth.

with mirrored([tensorboard()], warn=print):
    train_run(cfg, source, out)
"""

from wsae.train.loggers.mirror import Logger, Mirror, Sink, mirrored, tensorboard, wandb

__all__ = ["Logger", "Mirror", "Sink", "mirrored", "tensorboard", "wandb"]
