"""The report in a real browser: hostile text stays text, search and sorting are right, links and keys work."""

import json
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote, urlencode

import pytest
from report_browser import CONTRAST, Browser, browser, needs_browser
from report_fixture import EXPLANATION, NEW_LATENT, SCORES, write_interpretation, write_run
from report_text import HOSTILE, Shape

from wsae.report.html import write_report

pytestmark = needs_browser

HOOKS = ("layers.9", "blocks/4.<i>mlp")
FIRST_PAGE = 15
SHOWN_LATENTS = (
    "return [...document.querySelectorAll('.latent')].map(e => Number(e.dataset.latent))"
)
ALERTED = "return window.alerted ?? null"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = Shape(hooks=HOOKS, latents=24)
    path = write_run(tmp_path_factory.mktemp("browser") / "run", shape)
    write_report(path)
    return path


@pytest.fixture(scope="module")
def session() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(session: Browser, run: Path) -> Browser:
    session.size(1280, 900)
    session.console()
    session.open(run / "report.html")
    return session


def latents(run: Path, hook: str, member: str) -> list[dict]:
    return json.loads((run / "evaluation" / "contexts.json").read_text())[hook][member]


def address(hook: str, member: str, latent: int | str = "", **options: str) -> str:
    path = "/".join(quote(str(part), safe="") for part in (hook, member, latent))
    return f"#{path}" + (f"?{urlencode(options)}" if options else "")


def all_cards(page: Browser) -> list[int]:
    page.js(
        "while (!document.getElementById('more-row').hidden) document.getElementById('more').click()"
    )
    shown = page.js(SHOWN_LATENTS)
    assert isinstance(shown, list)
    return shown


def rounded(value: float) -> float:
    return float(f"{value:.3g}")


def test_hostile_text_is_shown_literally_and_nothing_runs(page: Browser) -> None:
    page.js("window.alert = () => { window.alerted = true; }")
    all_cards(page)
    page.js("for (const b of document.querySelectorAll('.fold')) b.click()")
    text = page.js("return document.getElementById('latents').textContent")
    assert isinstance(text, str)
    named = {
        "\u202e": "⟨202E⟩",
        "\u2028": "⟨2028⟩",
        "\u2029": "⟨2029⟩",
        "\x00": "⟨0000⟩",
        "\x07": "⟨0007⟩",
        "\ud800": "⟨D800⟩",
    }
    for token in HOSTILE:
        shown = "".join(named.get(char, char) for char in token)
        assert shown in text, f"{token!r} should be on the page as {shown!r}"
    assert not set(named) & set(text), "characters that hide or reorder text are shown by name"
    assert page.js("return document.querySelectorAll('img, iframe, #latents script').length") == 0
    assert page.js(ALERTED) is None
    assert page.console() == []


def test_policy_stops_a_script_that_is_not_the_report_s(page: Browser) -> None:
    page.js(
        "const s = document.createElement('script'); s.textContent = 'window.alerted = 1';"
        "document.body.append(s); const p = document.body;"
        "p.insertAdjacentHTML('beforeend', '<p onclick=\"window.alerted=1\" id=x>');"
        "document.getElementById('x').click()"
    )
    assert page.js(ALERTED) is None
    assert any("Content Security Policy" in message for message in page.console())


def test_opens_on_a_weighted_member_with_its_twin_beside_each_latent(
    page: Browser, run: Path
) -> None:
    entries = sorted(latents(run, HOOKS[0], "variance-a1"), key=lambda entry: entry["latent"])
    assert page.js(SHOWN_LATENTS) == [entry["latent"] for entry in entries[:FIRST_PAGE]]
    heads = page.js(
        "return [...document.querySelectorAll('.twin .side-head')].map(e => e.textContent)"
    )
    assert isinstance(heads, list)
    for entry, head in zip(entries, heads, strict=False):
        assert head.startswith(f"plain, latent {entry['match']['latent']} · cosine ")
        assert float(head.rsplit(" ", 1)[1]) == rounded(entry["match"]["cosine"])
    assert page.js("return document.querySelectorAll('.twin .ctx .tok').length") > 0


