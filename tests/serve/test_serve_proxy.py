"""Behind a path, another host's name or another address: every link leads, nobody else is answered."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import urlencode, urljoin, urlsplit

import pytest
from serve_world import Client, serving, tiny_model, write_world

from wsae.core.errors import UserError
from wsae.serve import server
from wsae.serve.app import Live, application
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.serve.server import Gate, host_name, path_prefix

PREFIX = "/user/me%40x/proxy/8137"
LINK = re.compile(r'(?:href|src|action|data-(?:next|previous|up|twin))="([^"]*)"')
Placed = tuple[str, Path, Path]


@pytest.fixture(scope="module")
def placed(tmp_path_factory: pytest.TempPathFactory) -> Placed:
    place = tmp_path_factory.mktemp("serve")
    run = write_world(place / "run", tiny_model(place / "model"))
    return "first", run, ensure_index(run, None, IndexConfig(neighbours=3, logits=2))[0]


@pytest.fixture(scope="module")
def client(placed: Placed) -> Iterator[Client]:
    with serving(placed) as found:
        yield found


def stripped(path: str) -> str:
    """What a proxy asks that takes the prefix away."""
    return path.removeprefix(PREFIX) or "/"


TOLD = {"X-Forwarded-Prefix": PREFIX}
WAYS: dict[str, tuple[Gate, Callable[[str], str], dict[str, str]]] = {
    "stripped, silent": (Gate(), stripped, {}),
    "stripped, told": (Gate(), stripped, TOLD),
    "stripped, told with a slash": (Gate(), stripped, {"X-Forwarded-Prefix": PREFIX + "/"}),
    "stripped, root path": (Gate(root_path=PREFIX), stripped, {}),
    "whole, root path": (Gate(root_path=PREFIX), str, {}),
    "whole, told": (Gate(), str, TOLD),
    "root path over another that is told": (Gate(root_path=PREFIX), str, {"X-Forwarded-Prefix": "/x"}),
}  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_every_link_leads_to_a_page_under_the_path(placed: Placed, way: str):
    gate, asked, headers = WAYS[way]
    home = f"http://hub.example{PREFIX}/"
    seen, todo = set(), [home, f"{home}r/first/", f"{home}nowhere/at/all"]
    with serving(placed, gate=gate) as client:
        while todo and len(seen) < 24:
            address = todo.pop(0)
            if address in seen:
                continue
            seen.add(address)
            parts = urlsplit(address)
            assert parts.path.startswith(f"{PREFIX}/"), address
            assert parts.netloc == "hub.example"
            query = f"?{parts.query}" if parts.query else ""
            answer = client.ask(asked(parts.path) + query, headers=headers)
            assert answer.status == (404 if "nowhere" in address else 200), address
            assert "location" not in answer.headers
            links = [link.replace("&amp;", "&") for link in LINK.findall(answer.text)]
            found = [link for link in links if link and not link.startswith(("#", "data:"))]
            new = [urljoin(address, link) for link in found]
            todo += [link for link in new if link not in seen][:8] if len(todo) < 40 else []
    kinds = {re.sub(r"\d+", "N", urlsplit(address).path.removeprefix(PREFIX)) for address in seen}
    assert {"/", "/r/first", "/r/first/all", "/r/first/live", "/static/style.css"} <= kinds


def test_the_interface_names_addresses_under_the_path(placed: Placed, client: Client):
    for headers, start in (({}, "/r/first/"), (TOLD, f"{PREFIX}/r/first/")):
        answer = json.loads(client.ask("/api/r/first/plain/3", headers=headers).text)
        assert answer["link"] == f"{start}plain/3"
        assert all(other["link"].startswith(start) for other in answer["neighbours"])
    with serving(placed, gate=Gate(root_path="/w")) as under:
        assert json.loads(under.ask("/w/api/r/first/plain/3").text)["link"] == "/w/r/first/plain/3"


@pytest.mark.parametrize(
    "told",
    ["//evil.example", "/a//b", "/..", "/a/../b", "/.", '/"><script>alert(1)</script>', "/a b", "/a\\b", "/a?b",
     "https://evil.example", "evil.example", "/a#b", "/%zz", "/a;b", "/x" * 600, "/a, /b", "javascript:alert(1)"],
)  # fmt: skip
def test_a_prefix_that_is_no_plain_path_is_not_followed(client: Client, told: str):
    page = client.ask("/r/first/plain", headers={"X-Forwarded-Prefix": told})
    assert page.status == 200
    assert page.text == client.ask("/r/first/plain").text


def test_a_prefix_is_believed_of_this_machine_alone():
    guard = application([], Live())
    headers = {"x-forwarded-prefix": "/p"}
    scope = {"path": "/r/x", "raw_path": b"/r/x", "headers": []}
    for peer, links in (
        ("127.0.0.1", "/p/"),
        ("::1", "/p/"),
        ("::ffff:127.0.0.1", "/p/"),
        ("10.0.0.9", "../"),
    ):
        assert guard.placed({**scope, "client": (peer, 1)}, headers)["links"] == links
    assert guard.placed({**scope, "client": None}, headers)["links"] == "../"


@pytest.mark.parametrize(
    ("given", "known"),
    [("", ""), ("/", ""), ("/a/b/", "/a/b"), ("/user/me@x", "/user/me@x"), ("/jürgen", "/j%C3%BCrgen")],
)  # fmt: skip
def test_a_root_path_is_a_path(given: str, known: str):
    assert path_prefix(given) == known


@pytest.mark.parametrize(
    ("given", "advice"),
    [("a/b", "/a/b"), ("https://hub.example/user/me/", "/user/me"), ("//evil.example", "/evil.example"),
     ("/a/../b", "/user/me/proxy/8137"), ("/a?b", "/user/me/proxy/8137"), ("/" + "x" * 600, "/user/me/proxy/8137")],
)  # fmt: skip
def test_a_root_path_that_is_none_is_refused_with_one_that_is(given: str, advice: str):
    with pytest.raises(UserError, match=re.escape(f"such as {advice}")) as error:
        path_prefix(given)
    assert len(str(error.value)) < 300


@pytest.mark.parametrize(
    ("given", "known"),
    [("Hub.Example.org", "hub.example.org"), ("hub:8443", "hub:8443"), ("hub.", "hub"), ("fe80::1", "[fe80::1]"),
     ("[fe80::1]:80", "[fe80::1]:80"), ("10.0.0.7", "10.0.0.7")],
)  # fmt: skip
def test_a_host_is_a_name(given: str, known: str):
    assert host_name(given) == known


@pytest.mark.parametrize(
    ("given", "advice"),
    [("https://hub.example.org/user/me", "--allow-host hub.example.org"), ("*", "a name such as"), ("", "a name"),
     ("a b", "a name"), ("a/b", "a name"), ("x" * 300, "a name")],
)  # fmt: skip
def test_a_host_that_is_none_is_refused(given: str, advice: str):
    with pytest.raises(UserError, match=re.escape(advice)) as error:
        host_name(given)
    assert len(str(error.value)) < 300


def test_allowed_names_are_answered_and_a_refusal_names_the_flag(placed: Placed):
    gate = Gate(hosts=(host_name("hub.example.org"), host_name("other.example:8443")))
    with serving(placed, gate=gate) as client:
        for host, status in (
            ("hub.example.org", 200), ("HUB.example.org:443", 200), ("hub.example.org.", 200), ("other.example", 200),
            ("sub.hub.example.org", 421), ("hub.example.org.evil", 421), ("example.org", 421), ("", 421),
        ):  # fmt: skip
            answer = client.ask("/", headers={"Host": host})
            assert answer.status == status, host
            if status == 421 and host:
                assert f"restart wsae serve with --allow-host {host}\n" in answer.text
        for host in ("<script>", "x" * 3000, "a b"):
            text = client.ask("/", headers={"Host": host}).text
            assert "--allow-host NAME" in text
            assert len(text) < 300


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.2",
        "127.9.9.9:{port}",
        "[::1]",
        "[::ffff:127.0.0.1]:{port}",
        "localhost.",
        "app.localhost",
    ],
)
def test_every_name_of_the_loopback_is_answered(client: Client, host: str):
    assert client.ask("/", headers={"Host": host.format(port=client.port)}).status == 200


@pytest.mark.parametrize("host", ["127.0.0.2", "::1", "localhost"])
def test_the_address_that_is_printed_answers(placed: Placed, host: str):
    with server.listen(host, 0) as listening:
        told = urlsplit(server.address_of(listening))
        assert server.is_loopback(listening)
    with serving(placed, host=host) as client:
        assert (
            client.ask(
                "/", headers={"Host": f"{told.netloc.rpartition(':')[0]}:{client.port}"}
            ).status
            == 200
        )


FORM = {"Content-Type": "application/x-www-form-urlencoded"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://hub.example.org", "Sec-Fetch-Site": "same-origin"}, 200),
        ({"Origin": "https://hub.example.org"}, 200),
        ({"Origin": "http://other.example:8443"}, 200),
        ({"Origin": "https://told.example", "X-Forwarded-Host": "told.example"}, 200),
        ({"Origin": "https://told.example"}, 403),
        ({"Origin": "https://hub.example.org:99"}, 403),
        ({"Origin": "https://hub.example.org.evil"}, 403),
        ({"Origin": "https://hub.example.org", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Origin": "https://hub.example.org", "Sec-Fetch-Site": "none"}, 403),
        ({"Origin": "https://", "X-Forwarded-Host": ""}, 403),
        ({"Origin": "file://hub.example.org"}, 403),
    ],
)
def test_a_text_sent_through_a_proxy_is_read_when_it_is_of_an_own_page(
    gated: Client, headers: dict, status: int
):
    body = urlencode({"text": "the cat sat", "member": "plain"})
    assert gated.ask("/r/first/live", "POST", body, {**FORM, **headers}).status == status


@pytest.fixture(scope="module")
def gated(placed: Placed) -> Iterator[Client]:
    with serving(placed, gate=Gate(hosts=("hub.example.org", "other.example:8443"))) as found:
        yield found
