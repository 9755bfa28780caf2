"""A rank that is killed: the job ends soon, with one line, and goes on to the same bits."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from test_train_parallel import features, free_port, run_ranks

from wsae.acts.source import open_source
from wsae.core.files import read_json
from wsae.train import loop as recording
from wsae.train.config import TrainConfig
from wsae.train.loop import checkpoints
from wsae.train.parallel import run as loop
from wsae.train.parallel.run import train_parallel
from wsae.train.parallel.world import joined, lay_out

LIMIT_S = 60
"""A killed rank is noticed at once; the rest is the others' end, on a busy machine."""
FLAGS = [
    "--activation",
    "batch_topk",
    "--d-sae",
    "64",
    "--k",
    "4",
    "--batch-size",
    "60",
    "--gamma",
    "none",
]

SCRIPT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train_parallel_killed import save_always
from wsae.cli.main import main
save_always()
Path(sys.argv[1], "pid-" + os.environ["RANK"]).write_text(str(os.getpid()))
sys.exit(main(sys.argv[2:]))
"""


def save_always() -> None:
    """Write a checkpoint after every step, so that the kill may land anywhere in one."""
    recording.CHECKPOINT_SECONDS = loop.AGREE_S = 0.0
    recording.Recorder._cost = property(lambda _: 0.0, lambda _, __: None)  # type: ignore[assignment]


def start(place: Path, *words: str) -> subprocess.Popen[str]:
    (place / "job.py").write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(place / "job.py"), str(place), *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def finish(rank: int, port: int, place: Path) -> None:
    """On two ranks: end the killed run, and run another undisturbed."""
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    cfg = TrainConfig.parse(read_json(place / "cut" / "config.json")["train"])
    source = open_source(place / "x.npy")
    with joined(None) as world:
        for name in ("cut", "whole"):
            store = dist.PrefixStore(name, world.store)
            again = lay_out(world.layout, rank, "cpu", store)
            train_parallel(cfg, source, place / name, again, resume=True)


def test_a_killed_rank_ends_the_job_with_one_line_and_loses_nothing(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", features(2000).numpy())
    run = tmp_path / "cut"
    words = ["train", str(tmp_path / "x.npy"), "--out", str(run), "--device", "cpu", *FLAGS]
    job = start(tmp_path, *words, "--tokens", "1200")
    try:
        while job.poll() is None and len(checkpoints(run)) < 2:
            time.sleep(0.05)
        assert job.poll() is None, job.communicate()
        os.kill(int((tmp_path / "pid-1").read_text()), signal.SIGKILL)
        begin = time.monotonic()
        out, errors = job.communicate(timeout=LIMIT_S)
    finally:
        job.kill()
    ours = [line for line in errors.splitlines() if line.startswith("wsae:")]
    assert time.monotonic() - begin < LIMIT_S
    assert job.returncode != 0
    assert out == ""
    assert len(ours) == 1, errors
    assert "rank 1 of 2 is gone" in ours[0]
    assert "--resume" in ours[0]
    begun = checkpoints(run)
    assert begun, "no checkpoint was left: the test showed nothing"
    run_ranks(finish, 2, free_port(), tmp_path)
    assert files_of(run) == files_of(tmp_path / "whole")


def files_of(run: Path) -> dict[str, bytes]:
    names = [p for p in run.rglob("*") if p.is_file() and p.name not in (".lock", "speed.jsonl")]
    return {str(p.relative_to(run)): p.read_bytes() for p in names}
