"""The server over a real socket: strict headers, hostile text inert, bad requests refused in one line."""

import json
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import urlencode

import pytest
import torch
from report_fixture import MEMBERS
from report_text import HOSTILE
from serve_world import (
    D_IN,
    D_SAE,
    HOOK,
    Client,
    latents_of,
    sae_of,
    seal_run,
    serving,
    tiny_model,
    write_world,
)
from starlette.responses import PlainTextResponse

from wsae.core.errors import UserError
from wsae.sae import SAE
from wsae.sae.config import Provenance, SAEConfig
from wsae.serve import server
from wsae.serve.app import MAX_CHARS, MAX_TOKENS, Live
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.serve.index import Index, Served
from wsae.serve.server import POLICY
from wsae.serve.using import NEW_TOKENS, Ask, attributing, steering

PAGES = (
    "/",
    "/r/first",
    "/r/first/all",
    "/r/first/plain",
    "/r/first/variance-a1?sort=-density&alive=yes&q=whale",
    "/r/first/plain?q=%3C%2Fscript%3E%3Cimg+src%3Dx+onerror%3Dalert%281%29%3E",
    "/r/first/compare",
    "/r/first/compare?a=variance-a1&b=variance-a0.5",
    "/r/first/compare?a=%3Cscript%3E",
    "/r/first/live",
    "/r/first/live?latent=3&member=plain",
    "/r/first/steer?latent=3&value=%3Cb%3E",
    "/r/first/attribute?answer=%22%3E%3Cscript%3E",
    "/r/nowhere",
    "/r/first/nowhere",
    "/r/first/plain/64",
    "/r/first/plain?sort=%3Cscript%3E",
    "/nothing",
)
TAGS = {
    *(
        "html",
        "head",
        "meta",
        "title",
        "link",
        "script",
        "body",
        "header",
        "nav",
        "main",
        "section",
        "article",
    ),
    *(
        "h1",
        "h2",
        "h3",
        "h4",
        "h5",
        "dl",
        "dt",
        "dd",
        "div",
        "kbd",
        "p",
        "span",
        "small",
        "code",
        "em",
        "b",
        "br",
    ),
    *(
        "form",
        "input",
        "button",
        "label",
        "select",
        "option",
        "fieldset",
        "legend",
        "textarea",
        "dialog",
        "a",
    ),
    *(
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "details",
        "summary",
        "figure",
        "img",
        "figcaption",
    ),
    *("ol", "ul", "li", "svg", "path", "line", "circle", "text"),
}


