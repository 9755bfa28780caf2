"""Hostile files: no path from a file to code, none to places outside, and none that waits or fills memory."""

import ast
import contextlib
import errno
import json
import os
import pickle
import resource
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from halting import Halting
from serve_world import write_world

from wsae.acts import store as writing
from wsae.acts.source import ArraySource, open_source
from wsae.acts.store import PROGRESS, Ledger
from wsae.cli import main
from wsae.core.artifact import read_manifest, replacing
from wsae.core.config import read_config
from wsae.core.errors import UserError
from wsae.core.files import locked, read_json, read_sealed, seal, sha256_file, write_json
from wsae.core.progress import quiet
from wsae.core.tensors import load_tensors
from wsae.core.torchfile import load_state
from wsae.evals.config import EvalConfig
from wsae.evals.run import evaluate_run
from wsae.sae import TopK
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.loggers import read_json_lines
from wsae.train.run import train_run

SRC = Path(__file__).resolve().parents[2] / "src" / "wsae"
SOURCES = sorted(SRC.rglob("*.py"))
MODULES = (
    "pickle",
    "cPickle",
    "dill",
    "cloudpickle",
    "shelve",
    "marshal",
    "joblib",
    "code",
    "jsonpickle",
)
CALLS = {
    *("eval", "exec", "compile", "__import__", "yaml.load", "yaml.unsafe_load", "yaml.full_load"),
    *("torch.jit.load", "torch.hub.load", "torch.package.PackageImporter", "pd.read_pickle"),
    *("os.system", "os.popen", "tarfile.open", "shutil.unpack_archive", "np.fromregex"),
}
METHODS = ("extractall", "extract", "unpack_archive")
ALLOWED = {("core/torchfile.py", "pickle")}
"""For the name of an exception; its `torch.load` is fenced in, and tested below."""


def offences(text: str, name: str) -> Iterator[str]:
    """Yield what in a source could run code that a file brings."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = (
                [a.name for a in node.names]
                if isinstance(node, ast.Import)
                else [node.module or ""]
            )
            for module in names:
                if module.split(".")[0] in MODULES and (name, module) not in ALLOWED:
                    yield f"{name}:{node.lineno} imports {module}"
        if isinstance(node, ast.Call):
            yield from _in_call(node, name)


def _in_call(node: ast.Call, name: str) -> Iterator[str]:
    called = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    where = f"{name}:{node.lineno} calls {called}"
    if called in CALLS or called.split(".")[-1] in METHODS:
        yield where
    if called == "torch.load" and given.get("weights_only") != "True":
        yield f"{where} without weights_only=True"
    if called in ("np.load", "numpy.load") and given.get("allow_pickle") != "False":
        yield f"{where} without allow_pickle=False"
    if given.get("allow_pickle") == "True" or given.get("shell") == "True":
        yield f"{where} with {given}"
    if "trust_remote_code" in given and given["trust_remote_code"] != "False":
        yield f"{where} with trust_remote_code={given['trust_remote_code']}"
    of_hub = called.startswith("Auto") and called.endswith("from_pretrained")
    if of_hub and "trust_remote_code" not in given and None not in given:  # ** may hold it
        yield f"{where} without trust_remote_code=False"


def test_no_source_can_run_what_a_file_brings() -> None:
    found = [
        line for path in SOURCES for line in offences(path.read_text(), str(path.relative_to(SRC)))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text",
    [
        "import pickle",
        "from dill import loads",
        "eval(x)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, Loader)",
        "archive.extractall(place)",
        "AutoModel.from_pretrained(name)",
        "kind.from_pretrained(name, trust_remote_code=trust)",
        "subprocess.run(line, shell=True)",
    ],
)
def test_the_search_finds_each_of_them(text: str) -> None:
    assert list(offences(text, "x.py"))


class Bad:
    """Makes a folder when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple:
        return os.mkdir, (str(self.place),)


