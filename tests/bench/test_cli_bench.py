"""`wsae bench` from the command line, at its smallest size and without peers."""

import contextlib
import csv
import io
import json
from pathlib import Path

import pytest

from wsae.cli.bench import show
from wsae.cli.common import UI
from wsae.cli.main import main
from wsae.core.artifact import read_manifest

SMALL = ("--d-in", "16", "--d-sae", "64", "--k", "4", "--batch", "64", "--rounds", "2",
         "--dtype", "float32", "--only", "wsae-eager")  # fmt: skip


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["bench", *words])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, str]:
    """One run: the directory it leaves and what it wrote to stdout."""
    place, out = tmp_path_factory.mktemp("bench") / "bench", io.StringIO()
    words = [*SMALL, "--lr", "0.002", "--fit-steps", "3", "--json", "--out", str(place)]
    with contextlib.redirect_stdout(out):
        assert main(["bench", *words]) == 0
    return place, out.getvalue()


def test_json_is_all_there_is_on_stdout(made):
    found = json.loads(made[1])
    assert [block["kind"] for block in found["blocks"]] == ["speed", "fit"]
    assert found["blocks"][1]["rows"][0]["lr"] == 0.002
    assert found["blocks"][0]["floor_ms"] > 0


def test_a_run_prints_tables_and_leaves_its_numbers(made):
    out, printed = made
    text = io.StringIO()
    show(json.loads(printed), UI(text, io.StringIO()))
    text = text.getvalue()
    for words in ("tokens/s", "share of floor", "encoder product, bf16", "0 variants failed"):
        assert words in text
    with (out / "results.csv").open() as file:
        row, fit = csv.DictReader(file)
    assert (fit["block"], fit["lr"]) == ("fit", "0.002")
    assert row["variant"] == "wsae-eager"
    assert (row["d_sae"], row["threads"], row["dtype"]) == ("64", "1", "float32")
    assert row["cpu"]
    assert row["commit"]
    with (out / "steps.csv").open() as file:
        steps = list(csv.DictReader(file))
    steps = [s for s in steps if (s["block"], s["variant"]) == ("speed", "wsae-eager")]
    assert len(steps) == int(row["steps"]) == 6
    middle = sorted(float(step["s"]) for step in steps)[2:4]
    assert 1e3 * sum(middle) / 2 == pytest.approx(float(row["ms"]))
    assert float(row["tokens_per_s"]) == pytest.approx(64e3 / float(row["ms"]))
    assert (out / "speed.png").read_bytes()[:4] == b"\x89PNG"
    assert set(read_manifest(out, "bench").files) >= {"results.csv", "steps.csv", "bench.json"}
    kept = json.loads((out / "bench.json").read_text())
    assert kept["blocks"][0]["rows"][0]["ms"] == pytest.approx(float(row["ms"]))


def test_quick_is_small(capsys):
    code, out, _ = run(capsys, "--quick", "--json", "--print-config")
    assert code == 0
    assert json.loads(out)["quick"] is True
    from wsae.cli.bench import Flags, config

    cfg = config(Flags(quick=True))
    assert [size.name for size in cfg.sizes] == ["B"]
    assert (cfg.dtypes, cfg.threads, cfg.lr, cfg.families) == (("float32",), (1,), None, False)
    assert cfg.only == ("wsae", "wsae-eager", "sparsify-adam", "dl-topk")
    assert cfg.seconds is not None
    assert cfg.seconds < 120


@pytest.mark.parametrize(
    ("flags", "dtypes"),
    [("avx2 avx512f", ("float32",)), ("avx2 amx_bf16", ("float32", "bfloat16"))],
)
def test_bf16_is_measured_where_the_processor_has_it(monkeypatch, flags, dtypes):
    from wsae.cli.bench import Flags, config
    from wsae_bench import run as machine

    monkeypatch.setattr(machine, "processor", lambda: ("Chip 9", frozenset(flags.split())))
    assert config(Flags()).dtypes == dtypes
    assert config(Flags(dtype=("bfloat16",))).dtypes == ("bfloat16",)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--size", "C"), "C"),
        (("--only", "openai"), "--only openai"),
        (("--device", "cuda"), "--device cuda"),
        (("--acts", "nowhere.npy"), "nowhere.npy"),
        (("--d-sae", "0"), "d_sae"),
        (("--threads", "0"), "threads"),
        (("--peers-python", "nowhere/python", "--quick"), "nowhere/python"),
    ],
)
def test_wrong_words_end_with_one_line(words, message, capsys):
    code, out, err = run(capsys, *words)
    assert (code, out) == (2, "")
    assert message in err
    assert err.count("\n") == 1
