"""Artifacts are whole or refused; seeds and permutations are what they claim."""

import contextlib
import functools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from wsae.core import cache
from wsae.core.artifact import MANIFEST, read_manifest, write_manifest
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae.core.files import locked, read_sealed, seal, write_json, writing
from wsae.core.seeds import Permutation, seed_for
from wsae.core.tensors import DTYPE_NAMES, MappedTensor, load_tensors, save_tensors


class Inner(Config):
    bandwidth: float = 0.1


class Outer(Config):
    inner: Inner = Inner()
    tokens: int = 5


def artifact(path: Path) -> Path:
    path.mkdir()
    (path / "a.bin").write_bytes(bytes(range(256)) * 40)
    write_json(path / "b.json", {"x": 1})
    write_manifest(path, "thing", {"k": 2}, ["a.bin", "b.json"], info={"n": 3})
    return path


def test_an_artifact_reads_back_what_was_written(tmp_path: Path) -> None:
    manifest = read_manifest(artifact(tmp_path / "it"), "thing")
    assert manifest.config == {"k": 2}
    assert manifest.info == {"n": 3}
    assert sorted(manifest.files) == ["a.bin", "b.json"]


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_every_flipped_bit_and_every_cut_is_found_and_named(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    path = artifact(tmp_path_factory.mktemp("flip") / "it")
    name = data.draw(st.sampled_from(["a.bin", "b.json"]))
    content = bytearray((path / name).read_bytes())
    if data.draw(st.booleans()):
        bit = data.draw(st.integers(0, len(content) * 8 - 1))
        content[bit // 8] ^= 1 << (bit % 8)
    else:
        del content[data.draw(st.integers(0, len(content) - 1)) :]
    (path / name).write_bytes(bytes(content))
    with pytest.raises(UserError, match=name):
        read_manifest(path, "thing")


def lose_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def lose_file(path: Path) -> None:
    (path / "a.bin").unlink()


def cut_manifest(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:50])


def escape(path: Path) -> None:
    manifest = read_sealed(path / MANIFEST)
    manifest["files"]["../../etc/passwd"] = {"bytes": 1, "sha256": "0"}
    write_json(path / MANIFEST, seal(manifest))


def future(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text()) | {"schema_version": 99}
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lose_manifest, "not a finished wsae thing"),
        (lose_file, "a.bin"),
        (cut_manifest, "damaged"),
        (escape, "outside"),
        (future, "schema version 99"),
    ],
)
def test_a_damaged_artifact_is_refused_in_one_line(
    tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    path = artifact(tmp_path / "it")
    damage(path)
    with pytest.raises(UserError, match=says) as caught:
        read_manifest(path, "thing")
    assert "\n" not in str(caught.value)


def test_another_kind_of_artifact_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="this is a wsae thing, but a store is needed"):
        read_manifest(artifact(tmp_path / "it"), "store")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def fail() -> None:
        with writing(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [p.name for p in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "old"


def test_a_full_disk_is_one_clear_line() -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    from wsae.core.files import as_user_error

    def write() -> None:
        with full.open("wb", buffering=0) as file:
            file.write(b"x")

    with pytest.raises(OSError, match="No space") as caught:
        write()
    assert "disk is full" in str(as_user_error(caught.value, Path("run/x")))


LIMITED = """
import resource, signal, torch
from pathlib import Path
from wsae.core.errors import UserError
from wsae.core.tensors import save_tensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
try:
    save_tensors(Path({path!r}), {{"x": torch.zeros(100_000)}})
except UserError as error:
    print(error)
"""


def test_tensors_that_cannot_be_written_whole_are_one_line_and_leave_nothing(
    tmp_path: Path,
) -> None:
    """The system cuts the file short for real (a size limit), as a full disk would."""
    code = LIMITED.format(path=str(tmp_path / "x.safetensors"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "x.safetensors: larger than this system lets a file be" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused_the_directory(tmp_path: Path) -> None:
    with locked(tmp_path / "run"), pytest.raises(UserError, match="another wsae process"):  # noqa: SIM117
        with locked(tmp_path / "run"):
            pass
    with locked(tmp_path / "run"):
        pass
    assert not (tmp_path / "run").exists()  # made for the lock alone
    (tmp_path / "own").mkdir()
    with locked(tmp_path / "own"):
        pass
    assert (tmp_path / "own").is_dir()


def test_a_message_is_one_line_of_what_prints_whatever_a_file_puts_into_it() -> None:
    told = str(UserError("x: no array (it has: a\nb\t\x1b[31m\u202e\udcffé\u2028)"))
    assert told == "x: no array (it has: a b \\x1b[31m\\u202e\\udcffé )"


def test_unknown_keys_suggest_the_nearest_and_wrong_values_are_named() -> None:
    with pytest.raises(UserError, match=r"unknown key 'inner\.bandwith' \(nearest: bandwidth"):
        Outer.parse({"inner": {"bandwith": 1.0}})
    with pytest.raises(UserError, match=r"tokens: .*'many'"):
        Outer.parse({"tokens": "many"})


@settings(max_examples=60, deadline=None)
@given(n=st.integers(1, 3000), seed=st.integers(0, 2**63 - 1))
def test_a_permutation_visits_every_row_once(n: int, seed: int) -> None:
    rows = Permutation(n, seed)(np.arange(n))
    assert sorted(rows.tolist()) == list(range(n))


def test_a_permutation_mixes_and_depends_on_its_seed() -> None:
    n = 100_000
    rows = Permutation(n, 1)(np.arange(n))
    assert not np.array_equal(rows, Permutation(n, 2)(np.arange(n)))
    # neighbours land uniformly: mean |difference| of uniform pairs is n / 3 (sd of the mean is about 0.0008 n)
    assert abs(np.abs(np.diff(rows)).mean() / n - 1 / 3) < 0.005
    assert abs(np.corrcoef(np.arange(n), rows)[0, 1]) < 0.015


def test_seeds_are_stable_and_named() -> None:
    assert seed_for(0, "init") == seed_for(0, "init") == 1519069808562059438
    assert len({seed_for(r, name) for r in range(50) for name in ("a", "b")}) == 100


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_mapped_rows_equal_the_whole_tensor(tmp_path: Path, dtype: torch.dtype) -> None:
    x = torch.randn(50, 7).to(dtype)
    save_tensors(tmp_path / "t.safetensors", {"other": torch.arange(3), "x": x})
    mapped = MappedTensor(tmp_path / "t.safetensors", "x")
    index = np.array([3, 49, 0, 3])
    assert torch.equal(mapped.rows(index), x[torch.from_numpy(index)].float())
    assert torch.equal(load_tensors(tmp_path / "t.safetensors")["x"], x)


def test_every_flipped_bit_of_a_sealed_file_is_found(tmp_path: Path) -> None:
    """The key of the checksum itself included: a file that has lost it is not one of before there were checksums."""
    path = tmp_path / "x.json"
    write_json(path, seal({"key": "a", "beta": [0.25]}))
    whole, value = path.read_bytes(), read_sealed(path)
    assert value == {"key": "a", "beta": [0.25]}
    for bit in range(8 * len(whole)):
        data = bytearray(whole)
        data[bit // 8] ^= 1 << bit % 8
        path.write_bytes(data)
        with contextlib.suppress(UserError):
            assert read_sealed(path) == value
            assert json.loads(data) == json.loads(whole), f"bit {bit} changed more than white space"


DTYPES = st.sampled_from(
    [
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8),
    ]
)
BY_NAME = {name: dtype for dtype, name in DTYPE_NAMES.items()}
SHAPES = st.lists(st.integers(0, 4), max_size=3)


@settings(max_examples=60, deadline=None)
@given(wanted=st.dictionaries(st.text(max_size=5), st.tuples(DTYPES, SHAPES), max_size=6))
def test_what_is_written_is_what_safetensors_reads(
    tmp_path_factory: pytest.TempPathFactory, wanted: dict
) -> None:
    wanted.pop("__metadata__", None)
    tensors = {
        name: torch.randint(0, 2, shape[::-1]).to(dtype).T
        if len(shape) == 2
        else torch.randint(0, 2, shape).to(dtype)
        for name, (dtype, shape) in wanted.items()
    }
    path = tmp_path_factory.mktemp("parity") / "x.safetensors"
    save_tensors(path, tensors)
    with safe_open(path, "pt") as file:
        assert set(file.keys()) == set(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(file.get_tensor(name), tensor)
            assert file.get_tensor(name).dtype == tensor.dtype
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert start % 8 == 0
    for entry in json.loads(data[8:start]).values():
        size = torch.empty(0, dtype=BY_NAME[entry["dtype"]]).element_size()
        assert entry["data_offsets"][0] % size == 0, "so that a map of the file is aligned"


def test_tensors_whose_values_lie_elsewhere_are_written_as_they_look(tmp_path: Path) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    views = {
        "row": x[2],
        "columns": x[:, ::2],
        "expanded": torch.tensor(3).expand(1),
        "repeated": torch.tensor(3.0).expand(2, 3),
        "one of many": x[1, 4],
        "none of many": x[:0],
    }
    save_tensors(tmp_path / "x.safetensors", views)
    found = load_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(found[name], view) for name, view in views.items())


def test_tensors_killed_while_written_leave_one_file_that_the_next_write_removes(
    tmp_path: Path,
) -> None:
    path, child = tmp_path / "x.safetensors", os.fork()
    if child == 0:
        torch.Tensor.contiguous = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        save_tensors(path, {"x": torch.zeros(3)})
    os.waitpid(child, 0)
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(f".x.safetensors.{child}.")
    save_tensors(path, {"x": torch.zeros(3)})
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


@settings(max_examples=60, deadline=None)
@given(data=st.binary(max_size=300))
def test_foreign_bytes_never_open_as_tensors(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("junk") / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x\.safetensors"):
        MappedTensor(path, "x")
    with pytest.raises(UserError, match=r"x\.safetensors"):
        load_tensors(path)


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Path]:
    """Return the cache's entry; each time it has to be made, `count` in the test's folder grows by a byte."""
    monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        cache, "_private_folder", functools.cache(cache._private_folder.__wrapped__)
    )

    def make(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub" / "code.so").write_bytes(b"code" * 1000)
        with (tmp_path / "count").open("ab") as file:
            file.write(b"x")

    return lambda: cache.cached("native", "key", make)


def times(tmp_path: Path) -> int:
    return (tmp_path / "count").stat().st_size


def test_a_cache_entry_is_made_once_for_this_user_alone(made, tmp_path: Path) -> None:
    umask = os.umask(0)
    try:
        entry = made()
    finally:
        os.umask(umask)
    assert made() == entry == tmp_path / "cache" / "native" / "key"
    assert times(tmp_path) == 1
    for path in (tmp_path / "cache").rglob("*"):
        assert path.stat().st_mode & 0o077 == 0, path


def _other_owner(path: Path) -> None:
    os.chown(path, 54321, 54321)


def test_a_large_file_is_hashed_once_and_again_after_any_change(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "cache"))
    path, read = tmp_path / "weights", []
    path.write_bytes(bytes(cache.SMALL_BYTES + 1))
    whole = cache.sha256_file
    monkeypatch.setattr(cache, "sha256_file", lambda p: (read.append(p), whole(p))[1])
    first, before = cache.content_digest(path), path.stat()
    assert cache.content_digest(path) == first == whole(path)
    assert read.count(path) == 1
    with path.open("r+b") as file:  # of one size, and dated back
        file.write(b"x")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cache.content_digest(path) == whole(path) != first
    monkeypatch.setenv("WSAE_CACHE", str(path))  # no folder: what cannot be kept is computed
    assert cache.content_digest(path) == whole(path)


SPOILED = {
    "cut": lambda entry: os.truncate(entry / "sub/code.so", 100),
    "zeroed": lambda entry: (entry / "sub/code.so").write_bytes(bytes(4000)),
    "open to others": lambda entry: (entry / "sub/code.so").chmod(0o666),
    "in an open folder": lambda entry: (entry / "sub").chmod(0o777),
    "a link": lambda entry: (
        (entry / "sub/code.so").rename(entry.parents[2] / "x.so"),
        (entry / "sub/code.so").symlink_to(entry.parents[2] / "x.so"),
    ),
    "a pipe": lambda entry: ((entry / "sub/code.so").unlink(), os.mkfifo(entry / "sub/code.so")),
    "more": lambda entry: (entry / "sub/more.so").write_bytes(b"planted"),
    "unlisted": lambda entry: (entry / cache.LIST).unlink(),
    "listed badly": lambda entry: (entry / cache.LIST).write_text("[" * 100_000),
}
if os.geteuid() == 0:
    SPOILED["another user's file"] = lambda entry: _other_owner(entry / "sub/code.so")
    SPOILED["another user's list"] = lambda entry: _other_owner(entry / cache.LIST)
    SPOILED["another user's folder"] = _other_owner


@pytest.mark.parametrize("damage", SPOILED)
def test_a_spoiled_cache_entry_is_made_again(made, tmp_path: Path, damage: str) -> None:
    entry = made()
    SPOILED[damage](entry)
    assert made() == entry
    assert (entry / "sub/code.so").read_bytes() == b"code" * 1000
    assert times(tmp_path) == 2
    assert made() == entry
    assert times(tmp_path) == 2
    assert [path.name for path in entry.parent.iterdir()] == ["key"]  # nothing is left aside


@pytest.mark.parametrize("kind", ["link", "file"])
def test_what_was_planted_under_an_entrys_name_is_not_followed(
    made, tmp_path: Path, kind: str
) -> None:
    place, elsewhere = tmp_path / "cache" / "native", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    place.mkdir(parents=True, mode=0o755)
    (place / "key").symlink_to(elsewhere) if kind == "link" else (place / "key").touch()
    assert made() == place / "key"
    assert not (place / "key").is_symlink()
    assert not list(elsewhere.iterdir())


def unusable(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Make the cache unusable in one way; returns a word of the reason."""
    root = tmp_path / "cache"
    match kind:
        case "open to everybody":
            root.mkdir()
            root.chmod(0o777)
            return "other users can write there"
        case "linked part":
            (root / "native").mkdir(parents=True)
            (root / "native").rename(tmp_path / "away")
            for name in ("native", f"native-{os.geteuid()}"):
                (root / name).symlink_to(tmp_path / "away")
            return "belongs to another user"
        case "a file":
            root.touch()
            return "cache"
        case "under a file":
            (tmp_path / "file").touch()
            monkeypatch.setenv("WSAE_CACHE", str(tmp_path / "file" / "cache"))
            return "Not a directory"
        case _:
            monkeypatch.delenv("WSAE_CACHE")
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
            monkeypatch.setenv("HOME", str(tmp_path / "none"))
            return "the home is no directory"


@pytest.mark.parametrize(
    "kind", ["open to everybody", "linked part", "a file", "under a file", "no home"]
)
def test_without_a_cache_of_ones_own_a_private_folder_serves(
    made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog, kind: str
) -> None:
    reason = unusable(tmp_path, kind, monkeypatch)
    entry = made()
    assert made() == entry
    assert times(tmp_path) == 1
    assert tmp_path not in entry.parents
    assert entry.parent.stat().st_mode & 0o777 == 0o700
    (note,) = caplog.messages
    assert reason in note
    assert "WSAE_CACHE" in note


def test_a_root_that_users_share_has_a_folder_for_each(
    made, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = tmp_path / "cache"
    root.mkdir()
    root.chmod(0o1777)
    (root / "native").touch()  # somebody was first
    assert made().parent == root / f"native-{os.geteuid()}"
    assert not caplog.messages


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({"WSAE_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"WSAE_CACHE": "", "XDG_CACHE_HOME": "/b"}, "/b/wsae"),
        ({"WSAE_CACHE": "~/c", "HOME": "/usr"}, "/usr/c"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/usr"}, "/usr/.cache/wsae"),
        ({"HOME": "/usr"}, "/usr/.cache/wsae"),
    ],
)
def test_one_folder_holds_all_caches(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], place: str
) -> None:
    for name in ("WSAE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_root() == Path(place)


def test_processes_that_make_one_entry_at_once_agree(tmp_path: Path) -> None:
    script = (
        "from wsae.core.cache import cached\n"
        "for i in range(30):\n"
        "    e = cached('native', f'k{i}', lambda f: (f / 'a').write_text('a' * 9999) and None)\n"
        "    assert (e / 'a').read_text() == 'a' * 9999\n"
    )
    for i in range(0, 30, 2):  # every other one lies there damaged
        (tmp_path / "cache" / "native" / f"k{i}").mkdir(parents=True)
        (tmp_path / "cache" / "native" / f"k{i}" / "a").touch()
    env = {**os.environ, "WSAE_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, "-c", script]
    running = [subprocess.Popen(command, env=env, stderr=subprocess.PIPE) for _ in range(3)]
    for process in running:
        _, told = process.communicate(timeout=60)
        assert process.returncode == 0, told
        assert not told  # nobody gave up on the cache
    assert len(list((tmp_path / "cache" / "native").iterdir())) == 30