def test_shading_grows_with_activation_and_titles_give_the_value(page: Browser, run: Path) -> None:
    entry = min(latents(run, HOOKS[0], "variance-a1"), key=lambda entry: entry["latent"])
    found = page.js(
        "return [...document.querySelector('.own .ctx').querySelectorAll('.tok')].map(t => "
        "[t.title, Number(t.className.match(/a(\\d)/)[1]), t.classList.contains('peak')])"
    )
    assert isinstance(found, list)
    context = entry["contexts"][0]
    wanted = [(i, act) for i, act in enumerate(context["acts"]) if act > 0]
    assert [float(title.removeprefix("activation ")) for title, _, _ in found] == [
        rounded(a) for _, a in wanted
    ]
    assert [peak for *_, peak in found] == [i == context["peak"] for i, _ in wanted]
    ordered = sorted((act, level) for (_, act), (_, level, _) in zip(wanted, found, strict=True))
    assert [level for _, level in ordered] == sorted(level for _, level in ordered)
    assert ordered[-1][1] == 6


def test_plain_latents_stand_beside_the_closest_latent_that_chose_them(
    page: Browser, run: Path
) -> None:
    page.open(run / "report.html", address(HOOKS[0], "plain", sort="-match"))
    best: dict[int, tuple[float, str, int]] = {}
    for member in ("variance-a1", "variance-a0.5"):
        for entry in latents(run, HOOKS[0], member):
            match = entry["match"]
            found = (rounded(match["cosine"]), member, entry["latent"])
            best[match["latent"]] = max(best.get(match["latent"], found), found, key=lambda x: x[0])
    shown = all_cards(page)
    heads = page.js(
        "const head = (e) => e.querySelector('.twin .side-head')?.textContent ?? null;"
        "return [...document.querySelectorAll('.latent')].map(head)"
    )
    assert isinstance(heads, list)
    for latent, head in zip(shown, heads, strict=True):
        cosine, member, other = best.get(latent, (None, "", 0))
        assert head == (None if cosine is None else f"{member}, latent {other} · cosine {cosine:g}")
    ordered = [best[latent][0] for latent in shown if latent in best]
    assert ordered == sorted(ordered, reverse=True)


SORTS = {
    "index": lambda e: (e["latent"],),
    "density": lambda e: (-rounded(e["density"]), e["latent"]),
    "-density": lambda e: (rounded(e["density"]), e["latent"]),
    "variance": lambda e: (-rounded(e["variance"]), e["latent"]),
    "max": lambda e: (-rounded(e["max"]), e["latent"]),
    "match": lambda e: (rounded(e["match"]["cosine"]), e["latent"]),
    "-match": lambda e: (-rounded(e["match"]["cosine"]), e["latent"]),
}


@pytest.mark.parametrize("sort", SORTS)
def test_sorting_orders_every_latent(page: Browser, run: Path, sort: str) -> None:
    page.open(run / "report.html", address(HOOKS[0], "variance-a0.5", sort=sort))
    wanted = sorted(latents(run, HOOKS[0], "variance-a0.5"), key=SORTS[sort])
    assert all_cards(page) == [entry["latent"] for entry in wanted]
    assert page.js("return document.getElementById('sort').value") == sort


@pytest.mark.parametrize("query", ["</SCRIPT><img", "whale sea", "{{7*7}}", "\\d+", "no such text"])
def test_search_keeps_exactly_the_latents_with_that_text(
    page: Browser, run: Path, query: str
) -> None:
    page.open(run / "report.html", address(HOOKS[0], "variance-a1", q=query))
    found = [
        entry["latent"]
        for entry in latents(run, HOOKS[0], "variance-a1")
        if any(query.lower() in "".join(c["tokens"]).lower() for c in entry["contexts"])
    ]
    assert all_cards(page) == sorted(found)
    hits = page.js("return [...document.querySelectorAll('.hit')].length")
    assert (hits == 0) <= (not found)
    count = page.js("return document.getElementById('count').textContent")
    assert f"{len(found)} of 24 sampled latents contain" in str(count)


