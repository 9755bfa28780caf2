"""`wsae serve`: one line for what cannot be, and a server that ends when it is told to."""

import json
import os
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from report_fixture import write_run
from serve_world import SHAPE, write_world

from wsae.cli.main import main
from wsae.serve import build, server

START = "from wsae.cli.main import main; raise SystemExit(main())"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("serve") / "run")


def test_index_only_says_what_it_made_and_finds_it_again(run: Path, tmp_path: Path, capsys):
    words = ["serve", str(run), "--index-only", "--out", str(tmp_path / "place"), "--json"]
    for made in (True, False):
        assert main(words) == 0
        (told,) = json.loads(capsys.readouterr().out)["runs"]
        assert told["made"] is made
        assert Path(told["index"]) == tmp_path / "place" / "run.sqlite"
        assert told["bytes"] == Path(told["index"]).stat().st_size
    assert not (run / "browser.sqlite").exists()


def test_an_interrupted_index_leaves_nothing_and_is_made_by_the_same_command(
    run: Path, tmp_path: Path, capsys, monkeypatch
):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    place = tmp_path / "place"
    words = ["serve", str(run), "--index-only", "--out", str(place)]
    with monkeypatch.context() as patch:
        patch.setattr(build, "write_packed", interrupt)  # tables are filled before
        assert main(words) == 130
    assert "the same command" in capsys.readouterr().err
    assert not [path for path in place.iterdir() if not path.name.endswith(".lock")]
    assert main([*words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["made"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["{tmp}/none"], "no such run directory"),
        (["{tmp}"], "holds no SAE that this reads"),
        (["{bare}"], "has not been evaluated; run: wsae evaluate"),
        (["{run}", "--port", "70000"], "--port 70000: not a port"),
        (["{run}", "--neighbours", "1000"], "neighbours"),
        (["{run}", "--allow-host", "https://hub.example/x"], "give --allow-host hub.example"),
        (
            ["{run}", "--allow-host", "hub", "--allow-host", "a/b"],
            "--allow-host a/b: not the name of a host",
        ),
        (["{run}", "--root-path", "https://hub.example/user/me/"], "give one such as /user/me"),
        ([], "missing: RUN"),
    ],
)
def test_what_cannot_be_is_one_line_and_exit_code_2(
    run: Path, tmp_path: Path, words: list, told: str, capsys
):
    bare = write_run(tmp_path / "bare", SHAPE, evaluation=False)
    given = [word.format(tmp=tmp_path, bare=bare, run=run) for word in words]
    assert main(["serve", *given, *([] if "--port" in given else ["--port", "0"])]) == 2
    error = capsys.readouterr().err.strip()
    assert told in error
    assert len(error.splitlines()) == 1


def test_a_port_in_use_is_said_before_any_work(tmp_path: Path, capsys):
    with server.listen("127.0.0.1", 0) as taken:
        port = str(taken.getsockname()[1])
        assert main(["serve", str(tmp_path), "--port", port]) == 2
    assert f"--port {port}: in use on 127.0.0.1" in capsys.readouterr().err


def test_it_serves_until_it_is_interrupted(run: Path):
    command = [sys.executable, "-c", START, "serve", str(run), "--port", "0", "--json"]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ}
    )
    try:
        assert process.stderr is not None
        line = next(line for line in process.stderr if line.startswith("serving"))
        url = line.split(" on ")[1].split(" ")[0]
        with urllib.request.urlopen(url, timeout=60) as reply:
            assert b"variance-a1" in reply.read()
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        assert json.loads(out)["url"] == url
    finally:
        process.kill()
        process.communicate()


def test_a_page_over_a_kept_connection_is_not_held_back_by_the_system():
    """Head and body are two writes; without this the second waits for the first one's acknowledgement."""
    with (
        server.listen("127.0.0.1", 0) as listening,
        socket.create_connection(listening.getsockname()),
    ):
        accepted, _ = listening.accept()
        with accepted:
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
