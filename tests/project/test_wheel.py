"""The wheel holds the package and nothing else, and works from where it lies."""

import importlib.util
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("wheels", ROOT / "benchmarks" / "wheels.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


WHEELS = script()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return WHEELS.build(tmp_path_factory.mktemp("dist"))


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    assert WHEELS.contents(wheel) == []
    names = set(zipfile.ZipFile(wheel).namelist())
    assert "wsae_bench/worker.py" in names
    kinds = {Path(name).suffix for name in names if name.startswith("wsae/")}
    assert kinds >= {".py", ".typed", ".cpp", ".css", ".js", ".j2", ".gz"}
    assert not [name for name in names if "test" in name.split("/")[0]]


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda names: names - {"wsae/py.typed"}, "wsae/py.typed: missing"),
        (lambda names: names - {"wsae/assets/text.jsonl.gz"}, "wsae/assets/text.jsonl.gz: missing"),
        (lambda names: names | {"tests/test_x.py"}, "tests/test_x.py: not of the package"),
    ],
)
def test_the_check_sees_what_is_missing_or_too_much(damage, says, wheel, tmp_path) -> None:
    with zipfile.ZipFile(wheel) as whole, zipfile.ZipFile(tmp_path / wheel.name, "w") as other:
        for name in damage(set(whole.namelist())):
            other.writestr(name, whole.read(name) if name in whole.namelist() else b"")
    assert says in WHEELS.contents(tmp_path / wheel.name)


def test_the_package_works_from_the_wheel_alone(wheel: Path, tmp_path: Path) -> None:
    """Unpacked elsewhere, ahead of the tree: data files are found, a run is trained."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = """
import numpy as np, wsae
from wsae.cli.main import main
np.save("x.npy", np.random.default_rng(0).standard_normal((400, 8)).astype("f4"))
words = "--d-sae 16 --k 2 --tokens 400 --batch-size 100 --device cpu"
assert main(["train", "x.npy", "--out", "run", *words.split()]) == 0
assert main(["report", "run", "--out", "r.html"]) == 0
print(wsae.__file__)
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=env, capture_output=True, text=True, check=False
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "site" / "wsae" / "__init__.py")
    assert (tmp_path / "r.html").stat().st_size > 1000
