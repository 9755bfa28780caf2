"""Running out of memory ends in one line that names the buffer and the setting to lower."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from wsae.core.errors import Buffer, UserError, explained, is_out_of_memory
from wsae.sae.config import TopK
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.run import training_buffers

PRE = Buffer("pre-activations", (4096, 24576), 4, "--batch-size or --d-sae")
WEIGHTS = Buffer("weights", (24576, 768), 4, "--d-sae")
CPU = "[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate {} bytes. Error code 12"


def message(error: BaseException, buffers: list[Buffer]) -> str:
    with pytest.raises(UserError) as caught, explained("training", lambda: buffers):
        raise error
    assert caught.value.__cause__ is error
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("error", "named"),
    [
        (RuntimeError(CPU.format(402653184)), PRE),
        (RuntimeError(CPU.format(75497472)), WEIGHTS),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 384.00 MiB. GPU 0"), PRE),
        (MemoryError("Unable to allocate 72.0 MiB for an array with shape (24576, 768)"), WEIGHTS),
    ],
)
def test_the_buffer_of_the_refused_size_is_named_with_its_setting(error, named):
    text = message(error, [WEIGHTS, PRE])
    assert f"no room for {named}; lower {named.lower}" in text
    assert "403 MB" in str(PRE)


def test_a_size_that_is_no_known_buffer_names_the_largest():
    for error in (RuntimeError(CPU.format(1000)), MemoryError("std::bad_alloc"), MemoryError()):
        text = message(error, [WEIGHTS, PRE])
        assert f"its largest buffer is {PRE}" in text
        assert "lower --batch-size or --d-sae" in text
    assert "lower --batch-size (" in message(MemoryError(), [])


def test_other_errors_pass_unchanged():
    for error in (RuntimeError("shapes do not fit"), UserError("x"), ValueError("y"), OSError(12)):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)) as caught, explained("training", lambda: [PRE]):
            raise error
        assert caught.value is error


def test_what_numpy_and_torch_really_say_is_understood():
    for allocate, shape in (
        (lambda: np.empty((1 << 40, 1 << 12), dtype=np.float32), (1 << 40, 1 << 12)),
        (lambda: torch.empty(1 << 40, 1 << 12), (1 << 40, 1 << 12)),
    ):
        buffer = Buffer("far too much", shape, 4, "it")
        with (
            pytest.raises(UserError, match="no room for far too much"),
            explained("asking", lambda b=buffer: [b, PRE]),
        ):
            allocate()


def test_the_buffers_of_training_are_those_of_its_members():
    members = (
        MemberConfig(d_sae=512, activation=TopK(k=4)),
        MemberConfig(expansion=2, activation=TopK(k=4)),
    )
    cfg = TrainConfig(members=members, tokens=1000, batch_size=100)
    shapes = {(b.name, b.shape) for b in training_buffers(cfg, {"a": 16, "b": 16, "c": 32})}
    pre = {shape for name, shape in shapes if name == "pre-activations"}
    assert pre == {(100, 512), (100, 32), (100, 64)}
    assert ("activations of a batch", (100, 32)) in shapes


SCRIPT = """
import resource
import numpy as np
import torch._dynamo
from wsae.api import Member, fit_family
from wsae.core.errors import UserError
from wsae.core.errors import explained
from wsae.train.config import TrainConfig
from wsae.train.run import training_buffers

x = np.random.default_rng(0).standard_normal((4096, 64), dtype=np.float32)
member = Member(d_sae=16384, k=8)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 180 * 2**20,) * 2)
cfg = TrainConfig(members=(member,), tokens=8192, batch_size=4096, kernels="eager")
try:
    with explained("training", lambda: training_buffers(cfg, {"acts": 64})):
        fit_family(x, [member], tokens=8192, batch_size=4096, kernels="eager")
except UserError as error:
    print(error)
"""


def test_training_beyond_a_real_limit_names_the_pre_activations():
    command = [sys.executable, "-c", SCRIPT]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr
    assert "out of memory while training" in done.stdout
    assert "pre-activations [4096, 16384], 268 MB; lower --batch-size or --d-sae" in done.stdout