class Strict(HTMLParser):
    """Collects what a browser would run or load: nothing may come from data."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag in TAGS, tag
        found = dict(attrs)
        assert len(found) == len(attrs), attrs
        assert not any(name.startswith("on") or name == "style" for name in found), attrs
        if tag == "script":
            assert re.fullmatch(r"(?:\./|(?:\.\./)+)static/serve\.js", found["src"] or "")
        if tag == "img":
            assert (found["src"] or "").startswith("data:image/png;base64,")
        for name in ("href", "src", "action"):
            value = found.get(name) or "./"
            assert value.startswith(("./", "../", "#", "data:,", "data:image/png")), value
            assert not value.startswith("//"), value

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_world(tmp_path_factory.mktemp("serve") / "run", model)


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[Client]:
    index, _ = ensure_index(run, None, IndexConfig(neighbours=5, logits=4))
    with serving(("first", run, index)) as found:
        yield found


@pytest.mark.parametrize("page", PAGES)
def test_every_answer_has_the_headers_and_holds_nothing_to_run(client: Client, page: str):
    for method in ("GET", "HEAD"):
        answer = client.ask(page, method)
        assert answer.headers["content-security-policy"] == POLICY
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["referrer-policy"] == "no-referrer"
        assert "server" not in answer.headers
        if method == "GET":
            Strict(answer.text)


def test_the_policy_allows_no_more_than_this_server_gives():
    parts = dict(part.split(" ", 1) for part in POLICY.split("; "))
    assert parts == {
        "default-src": "'none'",
        "script-src": "'self'",
        "style-src": "'self'",
        "img-src": "'self' data:",
        "form-action": "'self'",
        "frame-ancestors": "'none'",
        "base-uri": "'none'",
    }


@pytest.mark.parametrize("member", MEMBERS)
def test_hostile_contexts_are_text_on_every_latents_page(client: Client, run: Path, member: str):
    seen = ""
    for latent, entry in latents_of(run, "evaluation", member).items():
        answer = client.ask(f"/r/first/{member}/{latent}")
        assert answer.status == 200
        words = "".join(Strict(answer.text).words)
        seen += words
        assert f"Latent {latent}" in words
        assert len(entry["contexts"]) == 6
    for text in HOSTILE:
        if text.isprintable():
            assert text.strip() in seen, text
    assert "\u202e" not in seen
    assert "⟨202E⟩" in seen
    assert "⟨0000⟩" in seen


def shown(link: str, depth: int) -> str:
    """Return an address of the interface as a page shows it that lies so deep."""
    return "../" * depth + link.removeprefix("/").replace("&", "&amp;")


def test_a_latents_page_has_its_match_beside_it_and_walks_the_list_it_came_from(client: Client):
    params = {"sort": "-density", "alive": "yes"}
    found = client.json(f"/api/r/first/variance-a1?{urlencode(params)}")
    assert isinstance(found, dict)
    rows = found["latents"]
    densities = [row["measures"]["density"] for row in rows]
    assert densities == sorted(densities, reverse=True)
    for before, here, after in zip(rows, rows[1:], rows[2:], strict=False):
        page = client.ask(here["link"]).text
        assert f'data-previous="{shown(before["link"], 3)}"' in page
        assert f'data-next="{shown(after["link"], 3)}"' in page
    one = client.json(f"/api/r/first/variance-a1/{rows[0]['latent']}")
    assert isinstance(one, dict)
    (match,) = one["matches"]
    assert match["member"] == "plain"
    assert f'data-twin="{shown(match["link"], 3)}"' in client.ask(one["link"]).text
    back = client.json(f"/api{match['link']}")
    assert isinstance(back, dict)
    assert back["matches"], "the twin's latent names those that chose it"


def test_pages_and_interface_agree_on_a_list(client: Client):
    query = "?sort=-embedding&shown=contexts"
    found = client.json(f"/api/r/first/plain{query}")
    assert isinstance(found, dict)
    page = client.ask(f"/r/first/plain{query}").text
    places = [page.index(f'"{shown(row["link"], 2)}"') for row in found["latents"]]
    assert places == sorted(places)
    assert found["total"] == len(found["latents"])
    runs = client.json("/api/runs")
    assert runs == [{"run": "first", "name": "run"}]
    about = client.json("/api/r/first")
    assert isinstance(about, dict)
    assert [m["member"] for m in about["members"]] == ["plain", "variance-a1", "variance-a0.5"]


OTHERS = (
    "evil.example",
    "evil.example:80",
    "127.0.0.1.evil.example",
    "localhost.evil",
    "",
    "10.0.0.1",
)


@pytest.mark.parametrize("host", OTHERS)
def test_other_hosts_are_not_answered(client: Client, host: str):
    answer = client.ask("/", headers={"Host": host})
    assert answer.status == 421
    assert "latent" not in answer.text
    assert answer.headers["content-security-policy"] == POLICY


@pytest.mark.parametrize(
    "host", ["localhost", "LOCALHOST:{port}", "127.0.0.1:{port}", "[::1]:{port}"]
)
def test_the_loopbacks_own_names_are_answered(client: Client, host: str):
    assert client.ask("/", headers={"Host": host.format(port=client.port)}).status == 200


FORM = {"Content-Type": "application/x-www-form-urlencoded"}
JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil.example"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "null", "Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Origin": "null", "Sec-Fetch-Site": "same-origin"}, 200),
        ({}, 200),
    ],
)
def test_a_post_from_another_site_is_refused(client: Client, headers: dict, status: int):
    body = urlencode({"text": "the cat sat", "member": "plain"})
    assert client.ask("/r/first/live", "POST", body, {**FORM, **headers}).status == status


def test_the_forms_own_key_stands_for_its_origin(client: Client):
    page = client.ask("/r/first/live").text
    key = page.split("/live?key=")[1].split('"')[0]
    body = urlencode({"text": "the cat sat"})
    for given, status in ((key, 200), (key[:-1], 403), ("", 403)):
        headers = {**FORM, "Origin": "null"}
        assert client.ask(f"/r/first/live?key={given}", "POST", body, headers).status == status
    headers = {**FORM, "Origin": "http://evil.example"}
    assert client.ask(f"/r/first/live?key={key}", "POST", body, headers).status == 403


def named(client: Client, member: str, latent: int, status: int = 200, **sent: object) -> dict:
    """Name a latent by the interface; return what it says of it, or its error."""
    kind = {"Content-Type": "application/json"}
    path = f"/api/r/first/{member}/{latent}"
    answer = client.ask(path, "POST", json.dumps(sent), kind)
    assert answer.status == status
    return json.loads(answer.text)


def test_a_name_is_kept_beside_the_run_shown_as_text_found_and_listed_by_star(
    client: Client, run: Path
):
    hostile = " <b>Schiff</b>\n ☃ \u202eback "
    kept = "<b>Schiff</b> ☃ \u202eback"
    assert named(client, "plain", 5, name=hostile, star=True)["name"] == kept
    told = json.loads((run / "names.json").read_text())
    assert told == {HOOK: {"plain": {"5": {"name": kept, "star": True}}}}
    page = client.ask("/r/first/plain/5")
    assert "<b>Schiff" not in page.text
    assert "<b>Schiff</b> ☃ ⟨202E⟩back" in "".join(Strict(page.text).words)
    for query in ("star=yes", "q=schiff", "q=SCH%C3%8FFF+back", "q=schiff&sort=-density&star=yes"):
        found = client.json(f"/api/r/first/all?{query}")
        assert isinstance(found, dict)
        assert [(row["member"], row["latent"]) for row in found["latents"]] == [("plain", 5)]
        assert found["latents"][0]["label"] == kept
    found = client.json("/api/r/first/plain?q=schiff+nowhere")
    assert isinstance(found, dict)
    assert found["total"] == 0
    body = urlencode({"name": "", "star": "on"})  # as the form sends it
    assert client.ask("/r/first/plain/5", "POST", body, FORM).status == 200
    assert json.loads((run / "names.json").read_text())[HOOK]["plain"]["5"]["star"]
    assert named(client, "plain", 5, name="boat")["star"] is True  # what is left out stays
    assert named(client, "plain", 5, star=False)["name"] == "boat"
    assert named(client, "plain", 5, name="")["star"] is False
    assert json.loads((run / "names.json").read_text()) == {HOOK: {"plain": {}}}


def test_a_name_that_is_not_kept_is_said_in_one_line(client: Client, run: Path):
    (run / "names.json").unlink(missing_ok=True)
    told = named(client, "plain", 5, 400, name="x" * 201)
    assert told["error"] == "name: 201 characters, at most 200 are kept"
    assert named(client, "plain", D_SAE, 404, name="x")["error"] == "no such latent"
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}):
        assert client.ask("/r/first/plain/5", "POST", "name=x", {**FORM, **headers}).status == 403
    assert not (run / "names.json").exists()
    (run / "names.json").write_text('{"layers.1": {"plain": {"5": {"name": 3}}}}')
    assert "names.json: not of the form" in named(client, "plain", 5, 400, name="x")["error"]
    assert "names.json: not of the form" in client.ask("/r/first/plain/5").text
    (run / "names.json").unlink()
    assert "names.json" not in client.ask("/r/first/plain/5").text


def test_names_are_not_taken_from_other_machines():
    guard = server.Guard(PlainTextResponse("answered"), server.Gate(loopback=False), "key")
    scope = {"method": "POST", "path": "/r/first/plain/5", "client": ("10.0.0.9", 1)}
    assert guard.refusal(scope, {"host": "x"}) == (
        403,
        "latents are named where the server listens on its own machine alone",
    )
    assert guard.refusal({**scope, "path": "/r/first/live"}, {"host": "x"}) is None


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(client: Client, method: str):
    assert client.ask("/r/first/plain", method).status == 405


@pytest.mark.parametrize(
    "path",
    [
        "/static/../cli.py",
        "/static/..%2f..%2fpyproject.toml",
        "/static/%2e%2e/x",
        "/r/..%2f..",
        "/r/first/plain/-1",
        "/r/first/all/3",
        "/r/first/plain/99999999999999999999",
        "/r/first/plain/1e3",
    ],  # fmt: skip
)
def test_no_address_leads_to_a_file_or_a_traceback(client: Client, path: str):
    answer = client.ask(path)
    assert answer.status == 404
    assert "Traceback" not in answer.text


def test_an_address_without_end_is_refused(client: Client):
    assert client.ask("/r/first/plain?q=" + "x" * 5000).status == 414


def test_errors_of_the_interface_are_json_in_one_line(client: Client):
    for path, status, told in (
        ("/api/r/first/plain?sort=zz", 400, "sort: no measure 'zz'"),
        ("/api/r/none", 404, "no such run"),
        ("/api/r/first/plain/64", 404, "no such latent"),
    ):
        answer = client.ask(path)
        assert answer.status == status
        assert told in json.loads(answer.text)["error"]


def test_a_live_text_fires_what_the_model_and_the_sae_say(client: Client, run: Path, model: Path):
    from transformers import AutoTokenizer, LlamaForCausalLM

    text = "two dogs run over green hills"
    found = client.json(
        "/api/r/first/live",
        method="POST",
        body=json.dumps({"text": text, "member": "variance-a1"}),
        headers={"Content-Type": "application/json"},
    )
    assert isinstance(found, dict)
    ids = AutoTokenizer.from_pretrained(model)(text, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = LlamaForCausalLM.from_pretrained(model)(
            ids, output_hidden_states=True
        ).hidden_states[2][0]
        z = sae_of(run, "variance-a1").encode(hidden)
    assert "".join(token["text"] for token in found["tokens"]) == text
    for token, row in zip(found["tokens"], z, strict=True):
        wanted = {j: float(row[j]) for j in row.nonzero()[:, 0].tolist()}
        assert dict(token["latents"]) == pytest.approx(wanted, rel=1e-4)
        values = [value for _, value in token["latents"]]
        assert values == sorted(values, reverse=True)
    best = z[1:].max(0).values
    assert found["latents"][0]["latent"] == int(best.argmax())


def test_a_tied_sae_reads_a_text_too(tmp_path: Path, model: Path):
    run = write_world(tmp_path / "tied", model)
    shape = {"d_in": D_IN, "d_sae": D_SAE, "tied": True, "activation": {"kind": "topk", "k": 4}}
    SAE(SAEConfig.parse(shape)).save(run / "members" / HOOK / "plain")
    seal_run(run)
    index = Index(ensure_index(run, None, IndexConfig(neighbours=2, logits=2))[0])
    reading = Live().submit(Served("tied", run, index), index.by_slug["plain"], "two dogs run")
    found = reading.result(60)
    assert any(token["latents"] for token in found["tokens"])


def test_the_interface_gives_every_context_back(client: Client, run: Path):
    """Half a surrogate pair included, which UTF-8 cannot carry but JSON can."""
    wanted, halves = latents_of(run, "evaluation", "plain"), 0
    for latent, entry in wanted.items():
        found = json.dumps(client.json(f"/api/r/first/plain/{latent}"))
        halves += "\\ud800" in found
        assert all(json.dumps(c["tokens"])[1:-1] in found for c in entry["contexts"])
    assert halves


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "text: is empty"),
        (" \n ", "text: is empty"),
        ("x" * (MAX_CHARS + 1), f"at most {MAX_CHARS:,} are read"),
        ("☃" * (MAX_TOKENS + 1), f"tokens, at most {MAX_TOKENS} are read"),
        ("☃" * 50, "tokens are more than the model's 128 positions"),
    ],
)
def test_a_text_that_is_not_read_is_said_on_the_page(client: Client, text: str, told: str):
    answer = client.ask("/r/first/live", "POST", urlencode({"text": text}), FORM)
    assert answer.status == 400
    assert told in "".join(Strict(answer.text).words)


def test_a_hostile_text_stays_text(client: Client):
    for part in (HOSTILE[:4], HOSTILE[4:]):
        text = "".join(part).encode("utf-8", "replace").decode()
        answer = client.ask("/r/first/live", "POST", urlencode({"text": text}), FORM)
        assert answer.status == 200
        assert part[0] in "".join(Strict(answer.text).words)


@pytest.mark.parametrize("page", ["steer", "attribute"])
@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"text": " "}, "text: is empty"),
        ({"text": "x" * (MAX_CHARS + 1)}, f"at most {MAX_CHARS:,} are read"),
        ({"text": "☃" * (MAX_TOKENS + 1)}, "tokens are more than the model's 128 positions"),
    ],
)
def test_what_is_done_with_a_text_has_the_limits_of_reading_it(client: Client, page, fields, told):
    given = {"latent": "3", "value": "1", **fields}
    answer = client.ask(f"/r/first/{page}", "POST", urlencode(given), FORM)
    assert answer.status == 400
    assert told in "".join(Strict(answer.text).words)


@pytest.mark.parametrize(
    ("page", "fields", "told"),
    [
        ("steer", {"latent": "64"}, "latent"),
        ("steer", {}, "latent: is empty"),
        ("steer", {"latent": "3", "value": "<b>"}, "value: '<b>' is none; give a number"),
        ("steer", {"latent": "3", "kind": "<i>"}, "kind: '<i>' is none of set, add, scale"),
        ("attribute", {"answer": "the cat sat"}, "'the cat sat': is"),
        ("attribute", {"answer": "a", "against": "the cat <"}, "'the cat <': is"),
    ],
)
def test_a_form_that_says_nothing_to_do_is_refused(client: Client, page, fields, told):
    given = {"text": "the cat", **fields}
    answer = client.ask(f"/r/first/{page}", "POST", urlencode(given), FORM)
    assert answer.status == 400
    assert told in "".join(Strict(answer.text).words)
    answer = client.ask(f"/api/r/first/{page}", "POST", json.dumps(given), JSON)
    assert answer.status == 400
    assert told in json.loads(answer.text)["error"]


def test_hostile_prompts_stay_text_on_every_form(client: Client):
    for page in ("steer", "attribute"):
        given = {"text": HOSTILE[0], "latent": "3", "value": "5"}
        answer = client.ask(f"/r/first/{page}", "POST", urlencode(given), FORM)
        assert answer.status == 200, answer.text
        assert HOSTILE[0] in "".join(Strict(answer.text).words)


def test_a_steered_text_is_what_the_library_writes(client: Client, run: Path, model: Path):
    from wsae.acts.language import load_language
    from wsae.use.config import SteerConfig
    from wsae.use.steer import AskedEdit, steer

    page = client.ask("/r/first/plain/3").text
    assert 'action="../../../r/first/steer?key=' in page
    given = {"text": "the cat sat", "latent": 3, "value": "7", "kind": "add", "member": "plain"}
    found = client.json("/api/r/first/steer", method="POST", body=json.dumps(given), headers=JSON)
    number = json.dumps({**given, "value": 7.0})
    assert client.json("/api/r/first/steer", method="POST", body=number, headers=JSON) == found
    language, sae = load_language(str(model)), sae_of(run, "plain")
    wanted = [AskedEdit("add", 3, 7.0)]
    expected = steer(
        language, {HOOK: sae}, "the cat sat", wanted, cfg=SteerConfig(new_tokens=NEW_TOKENS)
    )
    assert isinstance(found, dict)
    for one, other in zip(found["continuations"], expected.continuations, strict=True):
        assert one["ids"] == other.ids
        assert one["cross_entropy"] == pytest.approx(other.cross_entropy, rel=1e-5)
    assert found["continuations"][0]["ids"] != found["continuations"][1]["ids"]


def test_a_transcoder_changes_what_it_was_trained_to_give(tmp_path: Path, model: Path):
    run = write_world(tmp_path / "coder", model)
    shape = {"d_in": D_IN, "d_out": D_IN, "d_sae": D_SAE, "activation": {"kind": "topk", "k": 4}}
    about = Provenance(hook=HOOK, hook_out="layers.2.mlp")
    SAE(SAEConfig.parse(shape)).save(run / "members" / HOOK / "plain", about)
    seal_run(run)
    index = Index(ensure_index(run, None, IndexConfig(neighbours=2, logits=2))[0])
    served, given = Served("coder", run, index), {"text": "two dogs run", "value": "9"}
    ask, live = Ask(index.by_slug["plain"], 3, given["text"], given), Live()
    for work in (steering, attributing):
        found = live.submit(served, ask.member, ask.text, work(served, ask)).result(60)
        assert found["continuations" if work is steering else "verified"]


def test_the_table_of_effects_is_the_librarys_and_links_its_latents(client: Client, run, model):
    from wsae.acts.language import load_language
    from wsae.use.attribute import LogitDifference, attribute
    from wsae.use.steer import Prompt

    language, text = load_language(str(model)), "the cat sat on a mat and saw"
    given = {"text": text, "answer": " dogs", "against": " cat", "member": "plain"}
    found = client.json(
        "/api/r/first/attribute", method="POST", body=json.dumps(given), headers=JSON
    )
    assert isinstance(found, dict)
    tokens = [
        language.tokenizer(t, add_special_tokens=False)["input_ids"] for t in (" dogs", " cat")
    ]
    ids = Prompt.of(language, text).ids[0]
    metric = LogitDifference(*(int(t[0]) for t in tokens))
    expected = attribute(language.model, {HOOK: sae_of(run, "plain")}, ids, metric)
    assert found["value"] == pytest.approx(expected.value, rel=1e-4)
    places = [one["latent"] for one in found["latents"]]
    known = {(one.position, one.latent): one.effect for one in expected.hooks[HOOK].effects}
    for place, row in enumerate(found["effects"]):
        for latent, effect in zip(places, row, strict=True):
            assert effect == pytest.approx(known.get((place, latent), 0.0), rel=1e-3, abs=1e-6)
    assert found["latents"][0]["link"] == f"/r/first/plain/{places[0]}"
    html = client.ask("/r/first/attribute", "POST", urlencode(given), FORM)
    assert 'class="num n6"' in html.text or 'class="num a6"' in html.text


@pytest.mark.parametrize(
    ("body", "kind"),
    [
        ("[1]", "application/json"),
        ("{", "application/json"),
        ("x" * 70_000, "application/json"),
        ('{"text": 3}', "application/json"),
        ("a", "text/plain"),
        ("[" * 60_000, "application/json"),
    ],  # fmt: skip
)
def test_a_body_that_cannot_be_read_is_refused(client: Client, body: str, kind: str):
    answer = client.ask("/api/r/first/live", "POST", body, {"Content-Type": kind})
    assert answer.status == 400
    assert json.loads(answer.text)["error"]


def test_without_the_model_the_page_says_so(tmp_path: Path):
    run = write_world(tmp_path / "run")
    index, _ = ensure_index(run, None, IndexConfig())
    with serving(("first", run, index), ("second", run, index)) as client:
        assert (
            "HuggingFaceTB/SmolLM2-135M is not on this machine" in client.ask("/r/first/live").text
        )
        latent = next(iter(latents_of(run, "evaluation", "plain")))
        assert "is not known: the model" in client.ask(f"/r/second/plain/{latent}").text
        assert "Runs" in client.ask("/").text
        answer = client.ask(
            "/api/r/first/live", "POST", '{"text": "a"}', {"Content-Type": "application/json"}
        )
        assert answer.status == 400


def test_latents_without_contexts_say_so(client: Client, run: Path):
    stored = {
        **latents_of(run, "evaluation", "plain"),
        **latents_of(run, "interpretation", "plain"),
    }
    for latent in set(range(D_SAE)) - set(stored):
        words = "".join(Strict(client.ask(f"/r/first/plain/{latent}").text).words)
        assert "No contexts of this latent are stored" in words or "Dead: it never fired" in words


def test_a_port_in_use_or_an_address_elsewhere_is_said_in_one_line():
    with server.listen("127.0.0.1", 0) as listening:
        port = listening.getsockname()[1]
        assert server.address_of(listening) == f"http://127.0.0.1:{port}/"
        assert server.is_loopback(listening)
        with pytest.raises(UserError, match=f"--port {port}: in use on 127.0.0.1"):
            server.listen("127.0.0.1", port)
    with pytest.raises(UserError, match=r"--host 192\.0\.2\.1: cannot listen there"):
        server.listen("192.0.2.1", 0)
    with pytest.raises(UserError, match="--port 70000: not a port"):
        server.listen("127.0.0.1", 70000)
