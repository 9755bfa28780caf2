"""Pretraining on two processes: one batch's loss and gradients are those of one process; stopping and resuming."""

import os
import signal
import socket
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.multiprocessing as mp

from wsae.acts.images.sets import ArrayImages
from wsae.core.artifact import read_manifest
from wsae.core.errors import UserError
from wsae.train.loggers import read_json_lines
from wsae.train.loop import Stopped
from wsae.train.parallel.world import Mesh, joined
from wsae.vision.config import PretrainConfig, preset
from wsae.vision.data import make_data
from wsae.vision.pretrain import Pretrainer, Ranks, pretrain

RANKS, STOP = 2, 3


def images() -> ArrayImages:
    rng = np.random.default_rng(0)
    labels = np.arange(60) % 3
    x = rng.integers(0, 60, (60, 8, 8)) + 60 * labels[:, None, None]
    return ArrayImages(x.astype(np.uint8), labels.astype(np.int64), ("a", "b", "c"), "x")


def config(**changes: object) -> PretrainConfig:
    small = {"widths": (8, 8, 8, 8), "batch_size": 12, "epochs": 2, "log_every": 1}
    return preset("tiny", **{**small, **changes})


def check_one_batch(world: Mesh) -> None:
    """With batch statistics left out of it, two halves give the loss and the gradients of the whole."""
    cfg = config()
    data = make_data(cfg, images())
    alone, shared = Pretrainer(cfg, data), Pretrainer(cfg, data, ranks=Ranks(world))
    index, views = next(iter(alone.batches(0)))
    labels = alone.labels(index)
    assert labels is not None
    alone.model.eval()
    shared.model.eval()
    part = shared.part
    assert (part.start, part.stop) == (6 * world.rank, 6 * world.rank + 6)
    both = views.view(2, 12, *views.shape[1:])
    loss, right = alone.gradients(views, labels)
    own = torch.stack(shared.gradients(both[:, part].flatten(0, 1), labels[part]))
    torch.testing.assert_close(shared.ranks.mean_(own), torch.stack([loss, right]))
    pairs = zip(alone.model.named_parameters(), shared.model.parameters(), strict=True)
    for (name, a), b in pairs:
        assert a.grad is not None, name
        assert b.grad is not None, name
        largest = float(a.grad.abs().max())
        torch.testing.assert_close(b.grad, a.grad, rtol=1e-4, atol=1e-5 * largest + 1e-9)
        assert largest > 0, name


def check_resuming(world: Mesh, out: Path) -> None:
    """The last rank is asked to stop: all stop after that step, and go on as if nothing had been."""
    whole = pretrain(config(), images(), out / "whole", world=world)
    assert whole.info["images"]["train"] > 40
    take = Pretrainer.step

    def step(self: Pretrainer, views: torch.Tensor, labels: torch.Tensor, number: int) -> None:
        take(self, views, labels, number)
        if number == STOP - 1 and world.rank == RANKS - 1:
            os.kill(os.getpid(), signal.SIGINT)

    Pretrainer.step = step  # type: ignore[method-assign]
    with pytest.raises(Stopped, match=f"step {STOP} of"):
        pretrain(config(), images(), out / "cut", world=world)
    Pretrainer.step = take  # type: ignore[method-assign]
    pretrain(config(), images(), out / "cut", world=world, resume=True)


def work(rank: int, port: int, out: Path) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(RANKS)}
    with joined(None) as world:
        check_one_batch(world)
        check_resuming(world, out)
        with pytest.raises(UserError, match="use a multiple of 2"):
            pretrain(config(batch_size=13), images(), out / "uneven", world=world)


def test_two_processes_train_as_one_and_resume_bit_for_bit(tmp_path: Path) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = int(s.getsockname()[1])
    mp.set_forkserver_preload(["wsae.vision.pretrain"])
    mp.start_processes(work, (port, tmp_path), RANKS, start_method="forkserver")
    assert not (tmp_path / "uneven").exists()
    runs = [tmp_path / "whole", tmp_path / "cut"]
    files = [read_manifest(run, "pretrain").files for run in runs]
    assert files[0] == files[1]
    rows = read_json_lines(runs[0] / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))  # one writer
