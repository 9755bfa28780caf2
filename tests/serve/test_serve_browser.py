"""The served pages in a real browser: hostile contexts run nothing, keys walk, a phone's width is enough."""

import json
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_browser import CONTRAST, Browser, browser, needs_browser
from report_text import HOSTILE
from serve_world import Client, latents_of, serving, tiny_model, write_world

from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig

pytestmark = needs_browser

PRESS = "document.dispatchEvent(new KeyboardEvent('keydown', {key: arguments[0], bubbles: true}))"
READY = (
    "document.getElementById('help-button')?.hidden === false"
    " && getComputedStyle(document.querySelector('.bar')).display === 'flex'"
)
INERT = """
const mine = new Set(['/static/serve.js']);
return [document.querySelectorAll('iframe, object, embed, style, [style], [onclick], [onerror], [onload]').length,
  [...document.scripts].filter(s => !mine.has(new URL(s.src).pathname)).length,
  [...document.images].filter(i => !i.src.startsWith('data:image/png')).length, window.alerted ?? null]
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("serve")
    return write_world(place / "run", tiny_model(place / "model"))


@pytest.fixture(scope="module")
def client(run: Path) -> Iterator[Client]:
    with serving(("first", run, ensure_index(run, None, IndexConfig())[0])) as found:
        yield found


@pytest.fixture(scope="module")
def session() -> Iterator[Browser]:
    with browser() as opened:
        yield opened


@pytest.fixture
def page(session: Browser) -> Browser:
    session.size(1280, 900)
    session.console()
    return session


def go(page: Browser, client: Client, path: str) -> None:
    """Open a page and wait for its style and script: the driver may answer before they are there."""
    page.call(f"/session/{page.session}/url", {"url": client.root + path})
    wait(page, READY)
    assert page.js(f"return {READY}"), f"{path}: its style or script did not come"


def place(page: Browser) -> str:
    return str(page.js("return location.pathname"))


def wait(page: Browser, test: str) -> None:
    """Wait until an expression holds in the page, which may load another meanwhile."""
    end = time.monotonic() + 60
    while page.js(f"return Boolean({test})") is not True and time.monotonic() < end:
        time.sleep(0.05)


def walked(page: Browser, key: str, wanted: str) -> None:
    """Press a key and wait for the page it leads to, its style and script included."""
    page.js(PRESS, key)
    wait(page, f"location.pathname === {json.dumps(wanted)} && {READY}")
    assert place(page) == wanted


def test_hostile_contexts_are_inert_on_every_page(page: Browser, client: Client, run: Path):
    shown = latents_of(run, "evaluation", "variance-a1")
    pages = [f"/r/first/variance-a1/{latent}" for latent in shown]
    for path in [
        "/",
        "/r/first/all",
        "/r/first/all?q=%3Cimg+src%3Dx+onerror%3Dalert(1)%3E",
        *pages,
    ]:
        go(page, client, path)
        assert page.js(INERT) == [0, 0, 0, None], path
    text = str(page.js("return document.body.textContent"))
    assert any(hostile in text for hostile in HOSTILE)
    assert page.console() == []


def test_the_policy_stops_scripts_and_styles_that_are_not_the_servers(
    page: Browser, client: Client
):
    go(page, client, "/r/first/plain")
    page.js(
        "const s = document.createElement('script'); s.textContent = 'window.alerted = 1'; document.body.append(s);"
        "document.body.insertAdjacentHTML('beforeend', "
        '\'<p id=x onclick="window.alerted=1" style="color: red">x</p>\');'
        "document.getElementById('x').click()"
    )
    assert page.js("return window.alerted ?? null") is None
    assert (
        page.js("return getComputedStyle(document.getElementById('x')).color") != "rgb(255, 0, 0)"
    )
    assert any("Content Security Policy" in message for message in page.console())


def test_keys_walk_latents_their_twin_and_the_list(page: Browser, client: Client):
    go(page, client, "/r/first/variance-a1/10")
    walked(page, "j", "/r/first/variance-a1/11")
    walked(page, "k", "/r/first/variance-a1/10")
    twin = str(page.js("return new URL(document.body.dataset.twin, location).pathname"))
    walked(page, "m", twin)
    walked(page, "u", "/r/first/plain")
    for key in ("j", "j", "j", "k"):
        page.js(PRESS, key)
    assert page.js("return document.querySelector('tr.current a').textContent") == "1"
    page.js(PRESS, "/")
    assert page.js("return document.activeElement.id") == "search"
    page.js(PRESS, "?")
    assert page.js("return document.getElementById('help').open") is True
    assert page.console() == []


def test_a_text_is_read_from_the_form(page: Browser, client: Client):
    go(page, client, "/r/first/live")
    page.js(
        "document.querySelector('textarea').value = 'the cat sat on a mat';"
        "document.querySelector('form.typed').requestSubmit()"
    )
    wait(page, "document.querySelector('.reading')")
    assert (
        page.js("return document.querySelector('.reading').textContent") == "the cat sat on a mat"
    )
    assert int(str(page.js("return document.querySelectorAll('.reading [title]').length"))) > 0
    assert page.console() == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(
    "path", ["/", "/r/first/all?sort=-density", "/r/first/variance-a1/{}", "/r/first/live"]
)
def test_a_phone_is_wide_enough_and_contrast_holds(
    page: Browser, client: Client, run: Path, path: str, dark: bool
):
    page.size(390, 844, phone=True, dark=dark)
    go(page, client, path.format(next(iter(latents_of(run, "evaluation", "variance-a1")))))
    page.js("for (const fold of document.querySelectorAll('details')) fold.open = true")
    assert page.js("return document.documentElement.scrollWidth") == 390
    ratio = page.js(CONTRAST)
    assert isinstance(ratio, int | float)
    assert ratio > 4.5
