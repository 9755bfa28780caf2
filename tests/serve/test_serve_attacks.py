"""Who is silent, slow or gone stops nobody; what is replaced under the server is never mixed with what was there."""

import contextlib
import json
import os
import re
import shutil
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlencode

import pytest
from report_fixture import MEMBERS
from serve_world import HOOK, Client, reseal, serving, tiny_model, write_world

from wsae.core.artifact import record
from wsae.core.errors import UserError
from wsae.core.files import read_sealed, seal, write_json
from wsae.sae import SAE
from wsae.sae.config import SAEConfig
from wsae.serve import app as posted
from wsae.serve import index as served
from wsae.serve import server
from wsae.serve.app import PLACES, Live
from wsae.serve.build import ensure_index, is_current
from wsae.serve.config import IndexConfig
from wsae.serve.index import DamagedIndexError, Index
from wsae.serve.schema import seal_of

CFG = IndexConfig(neighbours=3, logits=2)
JSON = {"Content-Type": "application/json"}
FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve")
    return write_world(place / "run", tiny_model(place / "model"))


@pytest.fixture(scope="module")
def index(run: Path) -> Path:
    return ensure_index(run, None, CFG)[0]


@pytest.fixture
def client(run: Path, index: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Client]:
    """A server that is as patient as a test can be."""
    monkeypatch.setattr(server, "HEAD_S", 1.0)
    monkeypatch.setattr(server, "STALL_S", 1.5)
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 80)
    monkeypatch.setattr(posted, "BODY_S", 0.5)
    with serving(("first", run, index)) as found:
        yield found


@contextlib.contextmanager
def opened(client: Client, count: int, first: bytes = b"") -> Iterator[list[socket.socket]]:
    """Hold some connections that have sent a few bytes."""
    held = [socket.create_connection(("127.0.0.1", client.port), timeout=20) for _ in range(count)]
    try:
        for one in held:
            one.sendall(first)
        yield held
    finally:
        for one in held:
            one.close()


def ended(one: socket.socket) -> bool:
    """Read until the other side ends the connection; False when it does not in time."""
    try:
        while one.recv(65536):
            pass
    except ConnectionResetError:
        return True
    except TimeoutError:
        return False
    return True


@pytest.mark.parametrize(
    "first", [b"", b"GET / HTTP/1.1\r\nHost: localhost\r\n", b"\x16\x03\x01", b"GET /"]
)
def test_silent_connections_stop_nobody_and_are_closed(client: Client, first: bytes):
    with opened(client, 64, first) as held:
        began = time.monotonic()
        assert client.ask("/r/first/plain/3").status == 200
        assert time.monotonic() - began < 5
        assert all(ended(one) for one in held)
        assert time.monotonic() - began < 15


