"""The benchmark: what it measures, by which formulas, and that no peer can bring it down."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from wsae.core.errors import UserError
from wsae_bench import ours, rounds, run, table
from wsae_bench import run as data
from wsae_bench import run as machine
from wsae_bench import table as scaling
from wsae_bench.config import (
    FLOOR,
    HELDOUT,
    OURS,
    PEERS,
    PINS,
    SIZES,
    BenchConfig,
    Block,
    Job,
    Size,
    Variant,
    blocks,
)
from wsae_bench.rounds import WORKER, WorkerFailed, WorkerProcess, installed
from wsae_bench.run import run_bench

TINY = Size(name="tiny", d_in=16, d_sae=64, k=4, batch=64, warmup=2, rounds=2, turn=2)
EAGER = OURS[1]


def block(variants, size: Size = TINY) -> Block:
    jobs = tuple(Job(name=v.name, variant=v, size=size) for v in variants)
    return Block(kind="speed", title="speed, size tiny: x", jobs=jobs)


def setting(tmp_path: Path, **fields) -> rounds.Setting:
    rows = data.rows_for(TINY.d_in, TINY.batch, 6, HELDOUT)
    data.write_mixtures(tmp_path / "rows", rows, TINY.d_in, 0)
    return rounds.Setting(data={TINY.d_in: (str(tmp_path / "rows"), rows)}, **fields)


def read(path: Path, d_in: int) -> torch.Tensor:
    return torch.from_numpy(np.fromfile(path, dtype=np.float32)).view(-1, d_in)


# the rows


@given(st.integers(40, 5000))
def test_zipf_frequencies_have_the_wanted_mean_and_never_rise(n):
    chance = data.zipf(n)
    assert float(chance.double().sum()) == pytest.approx(min(data.ACTIVE, data.MOST * n), rel=1e-4)
    assert float(chance.max()) <= data.MOST
    assert bool((chance.diff() <= 0).all())
    free = chance[chance < data.MOST * 0.999].double()
    rank = torch.arange(n - len(free) + 1, n + 1, dtype=torch.float64)
    assert torch.allclose(free * rank, (free * rank)[-1:], rtol=1e-4)


def test_mixtures_are_the_seeds_and_have_the_stated_size(tmp_path):
    for name, rows, seed in (("a", 3000, 0), ("b", 3000, 0), ("c", 3000, 1), ("short", 2100, 0)):
        data.write_mixtures(tmp_path / name, rows, 32, seed)
    a = read(tmp_path / "a", 32)
    assert a.shape == (3000, 32)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
    assert torch.equal(a[:2048], read(tmp_path / "short", 32)[:2048])
    assert float(a[:2048].double().square().sum(1).mean()) == pytest.approx(32, rel=1e-5)
    assert float(a.mean(0).norm()) > 0.3 * 32**0.5  # the offset is there


def test_real_activations_are_rows_of_the_file_scaled_alike(tmp_path):
    x = np.random.default_rng(0).normal(3.0, 1.0, (300, 8)).astype(np.float16)
    np.save(tmp_path / "x.npy", x)
    data.write_array(tmp_path / "rows", tmp_path / "x.npy", 200, seed=0)
    made = read(tmp_path / "rows", 8)
    assert float(made.double().square().sum(1).mean()) == pytest.approx(8, rel=1e-5)
    factor = made / made[:, :1]
    source = torch.from_numpy(x.astype(np.float32))
    known = {tuple(row) for row in (source / source[:, :1]).numpy().round(2).tolist()}
    assert sum(tuple(row) in known for row in factor.numpy().round(2).tolist()) > 190
    assert len(torch.unique(made, dim=0)) == 200


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((5, 3), dtype=np.int64), "matrix of floats"),
        (np.zeros(5, dtype=np.float32), "matrix of floats"),
        (np.full((5000, 16), np.nan, dtype=np.float32), "NaN"),
        (np.zeros((50, 16), dtype=np.float32), "50 rows"),
    ],
)
def test_bad_activations_end_in_one_line(tmp_path, array, words):
    np.save(tmp_path / "x.npy", array)
    cfg = BenchConfig(sizes=(TINY,), only=("wsae-eager",), lr=None, families=False,
                      dtypes=("float32",), acts=str(tmp_path / "x.npy"))  # fmt: skip
    with pytest.raises(UserError, match=words):
        run_bench(cfg)


def test_long_runs_see_their_rows_again():
    assert data.rows_for(16, 64, 10, 100) == 740
    assert data.rows_for(1024, 4096, 10**6, HELDOUT) * 4 * 1024 <= data.LIMIT


# what is run


def test_blocks_hold_the_installed_peers_and_the_floor():
    cfg = BenchConfig(threads=(1, 2), kinds=True)
    found = blocks(cfg, set(PINS))
    speeds = [b for b in found if b.kind == "speed"]
    assert len(speeds) == 2 * 2 * 2
    names = {job.name for job in speeds[0].jobs}
    assert names == {"floor", *(v.name for v in (*OURS, *PEERS))}
    assert {job.name for job in speeds[1].jobs} == names - {"saelens-sparse"}
    (fit,) = [b for b in found if b.kind == "fit"]
    assert {job.lr for job in fit.jobs} == {2e-3}
    assert not {job.name for job in fit.jobs} & {"sparsify-signum", "sparsify-groupmax"}
    assert fit.jobs[0].size.name == "B"
    assert fit.steps >= 60
    assert all(job.lr is None for b in speeds for job in b.jobs)
    few = blocks(cfg, {"overcomplete"})
    assert {j.variant.library for b in few for j in b.jobs} == {"wsae", "limits", "overcomplete"}
    kinds = next(b for b in found if b.kind == "kinds")
    assert {j.name for j in kinds.jobs} >= {"wsae", "wsae-eager", "sparsify-signum", "dl-topk"}
    without = blocks(cfg, set(), native=False)
    assert "native" not in {j.variant.settings.get("kernels") for b in without for j in b.jobs}
    assert {j.name for j in without[0].jobs} == {"floor", "wsae-eager"}


@given(st.integers(1, 14), st.floats(1e9, 1e11))
def test_waves_cover_every_job_with_the_anchors_in_each(n_peers, free):
    variants = [FLOOR, *OURS, *(Variant(name=f"p{i}", library="peer") for i in range(n_peers))]
    jobs = list(block(variants, SIZES["A"]).jobs)
    found = rounds.waves(jobs, free)
    assert {job.name for wave in found for job in wave} == {job.name for job in jobs}
    assert all(wave[0].name == "floor" and wave[1].name == "wsae" for wave in found)
    assert len({len(wave) for wave in found[:-1]}) <= 1
    others = [job.name for wave in found for job in wave[2:]]
    assert len(others) == len(set(others))


# the formulas


def samples(name: str, library: str, seconds, size: Size = TINY, **parts) -> rounds.Samples:
    job = Job(name=name, variant=Variant(name=name, library=library), size=size)
    steps = [{"s": s, "cpu_s": s, "other_load": 0.0, **parts} for s in seconds]
    built = {"base_mib": 100.0, "lr": 1e-3}
    return rounds.Samples(job, built, steps, 150.0, {"fvu": 0.5, "l0": 4.0}, len(steps) + 2)


def test_rows_are_medians_and_ratios_within_the_block():
    zero = dict.fromkeys(table.PRIMITIVES, 0.5)
    limits = {**zero, "mm_fp32": 0.003, "mm_bf16": 0.002, "mm_int8": 0.001, "adam_fused": 0.001}
    measured = [
        samples("floor", "limits", [1.0, 1.0], **limits),
        samples("wsae", "wsae", [0.004, 0.010, 0.005]),
        samples("fast", "peer", [0.020, 0.020]),
        samples("slow", "peer", [0.050, 0.030, 0.040]),
        rounds.Samples(Job(name="dead", variant=FLOOR, size=TINY), error="RuntimeError: no"),
    ]
    found = table.summarise(block([FLOOR]), measured)
    assert found["floor_ms"] == pytest.approx(3.0)
    rows = {row["variant"]: row for row in found["rows"]}
    assert rows["wsae"]["ms"] == pytest.approx(5.0)
    assert rows["wsae"]["tokens_per_s"] == pytest.approx(64 / 0.005)
    assert rows["wsae"]["of_fastest_peer"] == pytest.approx(4.0)
    assert rows["wsae"]["floor_share"] == pytest.approx(0.6)
    assert rows["wsae"]["floor_8_share"] == pytest.approx(0.4)
    assert rows["slow"]["of_fastest_peer"] == pytest.approx(0.5)
    assert rows["wsae"]["extra_mib"] == pytest.approx(50.0)
    assert rows["wsae"]["fvu_tokens"] == 5 * 64
    assert "ms" not in rows["dead"]
    assert found["failed"] == ["dead: RuntimeError: no"]
    assert found["primitives"]["mm_bf16"]["gflops"] == pytest.approx(2 * 64 * 16 * 64 / 0.002 / 1e9)


@given(st.lists(st.floats(0.1, 10), min_size=3, max_size=6), st.floats(-1, 3))
def test_exponents_are_least_squares_slopes(noise, power):
    points = [(2.0**i, 7 * 2.0 ** (i * power) * e) for i, e in enumerate(noise)]
    slope, low, high = scaling.exponent(points)
    x, y = np.log(np.array(points)).T
    assert slope == pytest.approx(float(np.polyfit(x, y, 1)[0]), abs=1e-9)
    assert low <= slope <= high
    exact = [(2.0**i, 7 * 2.0 ** (i * power)) for i in range(4)]
    assert scaling.exponent(exact) == pytest.approx((power, power, power), abs=1e-6)


def test_a_steep_exponent_is_a_warning():
    rows = []
    for d_sae in (64, 128, 256):
        row = {"variant": f"d_sae={d_sae}", "d_sae": d_sae, "ms": d_sae**1.5, "extra_mib": d_sae}
        rows.append(row | {"ms": float(row["ms"]), "extra_mib": float(d_sae)})
    time_fit, memory_fit = scaling.exponents(rows)
    assert "d_sae^1.50" in time_fit["warning"]
    assert memory_fit["warning"] == ""


# the workers


def test_a_worker_trains_as_the_trainer_does_and_measures_by_the_stated_formula(tmp_path):
    at = setting(tmp_path)
    job = block([EAGER]).jobs[0]
    (found,) = rounds.run_block(block([EAGER]), at)
    assert found.error == ""
    assert (len(found.steps), found.trained) == (4, 6)
    assert [int(step["step"]) for step in found.steps] == [2, 3, 4, 5]
    assert found.peak_mib > found.built["base_mib"] > 50
    x = read(tmp_path / "rows", 16)
    held, train = x[:HELDOUT], x[HELDOUT:]
    again = ours.make(
        SimpleNamespace(**rounds.described(job, block([EAGER]), at)), None, train[:64]
    )
    for i, batch in enumerate(train.split(64)):
        again.step(i, batch)
    x_hat, fired = again.reconstruct(held)
    fvu = ((x_hat - held) ** 2).sum() / held.var(0, correction=0).sum() / len(held)
    assert found.fit["fvu"] == pytest.approx(float(fvu), rel=1e-4)
    assert found.fit["l0"] == pytest.approx(fired / len(held), rel=1e-3)


def fake(folder: Path, name: str, package: str, code: str) -> None:
    """Install a package of that name and pinned version whose import runs `code`."""
    info = folder / f"{name.replace('-', '_')}-{PINS[name]}.dist-info"
    info.mkdir(parents=True)
    info.joinpath("METADATA").write_text(f"Name: {name}\nVersion: {PINS[name]}\n")
    place = folder.joinpath(*package.split("."))
    place.mkdir(parents=True)
    for level in [place, *place.parents][: package.count(".") + 1]:
        (level / "__init__.py").touch()
    (place / "__init__.py").write_text(code)


def test_a_machine_without_a_compiler_skips_one_line_and_fails_nothing(monkeypatch):
    monkeypatch.setattr(run, "why_not", lambda: "no C++ compiler found")
    monkeypatch.setattr(rounds, "WorkerProcess", Puppet)
    cfg = BenchConfig(sizes=(TINY,), only=("wsae", "wsae-eager"), lr=None, families=False)
    result = run_bench(cfg)
    assert result["skipped"] == [
        "skipped: the compiled kernels cannot be used here (no C++ compiler found)"
    ]
    assert [row["variant"] for row in result["blocks"][0]["rows"]] == ["wsae-eager"]
    assert result["failed"] is False


def test_peers_that_fail_or_die_are_named_and_the_others_go_on(tmp_path, monkeypatch):
    fake(tmp_path / "site", "overcomplete", "overcomplete", "raise RuntimeError('no such cpu')")
    fake(tmp_path / "site", "sae-lens", "sae_lens.config", "import os\nos.kill(os.getpid(), 9)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    assert set(installed(None, list(PINS))) == {"overcomplete", "sae-lens"}
    only = ("overcomplete", "saelens", "sparsify-adam")
    cfg = BenchConfig(sizes=(TINY,), only=only, lr=None, families=False, dtypes=("float32",))
    told: list[str] = []
    result = run_bench(cfg, say=told.append)
    assert result["skipped"][0] == (
        "skipped: eai-sparsify is not installed (pip install 'wsae[bench]', or name another "
        "interpreter with --peers-python)"
    )
    assert result["errors"] == 2
    assert result["failed"] is False
    rows = {row["variant"]: row for row in result["blocks"][0]["rows"]}
    assert rows["overcomplete"]["error"] == "RuntimeError: no such cpu"
    assert "signal 9" in rows["saelens"]["error"]
    assert result["blocks"][0]["floor_ms"] > 0
    assert any("overcomplete failed" in line for line in told)


def test_a_peer_that_hangs_is_ended(tmp_path, monkeypatch):
    hang = "import time\nprint('to stdout')\ntime.sleep(600)"
    fake(tmp_path / "site", "dictionary-learning", "dictionary_learning.trainers", hang)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    peer = next(v for v in PEERS if v.name == "dl-topk")
    (found,) = rounds.run_block(block([peer]), setting(tmp_path, timeout_s=2.0))
    assert found.error == "no answer to 'build' in 2 s, so it was ended"
    assert not found.steps


DOUBLE = """
import torch