def test_a_pickle_called_anything_is_not_run(tmp_path: Path) -> None:
    made = tmp_path / "made"
    data = pickle.dumps(Bad(made))
    for name in ("x.npy", "x.safetensors", "x.pt", "x.npz"):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=name):
            open_source(tmp_path / name)
    np.save(tmp_path / "o.npy", np.array([[Bad(made)]], dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match=r"o.npy: not a readable .npy array \(Python objects"):
        open_source(tmp_path / "o.npy")
    torch.save({"x": Bad(made)}, tmp_path / "ae.pt")
    with pytest.raises(UserError, match="ae.pt: not a state dict"):
        load_state(tmp_path / "ae.pt")
    assert not made.exists()
    pickle.loads(data)
    assert made.is_dir()  # it would have been


# A run, a store or a folder that somebody sent, with links laid where wsae writes. `victim` is the user's own place.

CFG = TrainConfig(
    members=(MemberConfig(d_sae=16, activation=TopK(k=2)),),
    tokens=640,
    batch_size=64,
    log_every=1,
)
ROWS = np.random.default_rng(0).normal(size=(200, 8)).astype(np.float32)


@pytest.fixture
def victim(tmp_path: Path) -> Iterator[Path]:
    """A folder of the user's with files of many names; nothing in it may change."""
    place = tmp_path / "victim"
    (place / "plain").mkdir(parents=True)
    for name in ("a.safetensors", "plain/acts-00000.safetensors", "manifest.json", "notes"):
        (place / name).write_text("mine")
    before = seen(place)
    yield place
    assert seen(place) == before


def seen(place: Path) -> dict[str, bytes | None]:
    return {
        str(p.relative_to(place)): p.read_bytes() if p.is_file() else None for p in place.rglob("*")
    }


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sent") / "run"
    train_run(CFG, ArraySource(ROWS), out)
    return out


@pytest.fixture(scope="module")
def unfinished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sent") / "run"
    with pytest.raises(KeyboardInterrupt):
        train_run(CFG, Halting(torch.from_numpy(ROWS), 4), out)
    assert (out / "checkpoints").is_dir()
    return out


def copied(run: Path, to: Path) -> Path:
    return Path(shutil.copytree(run, to / "copy"))


def evaluated(run: Path) -> None:
    evaluate_run(run, ArraySource(ROWS), EvalConfig(n_latents=0, draws=20))


def old_name(path: Path) -> Path:
    """What a predictable temporary name was."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def test_links_under_the_names_of_temporary_files_are_not_written_through(
    finished: Path, victim: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path)
    (run / "evaluation").mkdir()
    for name in ("evaluation.json", "contexts.json", "arrays.safetensors", "manifest.json"):
        old_name(run / "evaluation" / name).symlink_to(victim / "notes")
    evaluate_run(run, ArraySource(ROWS), EvalConfig(n_latents=2, draws=20))
    assert read_manifest(run / "evaluation", "evaluation").files


def test_a_name_that_is_taken_is_not_opened(
    victim: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where the random part was guessed: the second name is used."""
    names = iter(["00000000", "11111111"])
    monkeypatch.setattr("wsae.core.files.secrets.token_hex", lambda _: next(names))
    laid = tmp_path / f".x.json.{os.getpid()}.00000000.tmp"
    laid.symlink_to(victim / "notes")
    write_json(tmp_path / "x.json", {"a": 1})
    assert laid.is_symlink()
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": 1}


@pytest.mark.parametrize("kind", ["symlink", "inside", "dangling"])
def test_a_linked_evaluation_is_refused(
    kind: str, finished: Path, victim: Path, tmp_path: Path
) -> None:
    run = copied(finished, tmp_path)
    target = {"symlink": victim, "inside": run / "members", "dangling": tmp_path / "nothing"}[kind]
    (run / "evaluation").symlink_to(target)
    before = seen(run / "members")
    with pytest.raises(UserError, match="evaluation: is a link to a folder"):
        evaluated(run)
    assert seen(run / "members") == before
    assert not (tmp_path / "nothing").exists()


def test_the_directory_that_the_user_names_may_be_a_link(finished: Path, tmp_path: Path) -> None:
    run = copied(finished, tmp_path)
    (tmp_path / "link").symlink_to(run)
    evaluated(tmp_path / "link")
    assert (run / "evaluation" / "manifest.json").exists()


@pytest.mark.parametrize("where", ["evaluation/.lock", ".lock"])
@pytest.mark.parametrize("target", ["notes", "not there yet"])
def test_a_linked_lock_is_refused(
    where: str, target: str, finished: Path, unfinished: Path, victim: Path, tmp_path: Path
) -> None:
    run = copied(unfinished if where == ".lock" else finished, tmp_path)
    lock = run / where
    lock.parent.mkdir(exist_ok=True)
    lock.unlink(missing_ok=True)
    lock.symlink_to(victim / target)
    with pytest.raises(UserError, match=r"\.lock: is not a lock that wsae made"):
        evaluated(run) if where != ".lock" else train_run(CFG, ArraySource(ROWS), run, resume=True)


@pytest.mark.parametrize("folder", ["checkpoints", "members", "members/acts", "tensorboard"])
def test_a_resumed_run_with_a_folder_that_leads_out_is_refused(
    folder: str, unfinished: Path, victim: Path, tmp_path: Path
) -> None:
    run = copied(unfinished, tmp_path)
    shutil.rmtree(run / folder, ignore_errors=True)
    (run / folder).parent.mkdir(exist_ok=True)
    (run / folder).symlink_to(victim)
    with pytest.raises(UserError, match=f"{folder}: is a link to a folder"):
        train_run(CFG, ArraySource(ROWS), run, resume=True)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_resumed_run_does_not_append_to_a_linked_file(
    link, unfinished: Path, tmp_path: Path
) -> None:
    """A hard link too: the text of `metrics.jsonl` is what the checkpoint knows, and yet another file."""
    run = copied(unfinished, tmp_path)
    other = tmp_path / "rows of another run"
    shutil.move(run / "metrics.jsonl", other)
    before = other.read_bytes()
    link(other, run / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl: is a link or has a second name"):
        train_run(CFG, ArraySource(ROWS), run, resume=True)
    assert other.read_bytes() == before


def test_other_files_of_a_run_that_are_links_are_replaced_not_followed(
    unfinished: Path, victim: Path, tmp_path: Path
) -> None:
    run = copied(unfinished, tmp_path)
    (run / "gamma.json").unlink()
    (run / "gamma.json").symlink_to(victim / "notes")
    (run / "manifest.json").symlink_to(victim / "not there")
    train_run(CFG, ArraySource(ROWS), run, resume=True)
    assert read_manifest(run, "run")
    assert not (run / "gamma.json").is_symlink()


def test_a_harvest_that_fails_removes_nothing_through_a_link(victim: Path, tmp_path: Path) -> None:
    """`train/` led to the user's own models, and what no ledger listed was removed there."""
    out = tmp_path / "store"
    out.mkdir()
    (out / "train").symlink_to(victim)
    write_json(out / PROGRESS, seal(Ledger(config={"a": 1}, inputs={}).to_dict()))

    def gone(_: Ledger) -> writing.Feed:
        raise RuntimeError("the model is gone")

    with pytest.raises(UserError, match="train: is a link to a folder"):
        writing.write_store(out, {"a": 1}, {}, gone, quiet)


def test_what_lies_under_a_temporary_name_and_is_no_file_of_ours_is_left_alone(
    victim: Path, tmp_path: Path
) -> None:
    gone = 4194305  # no process has this number
    hard, soft = (tmp_path / f".x.json.{gone}{end}.tmp" for end in ("", ".0123abcd"))
    os.link(victim / "notes", hard)
    soft.symlink_to(victim / "notes")
    write_json(tmp_path / "x.json", 1)
    assert hard.exists()
    assert soft.is_symlink()


@pytest.mark.parametrize("name", [".browser.sqlite.lock", "browser.sqlite", "browser.sqlite.json"])
def test_the_index_is_not_written_through_a_link(name: str, victim: Path, tmp_path: Path) -> None:
    run = write_world(tmp_path / "run")
    (run / name).symlink_to(victim / "notes")
    if name.endswith(".lock"):
        with pytest.raises(UserError, match="is not a lock that wsae made"):
            ensure_index(run, None, IndexConfig(logits=0))
        return
    path, made = ensure_index(run, None, IndexConfig(logits=0))
    assert made
    assert not path.is_symlink()


def test_a_report_replaces_a_link(victim: Path, tmp_path: Path) -> None:
    run = write_world(tmp_path / "run")
    (run / "report.html").symlink_to(victim / "notes")
    assert main.main(["report", str(run), "--out", str(run / "report.html")]) == 0
    assert not (run / "report.html").is_symlink()


def test_an_export_begun_elsewhere_makes_no_file_there(victim: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".unfinished-export").symlink_to(victim / "new")
    with pytest.raises(UserError, match="is a link"), replacing(tmp_path / "out", "export"):
        pass


# What is not a file is not waited for; what says a thing twice, or never ends, is refused.


@pytest.fixture
def pipe(tmp_path: Path) -> Path:
    os.mkfifo(tmp_path / "pipe")
    return tmp_path / "pipe"


@pytest.mark.parametrize(
    "words",
    [
        "train {acts} --out {o} --k 2 --gamma vector --gamma-file {pipe}",
        "train {acts} --out {o} --k 2 --labels {pipe}",
        "train --config {pipe}",
        "train {pipe} --out {o} --k 2",
        "train {pipe}.npy --out {o} --k 2",
        "train {pipe}.safetensors --out {o} --k 2",
        "evaluate {acts} --labels {pipe}",
        "evaluate {folder}",
        "export {folder} --out {o}",
        "import {folder} --out {o}",
        "report {folder}",
    ],
)
def test_a_pipe_is_refused_and_not_waited_for(words: str, pipe: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "acts.npy", ROWS)
    for end in (".npy", ".safetensors", ".jsonl"):
        os.mkfifo(f"{pipe}{end}")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("manifest.json", "config.json", "cfg.json", "sae.safetensors", "metrics.jsonl"):
        os.mkfifo(folder / name)
    places = {"pipe": pipe, "acts": tmp_path / "acts.npy", "o": tmp_path / "o", "folder": folder}
    code, _, err = forked([word.format(**places) for word in words.split()])
    assert code == 2, err
    assert err.startswith("wsae: error: ")
    assert "unexpected" not in err


def forked(words: list[str], seconds: int = 20) -> tuple[int, str, str]:
    """Return how the command ends in a child of this process, which is killed when it takes too long."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = os.fork()
        if child == 0:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(seconds)
            sys.stdout, sys.stderr = out, err
            code = 99
            with contextlib.suppress(BaseException):
                code = main.main(words)
            out.flush()
            err.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        out.seek(0)
        err.seek(0)
        return code, out.read(), err.read()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (os.mkfifo, "a pipe; write what comes out of it to a file first"),
        (os.mkdir, "a folder, where a file belongs"),
        (lambda path: os.symlink("/dev/zero", path), "a device, not a file"),
        (lambda path: socket.socket(socket.AF_UNIX).bind(str(path)), "a socket, not a file"),
    ],
)
@pytest.mark.filterwarnings("ignore::ResourceWarning")
def test_what_is_not_a_file_is_named(make, says: str, tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    make(path)
    for read in (read_json, read_config, load_tensors, sha256_file, read_json_lines):
        with pytest.raises(UserError, match=says):
            read(path)


def test_standard_input_is_not_read() -> None:
    with pytest.raises(UserError, match="-: standard input is not read; write it to a file"):
        read_json(Path("-"))


def test_a_manifest_of_700_mb_is_refused_by_its_size(tmp_path: Path) -> None:
    with (tmp_path / "manifest.json").open("wb") as file:
        file.truncate(700 << 20)  # no byte of it lies on the disk
    begin, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda p: read_manifest(p, "run"), lambda p: read_json(p / "manifest.json")):
        with pytest.raises(UserError, match="734,003,200 bytes, and no such file of wsae"):
            read(tmp_path)
    assert time.monotonic() - begin < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ('{"b": [{"a": 1, "\\u0061": 2}]}', "key 'a' is given twice"),
        ('{"a": ' + "9" * 100_000 + "}", "damaged"),
        ("[" * 200_000, "damaged"),
        ('{"a": "\ud800"}', "damaged"),
    ],
)
def test_json_that_readers_would_not_agree_on_is_refused(text: str, says: str, tmp_path) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    for read in (read_json, read_sealed, read_json_lines):
        with pytest.raises(UserError, match=says) as caught:
            read(path)
        assert len(str(caught.value)) < 400
    with pytest.raises(UserError, match=r"x\.json"):
        read_config(path)


def test_a_manifest_that_says_a_thing_twice_is_refused(finished: Path, tmp_path: Path) -> None:
    """Its checksum is of what our reader takes, another reader's may take the other."""
    run = copied(finished, tmp_path)
    text = (run / "manifest.json").read_text()
    (run / "manifest.json").write_text(text.replace('"kind"', '"kind": "store",\n "kind"', 1))
    with pytest.raises(UserError, match="key 'kind' is given twice"):
        read_manifest(run, "run")


def test_names_that_are_not_utf8_are_used_and_shown(tmp_path: Path) -> None:
    name = os.fsdecode(b"caf\xe9 \x1b[31m")
    place = tmp_path / name
    place.mkdir()
    np.save(place / "acts.npy", ROWS)
    words = [
        "--d-sae",
        "16",
        "--k",
        "2",
        "--tokens",
        "400",
        "--batch-size",
        "100",
        "--device",
        "cpu",
    ]
    run = str(place / "run")
    code, out, err = forked(["train", str(place / "acts.npy"), "--out", run, *words], 60)
    assert code == 0, err
    assert "caf\\udce9" in out
    assert "\x1b" not in out
    for command in (
        ["evaluate", run, "--draws", "20"],
        ["report", run],
        ["compare", run, "--json"],
    ):
        code, out, err = forked(command, 60)
        assert code == 0, err
        assert "\x1b" not in out + err
    assert json.loads(out)


# File systems without locks: two processes are not kept apart there, and one works.


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_a_file_system_without_locks_is_used_with_one_note(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("wsae.core.files.fcntl.flock", refuse)
    for _ in range(2):
        with locked(tmp_path / "run"):
            write_json(tmp_path / "run" / "x.json", 1)
    (note,) = [record.getMessage() for record in caplog.records]
    assert note.startswith(f"{tmp_path / 'run'}: this file system has no locks")
