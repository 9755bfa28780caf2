"""A headless Chromium driven through chromedriver's HTTP interface with the standard library alone."""

import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path

import pytest

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
MISSING = "chromium and chromedriver are needed to open the report in a browser"
needs_browser = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason=MISSING)
_FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-component-update",
    "--disable-background-networking", "--disable-sync", "--disable-dev-shm-usage", "--disable-extensions",
)  # fmt: skip
CONTRAST = """
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map(Number).map(v => v / 255)
  .map(v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const solid = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor;
  if (c !== 'rgba(0, 0, 0, 0)' && !/, 0\\.\\d+\\)/.test(c)) return c; } return 'rgb(255, 255, 255)'; };
const of = (e) => { const [a, b] = [light(getComputedStyle(e).color), light(solid(e))].sort((x, y) => y - x);
  return (a + 0.05) / (b + 0.05); };
return Math.min(...[...document.querySelectorAll('p, h1, h2, dt, dd, td, th, small, .judged, .bounds, .ctx, button')]
  .map(of));
"""
"""Function body: the lowest contrast ratio between a text's colour and what is behind it."""
_START_S, _REPLY_S = 30, 60


class Browser:
    """One page: `open` an address, `js` runs a function body and returns its value."""

    def __init__(self, port: int, session: str = "") -> None:
        self._root = f"http://127.0.0.1:{port}"
        self.session = session

    def call(self, path: str, body: dict | None = None, method: str = "POST") -> object:
        """Send one WebDriver command and return its value."""
        data = json.dumps(body or {}).encode() if method == "POST" else None
        request = urllib.request.Request(self._root + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=_REPLY_S) as reply:
                return json.loads(reply.read())["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(error.read().decode(errors="replace")[:800]) from error

    def open(self, path: Path, address: str = "") -> None:
        """Load a file, freshly even when only the fragment differs."""
        self.call(f"/session/{self.session}/url", {"url": "about:blank"})
        self.call(f"/session/{self.session}/url", {"url": path.resolve().as_uri() + address})

    def js(self, body: str, *args: object) -> object:
        """Run a function body in the page."""
        return self.call(
            f"/session/{self.session}/execute/sync", {"script": body, "args": list(args)}
        )

    def cdp(self, command: str, **params: object) -> dict:
        """Send a DevTools command."""
        reply = self.call(
            f"/session/{self.session}/goog/cdp/execute", {"cmd": command, "params": params}
        )
        return reply if isinstance(reply, dict) else {}

    def console(self) -> list[str]:
        """Return the console messages (policy violations and errors among them) since the last call."""
        entries = self.call(f"/session/{self.session}/se/log", {"type": "browser"})
        return [entry["message"] for entry in entries] if isinstance(entries, list) else []

    def size(self, width: int, height: int, phone: bool = False, dark: bool = False) -> None:
        """Emulate a screen."""
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=phone,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.cdp("Emulation.setEmulatedMedia", features=[scheme])

    def picture(self, path: Path, full: bool = False) -> None:
        """Write a screenshot."""
        path.write_bytes(
            b64decode(self.cdp("Page.captureScreenshot", captureBeyondViewport=full)["data"])
        )


@contextlib.contextmanager
def browser() -> Iterator[Browser]:
    """Start chromedriver and one headless session; both end with the block."""
    assert DRIVER, MISSING
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as profile:
        quiet = subprocess.DEVNULL
        process = subprocess.Popen([DRIVER, f"--port={port}"], stdout=quiet, stderr=quiet)
        client = Browser(port)
        try:
            client.session = _start(client, profile)
            yield client
        finally:
            with contextlib.suppress(OSError, RuntimeError):
                client.call(f"/session/{client.session}", method="DELETE")
            process.terminate()
            process.wait(timeout=_START_S)


def _start(client: Browser, profile: str) -> str:
    options = {"binary": CHROMIUM, "args": [*_FLAGS, f"--user-data-dir={profile}"]}
    wanted = {
        "browserName": "chrome",
        "goog:chromeOptions": options,
        "goog:loggingPrefs": {"browser": "ALL"},
    }
    end = time.monotonic() + _START_S
    while True:
        try:
            reply = client.call("/session", {"capabilities": {"alwaysMatch": wanted}})
            assert isinstance(reply, dict)
            return reply["sessionId"]
        except (urllib.error.URLError, ConnectionError):
            if time.monotonic() > end:
                raise
            time.sleep(0.2)