def test_typing_in_the_search_box_filters_and_makes_a_link(page: Browser) -> None:
    page.js(
        "const s = document.getElementById('search'); s.value = 'whale sea'; s.dispatchEvent(new Event('input'))"
    )
    page.call(
        f"/session/{page.session}/execute/async",
        {"script": "setTimeout(arguments[0], 300)", "args": []},
    )
    assert "q=whale+sea" in str(page.js("return location.hash"))
    before = page.js(SHOWN_LATENTS)
    page.js("location.reload()")
    assert page.js(SHOWN_LATENTS) == before


def test_deep_link_opens_the_hook_member_and_latent(page: Browser, run: Path) -> None:
    last = max(entry["latent"] for entry in latents(run, HOOKS[1], "plain"))
    page.open(run / "report.html", address(HOOKS[1], "plain", last))
    assert page.js("return document.querySelector('.latent.current').dataset.latent") == str(last)
    top = page.js("return document.querySelector('.latent.current').getBoundingClientRect().top")
    assert isinstance(top, int | float)
    assert 0 <= top < 900
    assert (
        page.js("return document.querySelector('[data-member][aria-pressed=true]').textContent")
        == "plain"
    )
    assert (
        page.js("return document.querySelector('[data-tab][aria-pressed=true]').textContent")
        == HOOKS[1]
    )


@pytest.mark.parametrize(
    "hash_", ["#nowhere/plain/3", "#%/%/%?sort=__proto__", "#layers.9/plain/xyz", "#a"]
)
def test_senseless_addresses_leave_a_working_page(page: Browser, run: Path, hash_: str) -> None:
    page.open(run / "report.html", hash_)
    assert len(all_cards(page)) >= 24
    assert page.console() == []


def test_keys_walk_through_latents_and_leave_the_search_box_alone(page: Browser) -> None:
    press = (
        "document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))"
    )
    order = page.js(SHOWN_LATENTS)
    assert isinstance(order, list)
    seen = []
    for key in ("j", "j", "j", "k"):
        page.js(press, key)
        seen.append(
            page.js("return Number(document.querySelector('.latent.current').dataset.latent)")
        )
    assert seen == [order[0], order[1], order[2], order[1]]
    assert str(page.js("return location.hash")).endswith(f"/{order[1]}")
    page.js(press, "/")
    assert page.js("return document.activeElement.id") == "search"
    page.js(
        "document.activeElement.dispatchEvent(new KeyboardEvent('keydown', {key: 'j', bubbles: true}))"
    )
    assert (
        page.js("return Number(document.querySelector('.latent.current').dataset.latent)")
        == order[1]
    )


def test_member_switch_and_hook_tabs(page: Browser, run: Path) -> None:
    page.js("document.querySelector('#members [data-member=plain]').click()")
    wanted = sorted(entry["latent"] for entry in latents(run, HOOKS[0], "plain"))
    assert all_cards(page) == wanted
    visible = "return [...document.querySelectorAll('.hook')].map(e => !e.hidden)"
    assert page.js(visible) == [True, False]
    page.js("document.querySelectorAll('[data-tab]')[1].click()")
    assert page.js(visible) == [False, True]
    assert all_cards(page) == sorted(entry["latent"] for entry in latents(run, HOOKS[1], "plain"))


def test_log_toggle_swaps_the_curves(page: Browser) -> None:
    seen = "return ['.on-linear', '.on-log'].map(s => document.querySelector(s).getBoundingClientRect().height > 0)"
    assert page.js(seen) == [True, False]
    page.js("document.querySelector('input[value=log]').click()")
    assert page.js(seen) == [False, True]


