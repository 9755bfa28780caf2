"""Damage to every kind of file is found and named: the short form of benchmarks/reliability/corruption.py."""

import random
import sys
from pathlib import Path

import pytest

from wsae.core.errors import UserError
from wsae.core.files import unsealed

sys.path.append(str(Path(__file__).resolve().parents[2]))
from benchmarks.reliability import corruption, targets

CASES = 72


def test_no_damage_to_any_artifact_crashes_a_reader_or_passes_it(tmp_path: Path) -> None:
    found = corruption.run(targets.make_targets(tmp_path), CASES, 0, tmp_path / "case")
    wrong = [case for case in found if case.outcome not in corruption.RIGHT]
    assert not wrong, "\n".join(map(str, wrong))
    counts = corruption.summary(found)
    assert counts["cases"] == CASES
    assert counts["detected"] > 0.9 * CASES
    assert len(counts["by_target"]) >= 15


def test_a_reader_that_believes_everything_would_be_told_on(tmp_path: Path) -> None:
    place = tmp_path / "it"
    place.mkdir()
    (place / "a").write_bytes(bytes(range(200)))
    readers = {
        "silent": lambda at: (at / "a").read_bytes(),
        "crashed": lambda at: [][(at / "a").read_bytes() != bytes(range(200))],
        "unnamed": lambda at: refuse("something is wrong", (at / "a").read_bytes()),
        "detected": lambda at: refuse(f"{at / 'a'}: altered", (at / "a").read_bytes()),
        "same": lambda at: (at / "a").name,
    }
    for outcome, read in readers.items():
        case = corruption.trial(
            targets.Target("it", place, ("a",), read),
            "a",
            random.Random(0),
            bytes(range(200)) if outcome == "silent" else "a",
            tmp_path / "case",
        )
        assert case.outcome == outcome, outcome


def refuse(words: str, data: bytes) -> bytes:
    if data != bytes(range(200)):
        raise UserError(words)
    return data


def test_every_damage_changes_the_bytes() -> None:
    pick = random.Random(1)
    kinds = set()
    for size in (1, 2, 600):
        data = bytes(size)
        for _ in range(60):
            damaged, kind, _ = corruption.damaged(data, pick)
            assert damaged != data
            kinds.add(kind)
    assert kinds == {"flip", "flips", "cut"}  # zeros cannot be zeroed
    assert "zeros" in {corruption.damaged(b"\xff" * 9, pick)[1] for _ in range(60)}


def test_a_sealed_file_that_cannot_be_hashed_is_damaged_and_no_accident() -> None:
    value: dict = {"a": "deep"}
    for _ in range(3000):
        value = {"a": value}
    with pytest.raises(UserError, match="x.json: damaged"):
        unsealed({**value, "checksum": ""}, Path("x.json"))