class TopKTrainer:
    def __init__(self, **settings):
        assert settings["warmup_steps"] == 0 and settings["steps"] == 6
        self.lr = settings["lr"] or 0.5
        self.ae = self
        self.seen = []
    def update(self, step, x):
        print("noise on stdout")
        assert step == len(self.seen) and x.dtype == torch.float32
        self.seen.append(x)
    def encode(self, x, use_threshold):
        assert not use_threshold
        return torch.ones(len(x), 3)
    def decode(self, z):
        return torch.cat(self.seen).mean(0).expand(len(z), -1)
"""


def test_a_peers_fvu_is_that_of_its_own_reconstruction(tmp_path, monkeypatch):
    fake(tmp_path / "site", "dictionary-learning", "dictionary_learning.trainers", DOUBLE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"), prepend=os.pathsep)
    at = setting(tmp_path)
    peer = next(v for v in PEERS if v.name == "dl-topk")
    (found,) = rounds.run_block(block([peer]), at)
    assert found.error == ""
    assert found.built["lr"] == 0.5
    assert found.built["version"] == PINS["dictionary-learning"]
    x = read(tmp_path / "rows", 16)
    held, mean = x[:HELDOUT], x[HELDOUT:].mean(0)
    fvu = ((held - mean) ** 2).sum() / ((held - held.mean(0)) ** 2).sum()
    assert found.fit["fvu"] == pytest.approx(float(fvu), rel=1e-5)
    assert found.fit["l0"] == 3.0


def test_a_worker_ends_with_its_parents_pipe_and_on_close():
    worker = WorkerProcess(sys.executable)
    assert "torch" in worker.ask({"do": "versions", "names": ["torch"]}, 30.0)["versions"]
    with pytest.raises(WorkerFailed, match="no request 'dance'"):
        worker.ask({"do": "dance"}, 30.0)
    worker.close()
    assert worker._process.poll() == -signal.SIGKILL
    lone = subprocess.Popen([sys.executable, str(WORKER)], stdin=subprocess.PIPE)
    assert lone.stdin is not None
    lone.stdin.close()
    assert lone.wait(30) == 0


LONELY = """
import sys, time
from wsae_bench.rounds import WorkerProcess
worker = WorkerProcess(sys.executable)
worker.ask({"do": "versions", "names": []}, 30.0)
print(worker._process.pid, flush=True)
time.sleep(600)
"""


def test_a_busy_worker_ends_when_its_parent_is_killed():
    parent = subprocess.Popen([sys.executable, "-c", LONELY], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    child = Path("/proc") / parent.stdout.readline().decode().strip() / "stat"
    os.kill(int(child.parent.name), signal.SIGSTOP)  # busy: it does not read its stdin
    assert child.exists()
    parent.kill()
    parent.communicate()
    for _ in range(100):
        if not child.exists() or child.read_text().rpartition(")")[2].split()[0] == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("the worker outlived its parent")


def test_an_interpreter_that_is_none_is_refused(tmp_path):
    with pytest.raises(UserError, match="cannot be run"):
        installed(tmp_path / "no-python", ["torch"])
    with pytest.raises(UserError, match="no Python interpreter"):
        installed(Path("/bin/true"), ["torch"])


class Puppet:
    """Stands in for a worker: answers at once and notes who stepped, in order."""

    order: list[tuple[str, int, int]] = []

    def __init__(self, *_) -> None:
        self.name, self.request = "", {}

    def ask(self, request, _timeout_s: float):
        return {"versions": {name: "0" for name in request["names"]}}

    def send(self, request) -> None:
        self.request = request

    def receive(self, _timeout_s: float, what: str):
        request = self.request
        if what == "build":
            self.name = request["job"]["name"]
            return {"base_mib": 1.0, "lr": 1.0}
        if what == "step":
            self.order.append((self.name, request["first"], request["count"]))
            step = {
                "s": 1.0,
                "cpu_s": 1.0,
                "other_load": 0.0,
                **dict.fromkeys(table.PRIMITIVES, 1.0),
            }
            return {"steps": [step] * request["count"], "peak_mib": 2.0}
        return {"fvu": 0.5, "l0": 4.0}

    def close(self) -> None:
        pass


def test_variants_step_in_turn_and_each_round_begins_with_another(monkeypatch):
    monkeypatch.setattr(rounds, "WorkerProcess", Puppet)
    monkeypatch.setattr(Puppet, "order", [])
    at = rounds.Setting(data={16: ("rows", 5000)})
    found = rounds.run_block(block([FLOOR, *OURS], TINY.model_copy(update={"rounds": 4})), at)
    a, b, c = "floor", "wsae", "wsae-eager"
    assert Puppet.order[:3] == [(a, 0, 2), (b, 0, 2), (c, 0, 2)]
    turns = [Puppet.order[3 + 3 * r : 6 + 3 * r] for r in range(4)]
    assert [[name for name, *_ in turn] for turn in turns] == [
        [a, b, c],
        [b, c, a],
        [c, a, b],
        [a, b, c],
    ]
    assert [{first for _, first, _ in turn} for turn in turns] == [{2}, {4}, {6}, {8}]
    assert {(len(of.steps), of.trained) for of in found} == {(8, 10)}


def test_a_deadline_ends_the_rounds_after_one(monkeypatch):
    monkeypatch.setattr(rounds, "WorkerProcess", Puppet)
    at = rounds.Setting(data={16: ("rows", 5000)}, deadline=time.monotonic())
    (found,) = rounds.run_block(block([EAGER]), at)
    assert (len(found.steps), found.trained) == (2, 4)
    assert found.fit["fvu"] == 0.5


# the machine


def test_the_commit_is_that_of_our_own_repository(tmp_path):
    inner, words = tmp_path / "src" / "wsae", ["git", "-C", str(tmp_path)]
    inner.mkdir(parents=True)
    assert machine.commit(inner) == "unknown"
    subprocess.run([*words, "init", "-q"], check=True)
    assert machine.commit(inner) == "unknown"
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    subprocess.run([*words, *who, "commit", "-q", "--allow-empty", "-m", "a"], check=True)
    head = subprocess.run([*words, "rev-parse", "HEAD"], capture_output=True, text=True)  # noqa: PLW1510
    assert machine.commit(inner) == head.stdout.strip() != ""
    (inner.parent / "wsae").rename(inner.parent / "other")  # a repository around an environment
    assert machine.commit(tmp_path) == "unknown"


def test_the_processor_is_described_from_what_the_kernel_tells(tmp_path):
    text = "processor : 0\nmodel name : Chip 9\nflags : fpu avx2 amx_bf16\n\nprocessor : 1\n"
    (tmp_path / "cpuinfo").write_text(text)
    name, flags = machine.processor(tmp_path / "cpuinfo")
    assert name == "Chip 9"
    assert flags == {"fpu", "avx2", "amx_bf16"}
    found = machine.describe()
    assert found["cores"] == str(os.cpu_count())
    assert json.dumps(found)