@pytest.mark.parametrize("dark", [False, True])
def test_fits_a_phone_and_keeps_contrast(page: Browser, run: Path, dark: bool) -> None:
    page.size(390, 844, phone=True, dark=dark)
    page.open(run / "report.html")
    assert page.js("return document.documentElement.scrollWidth") == 390
    ratio = page.js(CONTRAST)
    assert isinstance(ratio, int | float)
    assert ratio > 4.5, "every text colour against its page must stay readable"


def test_a_thousand_latents_draw_at_once(session: Browser, tmp_path: Path) -> None:
    shape = Shape(latents=1000, contexts=4, window=16, d_sae=4096)
    path = write_report(write_run(tmp_path / "run", shape))
    session.size(1280, 900)
    session.open(path, address("layers.9", "variance-a1", sort="density"))
    assert len(session.js(SHOWN_LATENTS)) == FIRST_PAGE
    took = session.js(
        "const begin = performance.now(); const s = document.getElementById('sort'); s.value = 'match';"
        "s.dispatchEvent(new Event('change')); document.body.getBoundingClientRect(); return performance.now() - begin"
    )
    assert isinstance(took, int | float)
    assert took < 1000, "sorting a thousand latents should feel immediate (milliseconds)"


@pytest.fixture(scope="module")
def interpreted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_interpretation(write_run(tmp_path_factory.mktemp("seen") / "run", Shape()))
    write_report(path)
    return path


def test_explanation_and_scores_stand_beside_the_contexts_of_both_members(
    session: Browser, interpreted: Path
) -> None:
    session.size(1280, 900)
    session.console()
    session.open(interpreted / "report.html", address("layers.9", "variance-a1"))
    session.js("window.alert = () => { window.alerted = true; }")
    all_cards(session)
    shown = json.loads((interpreted / "interpretation" / "contexts.json").read_text())["layers.9"]
    for entry in shown["variance-a1"]:
        partner = next((e for e in shown["plain"] if e["latent"] == entry["match"]["latent"]), None)
        for side, wanted in ((".own", entry), (".twin", partner)):
            text = session.js(
                "const side = document.querySelector(`.latent[data-latent='${arguments[0]}'] ${arguments[1]}`);"
                "return [side.querySelector('.explained')?.textContent ?? null,"
                " [...side.querySelectorAll('.scores b')].map(b => Number(b.textContent))]",
                entry["latent"],
                side,
            )
            assert isinstance(text, list)
            if wanted is None:
                assert text == [None, []]
                continue
            assert text[1] == [rounded(wanted["scores"][score]) for score in SCORES]
            if wanted["explanation"] is None:
                assert text[0] == f"fires on ship {HOSTILE[0]} ", "nobody explained it"
            elif wanted["explanation"] != EXPLANATION:
                assert text[0] == f"“{wanted['explanation']}”"
            else:
                assert "<img src=x onerror=alert(1)>" in text[0], "hostile text stays text"
                assert "⟨202E⟩" in text[0]
    assert (
        session.js("return document.querySelectorAll('img, iframe, #latents script').length") == 0
    )
    assert session.js(ALERTED) is None
    assert session.console() == []


def test_latents_that_only_the_interpretation_knows_are_in_the_browser_and_scores_sort(
    session: Browser, interpreted: Path
) -> None:
    session.open(interpreted / "report.html", address("layers.9", "plain", sort="score-0"))
    shown = json.loads((interpreted / "interpretation" / "contexts.json").read_text())["layers.9"]
    scored = {e["latent"]: rounded(e["scores"]["embedding"]) for e in shown["plain"]}
    order = all_cards(session)
    assert NEW_LATENT in order
    assert order[: len(scored)] == sorted(scored, key=lambda latent: (-scored[latent], latent))
    session.open(interpreted / "report.html", address("layers.9", "plain", q="explanation 0/3"))
    assert all_cards(session) == [shown["plain"][3]["latent"]], "explanations are searched too"
