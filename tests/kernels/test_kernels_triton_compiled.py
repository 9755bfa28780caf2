"""The Triton kernels without a GPU: compiled for Hopper, refused where they do not apply."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from wsae.kernels.triton import support
from wsae.kernels.triton.support import unsupported

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton runs on Linux")
HERE, ROOT = Path(__file__).parent, Path(__file__).parents[2]


def run(arguments: list[str], **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    return done.stdout


@needs_triton
def test_they_compile_for_hopper(tmp_path) -> None:
    """Encoders use tensor cores (fp32 must not: no TF32); nothing adds atomically, so sums have one order."""
    out = run([str(HERE / "triton_compile.py")], TRITON_CACHE_DIR=str(tmp_path))
    found = json.loads(out)
    assert len(found) == 12
    exact, encoders = found[0], {"_candidates", "_winners", "_compare"}
    assert exact["tensor_core"] == 0
    for kernel in found:
        assert kernel["cubin"] > 0
        assert kernel["atomics"] == 0, kernel
        if kernel is not exact:
            assert (kernel["tensor_core"] > 0) == (kernel["name"] in encoders), kernel


def test_nothing_but_the_kernels_needs_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, wsae.kernels.eager\n"
        "from wsae.kernels.triton.support import unsupported\n"
        "print(unsupported(torch.zeros(4, 4), torch.float32, 2))"
    )
    assert run(["-c", code]).strip() == ("the kernels run on CUDA devices, the weights are on cpu")


def meta(d_sae: int, d_in: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(d_sae, d_in, dtype=dtype, device="meta")


@pytest.mark.parametrize(
    ("W", "dtype", "k", "grouped", "says"),
    [
        (meta(64, 8, torch.float64), torch.float32, 2, False, "weights are float64"),
        (meta(64, 8), torch.float16, 2, False, "product in float16"),
        (meta(64, 8).T, torch.float32, 2, False, "strides"),
        (meta(64, 8193), torch.float32, 2, False, "a width of 8,193"),
        (meta((1 << 20) + 1, 8), torch.float32, None, False, "d_sae = 1,048,577"),
        (meta(131_072, 8), torch.bfloat16, 513, False, "k = 513 of 131,072"),
        (meta(96, 8), torch.bfloat16, 12, True, "groups of 8"),
    ],
)
def test_what_the_kernels_do_not_do(W, dtype, k, grouped, says, monkeypatch) -> None:
    monkeypatch.setattr(support, "_missing", lambda W: None)  # noqa: ARG005
    reason = unsupported(W, dtype, k, grouped)
    assert reason is not None
    assert says in reason


@pytest.mark.parametrize(
    ("d_sae", "d_in", "k", "grouped"),
    [(24_576, 768, 32, False), (131_072, 4096, 32, False), (5000, 7, 5000, False),
     (24_576, 768, 32, True), (24_576, 768, None, False), (1 << 20, 8192, 512, False)],
)  # fmt: skip
def test_what_they_do(d_sae, d_in, k, grouped, monkeypatch) -> None:
    monkeypatch.setattr(support, "_missing", lambda W: None)  # noqa: ARG005
    assert unsupported(meta(d_sae, d_in), torch.bfloat16, k, grouped) is None


def test_the_gpu_benchmark_says_that_there_is_no_device(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), "--out", str(tmp_path / "gpu")],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 1
    said = "benchmarks/gpu.py: no CUDA device here; --rehearse goes through it on a CPU\n"
    assert done.stderr == said
    assert not (tmp_path / "gpu").exists()
