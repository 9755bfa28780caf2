"""What a change of structure must not change, as digests: record them on one commit, compare on another.

    python benchmarks/golden.py record before.json       # on the commit before, then the same after
    python benchmarks/golden.py compare before.json after.json

A tiny model is harvested, trained on, evaluated, interpreted, reported, exported and indexed; every file that this
writes, each claim's verdict, what every command takes and says, and the public names are digested. The digests of
trained bits hold for one machine and one PyTorch alone, which is why they are compared, not kept.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import sqlite3
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
os.environ["OMP_NUM_THREADS"] = "1"  # sums keep one order


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def written(at: Path) -> dict[str, str]:
    """Return the digests of all that the stages write, the names of this machine's folders left out."""
    from benchmarks.reliability import world

    world.prepare()
    world.make(at)
    found = {}
    for stage, words in world.commands(at).items():
        world.finish(words, at / "log")
        for name, data in world.contents(at / world.OUTPUTS[stage]).items():
            if name.endswith(".sqlite"):
                with contextlib.closing(sqlite3.connect(at / world.OUTPUTS[stage] / name)) as index:
                    data = "\n".join(index.iterdump()).encode()
            found[f"{stage}/{name}"] = digest(data)
    return found


def said(words: list[str]) -> str:
    from wsae.cli.main import main

    with (
        contextlib.redirect_stdout(io.StringIO()) as out,
        contextlib.redirect_stderr(io.StringIO()),
    ):
        code = main(words)
    return f"{code}\n{out.getvalue()}"


def described() -> dict[str, str]:
    """Return the digests of help, of printed configurations, of the claims' verdicts, and of the public names."""
    import wsae
    from wsae.cli import table

    found = {"names": digest(json.dumps(sorted(wsae.__all__)).encode())}
    required = {"report": ["RUN"], "serve": ["RUN"], "evaluate": ["RUN"], "compare": ["RUN"]}
    for name in table.names():
        found[f"{name} --help"] = digest(said([name, "--help"]).encode())
        words = [name, *required.get(name, []), "--print-config"]
        found[f"{name} --print-config"] = digest(said(words).encode())
    claims = json.loads(re.sub(r"^\d+\n", "", said(["theory", "--json"])))
    for claim in claims:
        found[f"claim {claim['source']}: {claim['claim']}"] = claim["verdict"]
    return found


def record(out: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="golden-") as folder:
        at = Path(folder).with_name("wsae-golden")  # the same name each time: outputs hold it
        at.mkdir()
        try:
            found = written(at) | described()
        finally:
            shutil.rmtree(at)
    out.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
    print(f"{len(found)} digests in {out}")


def compare(before: Path, after: Path) -> int:
    old, new = json.loads(before.read_text()), json.loads(after.read_text())
    other = [key for key in sorted(old.keys() | new.keys()) if old.get(key) != new.get(key)]
    for key in other:
        print(f"differs: {key}")
    print(f"{len(old.keys() | new.keys())} digests, {len(other)} differ")
    return min(1, len(other))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("files", nargs="+", type=Path)
    args = parser.parse_args()
    if args.what == "record":
        record(args.files[0])
        return 0
    return compare(*args.files)


if __name__ == "__main__":
    sys.exit(main())