def test_more_connections_than_there_may_be_give_their_place_to_one_that_asks(
    client: Client, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(server, "HEAD_S", 600)
    with opened(client, 120) as held:
        assert client.ask("/r/first/plain/3").status == 200
        assert all(ended(one) for one in held[:40]), "the ones that waited longest made room"
        held[-1].sendall(b"GET /static/serve.js HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert held[-1].recv(15) == b"HTTP/1.1 200 OK", "and the others kept theirs"


def test_a_head_that_comes_a_byte_at_a_time_is_not_waited_for(client: Client):
    with opened(client, 1) as (one,):
        began = time.monotonic()
        with contextlib.suppress(OSError):
            for char in b"GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: " + b"x" * 200:
                one.sendall(bytes([char]))
                time.sleep(0.1)
        assert time.monotonic() - began < 10
        assert client.ask("/").status == 200


def test_a_body_that_does_not_come_is_not_waited_for(client: Client):
    head = (
        "POST /api/r/first/live HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    )
    with opened(client, 70, (head + "Content-Length: 900\r\n\r\n{").encode()) as held:
        assert client.ask("/r/first/plain/3").status == 200
        text = b"".join(iter(lambda: held[0].recv(4096), b"")).decode()
        assert text.startswith("HTTP/1.1 408")
        assert "did not come to its end in time" in text
        assert all(ended(one) for one in held)


def broken(one: socket.socket) -> bool:
    """Send until the other side refuses; False when it takes everything."""
    try:
        for _ in range(200):
            one.sendall(b"GET / HTTP/1.1\r\n" * 500)
            time.sleep(0.02)
    except OSError:
        return True
    return False


def test_who_does_not_read_is_not_waited_for(client: Client):
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        one.connect(("127.0.0.1", client.port))
        one.settimeout(20)
        with contextlib.suppress(OSError):
            for _ in range(400):  # more than the system keeps for us
                one.sendall(b"GET /static/style.css HTTP/1.1\r\nHost: localhost\r\n\r\n")
        time.sleep(4)
        assert client.ask("/").status == 200
        assert broken(one)


def test_a_client_that_leaves_is_not_a_word_on_the_terminal(client: Client, capfd):
    head = b"POST /r/first/live HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    for first in (head + b"Content-Length: 900\r\n\r\n{", b"GET /r/first/plain HTTP/1.1\r\nHost: localhost\r\n\r\n",
                  b"nonsense\r\n\r\n", b"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n\r\n"):  # fmt: skip  # noqa: E501
        with opened(client, 3, first):
            time.sleep(0.2)
    assert client.ask("/").status == 200
    time.sleep(0.3)
    seen = capfd.readouterr()
    assert seen.out + seen.err == ""


LONG = "y" * 3000


@pytest.mark.parametrize(
    "path",
    [f"/r/first/plain?sort={LONG}", f"/r/first/plain?min.{LONG}=1", f"/r/first/plain?alive={LONG}",
     f"/r/first/plain?page={LONG}", f"/r/first/plain?min.density={LONG}", f"/r/first/live?member={LONG}",
     f"/r/first/live?latent={LONG}", f"/r/first/{LONG}", f"/r/{LONG}", f"/{LONG}", f"/static/{LONG}",
     f"/api/r/first/plain?sort={LONG}", f"/r/first/plain?q={LONG}"],
)  # fmt: skip
def test_nothing_long_is_echoed(client: Client, path: str):
    answer = client.ask(path)
    assert answer.status in (400, 404)
    assert "y" * 100 not in answer.text


def test_a_method_is_not_echoed(client: Client):
    answer = client.ask("/", method="Y" * 3000)
    assert answer.status == 405
    assert len(answer.text) < 100


def test_texts_wait_in_a_short_line_and_pages_do_not_wait_for_them(run: Path, index: Path):
    live, gone = Live(), threading.Event()
    with serving(("first", run, index), live=live) as client, ThreadPoolExecutor(PLACES) as others:
        live._thread.submit(gone.wait, 60)  # a text that takes its time
        body = json.dumps({"text": "the cat", "member": "plain"})
        asked = [
            others.submit(client.ask, "/api/r/first/live", "POST", body, JSON)
            for _ in range(PLACES)
        ]
        deadline = time.monotonic() + 20
        while live._thread._work_queue.qsize() < PLACES and time.monotonic() < deadline:
            time.sleep(0.01)
        for path, kind, text in (
            ("/api/r/first/live", JSON, body),
            ("/r/first/live", FORM, urlencode({"text": "a"})),
        ):
            answer = client.ask(path, "POST", text, kind)
            assert answer.status == 503
            assert answer.headers["retry-after"] == "2"
            assert "try again" in answer.text
        for _ in range(8):
            assert client.ask("/r/first/plain/3").status == 200
        gone.set()
        assert [one.result(60).status for one in asked] == [200] * PLACES
        assert client.ask("/api/r/first/live", "POST", body, JSON).status == 200


# --- what is replaced ------------------------------------------------------------------------------------------


def put(source: Path, place: Path) -> None:
    """Put an index in a place as `ensure_index` does: the file, then its seal."""
    for begin, end in ((source, place), (seal_of(source), seal_of(place))):
        fresh = end.with_name(f"{end.name}.new")
        shutil.copyfile(begin, fresh)
        os.replace(fresh, end)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another run with the same members in another order, and other measures."""
    path = write_world(tmp_path_factory.mktemp("other") / "run", None)
    place = path / "evaluation" / "evaluation.json"
    value = json.loads(place.read_text())
    found = value["hooks"][HOOK]["members"]
    value["hooks"][HOOK]["members"] = {name: found[name] for name in reversed([*found])}
    place.write_text(json.dumps(value))
    reseal(path, "evaluation")
    shutil.rmtree(path / "interpretation")
    return ensure_index(path, None, CFG)[0]


def test_an_index_that_is_replaced_while_it_is_served_is_never_mixed_with_the_old_one(
    run: Path, index: Path, other: Path, tmp_path: Path
):
    place = tmp_path / "served.sqlite"
    paths = [f"/api/r/first/{member}/{latent}" for member in MEMBERS for latent in (0, 7)]
    wanted: dict[str, list[object]] = {path: [] for path in paths}
    for source in (index, other):
        put(source, place)
        with serving(("first", run, place)) as client:
            for path in paths:
                answer = client.json(path)
                assert isinstance(answer, dict)
                answer.pop("notice", None)
                wanted[path].append(answer)
    assert all(first != second for first, second in wanted.values())

    def ask(number: int) -> tuple[str, object]:
        path = paths[number % len(paths)]
        answer = client.json(path)
        assert isinstance(answer, dict)
        return path, {key: value for key, value in answer.items() if key != "notice"}

    seen: set[int] = set()
    with serving(("first", run, place)) as client, ThreadPoolExecutor(8) as askers:
        for source in (index, other, index, other):
            asked = [askers.submit(ask, i) for i in range(30)]
            put(source, place)
            for one in asked:
                path, answer = one.result(60)
                assert answer in wanted[path]
                seen.add(wanted[path].index(answer))
    assert seen == {0, 1}


def test_a_run_that_has_changed_since_says_so_and_reads_no_text_with_other_weights(tmp_path: Path):
    run = write_world(tmp_path / "run", tiny_model(tmp_path / "model"))
    place = ensure_index(run, None, CFG)[0]
    body = json.dumps({"text": "the cat", "member": "plain"})
    with serving(("first", run, place)) as client:
        assert served.CHANGED not in client.ask("/r/first/plain/3").text
        write_json(run / "evaluation" / "more.json", {})
        reseal(run, "evaluation")
        for path in ("/", "/r/first", "/r/first/all", "/r/first/plain/3", "/r/first/live"):
            assert served.CHANGED in client.ask(path).text, path
        for path in ("/api/r/first", "/api/r/first/all", "/api/r/first/plain/3"):
            found = client.json(path)
            assert isinstance(found, dict)
            assert found["notice"] == served.CHANGED
        assert client.ask("/api/r/first/live", "POST", body, JSON).status == 200
        shape = {"d_in": 16, "d_sae": 64, "activation": {"kind": "topk", "k": 4}}
        for name in MEMBERS:
            SAE(SAEConfig.parse(shape), seed=99).save(run / "members" / HOOK / name)
        other_member = json.dumps({"text": "the cat", "member": "variance-a1"})
        answer = client.ask("/api/r/first/live", "POST", other_member, JSON)
        assert answer.status == 400
        assert f"no live reading: {served.CHANGED}" in json.loads(answer.text)["error"]
        (run / "manifest.json").unlink()  # trained at this moment
        assert served.CHANGED in client.ask("/r/first/plain/3").text
        reseal(run, "evaluation")
    restored = write_world(tmp_path / "again")
    assert ensure_index(restored, None, CFG)[1]


@pytest.mark.parametrize("harm", ["gone", "cut", "no seal", "foreign"])
def test_an_index_that_is_damaged_while_it_is_served_is_one_line(
    run: Path, index: Path, tmp_path: Path, harm: str, monkeypatch: pytest.MonkeyPatch, capfd
):
    monkeypatch.setattr(served, "PATIENCE_S", 0.2)
    place = tmp_path / "served.sqlite"
    put(index, place)
    with serving(("first", run, place), ("other", run, index)) as client:
        assert client.ask("/r/first/plain/3").status == 200
        if harm == "gone":
            place.unlink()
        elif harm == "no seal":
            seal_of(place).unlink()
        else:
            place.write_bytes(place.read_bytes()[:8192] if harm == "cut" else b"no database" * 999)
        capfd.readouterr()
        for path in ("/r/first/plain/3", "/api/r/first/all"):
            answer = client.ask(path)
            assert answer.status == 500
            assert "the index of this run is gone or damaged; restart wsae serve" in answer.text
            told = capfd.readouterr().err
            assert len(told.splitlines()) == 1
            assert str(place) in told
        for path in ("/", "/api/runs"):  # the other run is there
            answer = client.ask(path)
            assert answer.status == 200
            assert "other" in answer.text
            assert "the index of this run is gone or damaged" in answer.text
        assert client.ask("/r/other/plain/3").status == 200
        put(index, place)
        assert client.ask("/r/first/plain/3").status == 200


def forge(place: Path, sql: str, *values: object) -> None:
    """Change an index and seal it again, as whoever sends a run can."""
    identity = read_sealed(seal_of(place))["identity"]
    with contextlib.closing(sqlite3.connect(place)) as connection:
        connection.execute(sql, values)
        connection.commit()
    write_json(seal_of(place), seal({"identity": identity, "file": record(place).to_dict()}))


WHOLE = [
    *(("meta", key, bad) for key in ("measures", "overview", "model", "unit", "name", "run", "identity")
      for bad in ("3", "{}", "[]", "null", '[["a"]]', '{"hooks": [{}]}', "not json")),
    *(("member", "", bad) for bad in ("{}", "3", "[]", '{"size": 1e308}', "not json")),
]  # fmt: skip


@pytest.mark.parametrize(("table", "key", "bad"), WHOLE)
def test_a_forged_record_of_the_whole_makes_the_index_again(
    index: Path, tmp_path: Path, table: str, key: str, bad: str
):
    place = tmp_path / "forged.sqlite"
    put(index, place)
    identity = read_sealed(seal_of(place))["identity"]
    column, where = ("value", "key = ?") if key else ("record", "id = ? + 0")
    forge(place, f"UPDATE {table} SET {column} = ? WHERE {where}", bad, key or 1)
    with pytest.raises(DamagedIndexError):
        Index(place)
    assert not is_current(place, identity)


SINGLE = [
    *(f"UPDATE shown SET record = '{bad}'" for bad in (
        "3", "[]", "not json", '{"contexts": 3}', '{"contexts": [{}]}', '{"contexts": [{"tokens": [1], "acts": [1]}]}',
        '{"contexts": [{"tokens": ["a"], "acts": []}]}', '{"scores": {"a": {}}}', '{"explanation": 3}',
        '{"tokens": "a"}',
        '{"contexts": [{"tokens": ["a"], "acts": [1], "peak": 7}]}')),
    "UPDATE shown SET label = x'00ff'", "UPDATE latent SET m0 = 'abc'", "UPDATE latent SET twin = 99 << 40",
    "UPDATE latent SET twin = 'x'", "UPDATE packed SET neighbours = x'0011'", "UPDATE packed SET logits = 3",
    "UPDATE packed SET neighbours = x'0000803f00ffff7f'", "UPDATE packed SET histogram = x'00000000'",
    "DELETE FROM latent", "UPDATE token SET text = 3", "UPDATE packed SET contexts = x'0011'",
    "UPDATE packed SET contexts = 3", "UPDATE packed SET fires = x'0011'",
    f"UPDATE packed SET contexts = x'0100000000000000{'00' * 12}'",  # of a sequence that is not there
    "UPDATE packed SET neighbours = x'0000c07f00000000'",
]  # fmt: skip


SEEN = (
    "/r/first/variance-a1/0",
    "/r/first/plain/0",
    "/r/first/all?sort=-density",
    "/api/r/first/plain/1",
)


def test_a_forged_record_of_one_latent_is_refused_on_its_pages_in_one_line(
    run: Path, index: Path, tmp_path: Path, capfd
):
    for number, sql in enumerate(SINGLE):
        place = tmp_path / f"{number}.sqlite"
        put(index, place)
        forge(place, sql)
        with serving(("first", run, place)) as client:
            capfd.readouterr()
            answers = [client.ask(path) for path in SEEN]
            told = capfd.readouterr().err.splitlines()
            broken = [answer for answer in answers if answer.status != 200]
            assert {answer.status for answer in answers} <= {200, 500}, sql
            assert len(told) == len(broken), sql
            assert not [answer for answer in broken if "something broke" in answer.text], (
                sql,
                told,
            )
            assert "UPDATE shown" in sql or broken, sql


def test_a_journal_beside_an_index_is_left_alone(index: Path, tmp_path: Path):
    """A log of SQLite's would put other content under the checksum of the file."""
    place = tmp_path / "x.sqlite"
    put(index, place)
    before = Index(place).members
    for tail in ("-journal", "-wal", "-shm"):
        (tmp_path / f"x.sqlite{tail}").symlink_to(tmp_path / f"target{tail}")
    assert Index(place).members == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("target")]


def test_a_lock_that_is_a_link_is_not_followed(tmp_path: Path):
    run = write_world(tmp_path / "run")
    (run / ".browser.sqlite.lock").symlink_to(tmp_path / "mine")
    with pytest.raises(
        UserError, match=re.escape(".browser.sqlite.lock: is not a lock that wsae made; remove it")
    ):
        ensure_index(run, None, CFG)
    assert not (tmp_path / "mine").exists()
