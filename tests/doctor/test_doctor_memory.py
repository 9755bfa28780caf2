"""What the doctor says a run will hold, against the most that it holds in a process of its own."""

import json
import os
import subprocess
import sys

import pytest
import torch

from wsae.doctor.measure import check_covariance, kernels_of, memory, parameters
from wsae.kernels.native.build import why_not
from wsae.sae import SAE, SAEConfig, TopK
from wsae.sae.config import GammaConfig, JumpReLU, PreconditionConfig
from wsae.train.config import MemberConfig

SCRIPT = """
import json, sys, tempfile
from pathlib import Path
import numpy as np
from wsae.acts.source import ArraySource
from wsae.doctor import measure
from wsae.doctor.run import DoctorConfig
from wsae.doctor.run import examine
from wsae.train.config import TrainConfig
from wsae.train.run import train_run

job = json.loads(sys.argv[1])
place = Path(tempfile.mkdtemp())
rows = np.random.default_rng(0).standard_normal((job["rows"], job["d_in"]), dtype=np.float32)
np.save(place / "x.npy", rows)
del rows
cfg = TrainConfig.parse(job["train"], where="test")
doctor = DoctorConfig(train=cfg, data=str(place / "x.npy"), probe_seconds=1e-9)
value = next(c["value"] for c in examine(doctor)["checks"] if c["name"] == "memory")
train_run(cfg, ArraySource(place / "x.npy"), place / "run")
print(json.dumps([value, measure.held_memory('cpu', 'VmHWM')]))
"""
UNITS = {"MB": 1e6, "GB": 1e9}


def ask(job: dict) -> list:
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    return json.loads(done.stdout.splitlines()[-1])


SIZES = [(64, 8192, 4096, "eager")] + ([] if why_not() else [(384, 6144, 1024, "native")])


@pytest.mark.parametrize(("d_in", "d_sae", "batch", "kernels"), SIZES)
def test_the_peak_of_a_run_is_foreseen_within_15_percent(d_in, d_sae, batch, kernels):
    member = {"d_sae": d_sae, "activation": {"kind": "topk", "k": 16}}
    train = {"members": [member], "tokens": 3 * batch, "batch_size": batch, "kernels": kernels}
    job = {"d_in": d_in, "rows": 2 * batch, "train": train}
    value, peak = ask(job)
    number, unit = value.split()[:2]
    assert peak == pytest.approx(float(number) * UNITS[unit], rel=0.15), value


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_are_those_of_the_sae(tied):
    for activation in (TopK(k=2), JumpReLU()):
        cfg = SAEConfig(d_in=6, d_sae=20, activation=activation, tied=tied)
        trained = sum(p.numel() for p in SAE(cfg).parameters() if p.requires_grad)
        assert parameters(cfg) == trained


def test_weights_gradients_and_moments_are_sixteen_bytes_a_weight_and_members_add_up():
    cfg = SAEConfig(d_in=10, d_sae=100, activation=TopK(k=2), tied=True)
    one = memory([cfg], ["eager"], batch_size=50)
    two = memory([cfg, cfg], ["eager", "eager"], batch_size=50)
    assert one.weights + one.optimiser == 16 * 1000
    assert two.weights + two.optimiser == 2 * 16 * 1000
    assert two.total == sum(two)
    assert two._replace(held=7).total == two.total + 7


def test_compiled_kernels_keep_no_gradients_and_no_dense_buffer():
    cfg = SAEConfig(d_in=512, d_sae=16384, activation=TopK(k=32))
    eager, native = (memory([cfg], [kind], batch_size=4096) for kind in ("eager", "native"))
    assert native.weights == 4 * parameters(cfg) + 512 * 16384
    assert eager.weights == 8 * parameters(cfg)
    assert eager.step - native.step > 4096 * 16384 * 2
    assert kernels_of("eager", "cpu", cfg) == "eager"
    assert kernels_of("auto", "cuda", cfg) == "eager"
    relu = SAEConfig(d_in=512, d_sae=16384, activation=JumpReLU())
    assert kernels_of("auto", "cpu", relu) == "eager"  # at the start, before its code is sparse


def test_compiled_members_step_side_by_side_and_eager_ones_in_turn():
    cfg = SAEConfig(d_in=64, d_sae=256, activation=TopK(k=32))

    def step(kernels: str, together: int) -> int:
        return memory([cfg] * 3, [kernels] * 3, batch_size=65536, together=together).step

    one, two, three = (step("native", n) for n in (1, 2, 3))
    assert three - two == pytest.approx(two - one, abs=2)
    assert two > one
    assert step("eager", 3) == step("eager", 1)


def test_a_covariance_needs_more_rows_than_dimensions():
    x = torch.randn(300, 40, generator=torch.Generator().manual_seed(0))
    variance, whiten = (
        MemberConfig(gamma=GammaConfig(rule=rule)) for rule in ("variance", "whiten")
    )
    mapped = MemberConfig(precondition=PreconditionConfig(kind="whiten"))
    assert check_covariance("h", x, [variance], 10) == []
    (found,) = check_covariance("h", x, [variance, mapped], 1000)
    assert found.name == "covariance for precondition whiten at h"
    for rows, status in ((40, "fail"), (41, "warn"), (399, "warn"), (400, "ok"), (10**9, "ok")):
        (found,) = check_covariance("h", x, [whiten, variance], rows)
        assert found.status == status
        assert "whiten at h" in found.name
    assert "131,072 rows" in found.value  # no more are used, however many there are
    assert "13 KB" in found.value or "12.8 KB" in found.value  # 40^2 x 8 bytes
