"""What a power cut may take; test_reliability_stages.py cuts whole stages off."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from wsae.acts import language as gguf
from wsae.core.artifact import write_manifest
from wsae.core.errors import UserError
from wsae.core.files import write_json
from wsae.kernels.native import build
from wsae.train.loop import enter


@pytest.fixture
def renamed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Path]]:
    """Collect what gets its final name; each file of it must have been flushed as it is then."""
    flushed: dict[int, int] = {}
    places: list[Path] = []
    fsync, replace = os.fsync, os.replace

    def flushing(handle: int) -> None:
        fsync(handle)
        flushed[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def naming(source: str | Path, target: str | Path) -> None:
        source = Path(source)
        for path in [source] if source.is_file() else source.rglob("*"):
            assert flushed.get(path.stat().st_ino) == path.stat().st_size, path
        replace(source, target)
        places.append(Path(target))

    monkeypatch.setattr(os, "fsync", flushing)
    monkeypatch.setattr(os, "replace", naming)
    yield places
    assert places


def test_a_file_is_on_the_disk_before_its_name_and_its_name_before_we_go_on(
    tmp_path: Path, renamed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    after: list[int] = []
    fsync = os.fsync

    def noting(handle: int) -> None:
        fsync(handle)
        if renamed:
            after.append(os.fstat(handle).st_ino)

    monkeypatch.setattr(os, "fsync", noting)
    write_json(tmp_path / "a" / "x.json", {"a": 1})
    assert renamed == [tmp_path / "a" / "x.json"]
    assert after == [(tmp_path / "a").stat().st_ino]


def test_a_compiled_library_is_on_the_disk_before_its_name(
    tmp_path: Path, renamed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "c++"
    compiler.write_text(
        '#!/bin/sh\nwhile [ "$1" ] && [ "$1" != -o ]; do shift; done\necho library > "${2:-/dev/null}"\n'
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "cache"))
    library = build._built()
    assert renamed == [library.parent]
    assert library.read_text() == "library\n"


def test_a_converted_model_is_on_the_disk_before_its_name(
    tmp_path: Path, renamed: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def convert(_path: Path, into: Path) -> None:
        (into / "config.json").write_text("{}")
        (into / "unused.json").write_text("[]")
        (into / "model.safetensors").write_bytes(bytes(5000))

    monkeypatch.setattr(gguf, "_convert", convert)
    monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    folder = gguf.dequantised(tmp_path / "model.gguf")
    assert renamed == [folder]
    assert (folder / "model.safetensors").stat().st_size == 5000


def test_a_manifest_lists_what_is_on_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed: dict[int, int] = {}
    fsync = os.fsync

    def noting(handle: int) -> None:
        fsync(handle)
        flushed[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    monkeypatch.setattr(os, "fsync", noting)
    rows = tmp_path / "metrics.jsonl"  # appended to, not written by `writing`
    rows.write_text('{"step": 1}\n')
    write_manifest(tmp_path, "run", {}, iter([rows.name]))
    assert flushed[rows.stat().st_ino] == rows.stat().st_size


def test_a_run_killed_while_it_writes_its_first_file_begins_again(tmp_path: Path) -> None:
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.json.4194305.tmp").write_text('{"half')  # no process has this number
    enter(tmp_path, "run", {"a": 1}, resume=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == [".lock", "config.json"]
    (tmp_path / ".config.json.notes").touch()
    (tmp_path / "config.json").unlink()
    with pytest.raises(UserError, match="is not empty and not a wsae run"):
        enter(tmp_path, "run", {"a": 1}, resume=True)
