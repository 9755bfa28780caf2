"""The report's page and words, without a browser: honest sentences, escaping, missing parts, refusals."""

import html.parser
import json
import re
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_fixture import CONTROL, MEMBERS, edit_evaluation, write_run
from report_text import HOSTILE, Shape

from wsae.core.errors import UserError
from wsae.report.charts import pack_contexts
from wsae.report.html import json_block, policy, write_report
from wsae.report.rundata import read_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def editable(run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(run, tmp_path / "run")


class Page(html.parser.HTMLParser):
    """Tags, their nesting, and the text of script elements."""

    VOID = {"meta", "br", "hr", "img", "input", "link", "circle"}

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.words: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open[-1:] == [tag], f"</{tag}> closes {self.open[-3:]}"
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "script":
            self.scripts.append(data)
        else:
            self.words.append(data)


def test_page_is_well_formed_and_loads_nothing(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == []
    names = [tag for tag, _ in page.tags]
    assert names.count("script") == 2
    assert names.count("style") == 1
    assert not {"img", "link", "iframe", "object", "base", "form"} & set(names)
    for tag, attributes in page.tags:
        assert not [a for a in attributes if a.startswith("on") or a in ("src", "style")], (
            tag,
            attributes,
        )
        assert (attributes.get("href") or "#").startswith("#")


def test_policy_allows_exactly_the_inlined_script_and_style(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", text, re.S)
    script = text.rsplit("<script>", 1)[1].split("</script>")[0]
    said = next(
        a["content"] for _, a in Page(text).tags if a.get("http-equiv") == "Content-Security-Policy"
    )
    assert style
    assert said == policy(script, style[1])
    assert "default-src 'none'" in said
    assert "unsafe" not in said
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|\beval\b|new Function", script
    )


def test_contexts_survive_the_page_unchanged_and_cannot_leave_their_block(
    run: Path, tmp_path: Path
) -> None:
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    block = Page(text).scripts[0]
    assert not set(block) & set("<>&\u2028\u2029")
    packed = json.loads(block)
    assert set(HOSTILE) <= set(packed["tokens"])
    source = json.loads((run / "evaluation" / "contexts.json").read_text())
    for hook, members in packed["hooks"]:
        for name, latents in members:
            for entry, (latent, density, _, peak, match, contexts, *_) in zip(
                source[hook][name], latents, strict=True
            ):
                assert latent == entry["latent"]
                assert density == pytest.approx(entry["density"], rel=5e-3)
                assert peak == pytest.approx(entry["max"], rel=5e-3)
                assert (match and match[:2]) == (
                    entry["match"] and [entry["match"]["member"], entry["match"]["latent"]]
                )
                for want, (tokens, at, _, pairs) in zip(entry["contexts"], contexts, strict=True):
                    assert [packed["tokens"][t] for t in tokens] == want["tokens"]
                    assert at == want["peak"]
                    acts = dict(zip(pairs[::2], pairs[1::2], strict=True))
                    assert acts == pytest.approx(
                        {i: a for i, a in enumerate(want["acts"]) if a > 0}, rel=5e-3
                    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
def test_json_block_round_trips_without_markup(value: object) -> None:
    block = json_block(value)
    assert json.loads(block) == value
    assert block.isascii()
    assert not set(block) & set("<>&")


def test_hostile_names_are_text_everywhere(tmp_path: Path) -> None:
    hook = '"><script>alert(1)</script>{{7*7}}\u202e'
    path = write_run(tmp_path / "<b>run", Shape(hooks=(hook, "layers.2"), latents=3, d_sae=64))
    page = Page(write_report(path).read_text(encoding="utf-8"))
    assert [tag for tag, _ in page.tags].count("script") == 2
    assert page.open == []
    allowed = {"aria-label", "title", "data-member"}
    placed = {key for _, a in page.tags for key, value in a.items() if "alert(1)" in (value or "")}
    assert placed <= allowed
    words = " ".join(page.words)
    assert hook.replace("\u202e", "") in words.replace("\u202e", "")
    assert "{{7*7}}" in words, "nothing evaluates template text that comes from data"


def test_report_of_three_members_with_200_latents_stays_under_1_5_mb(tmp_path: Path) -> None:
    shape = Shape(d_in=576, d_sae=4608, latents=200, contexts=8, window=32)
    assert write_report(write_run(tmp_path / "run", shape)).stat().st_size < 1_500_000


def test_report_is_deterministic(run: Path, tmp_path: Path) -> None:
    pages = [write_report(run, tmp_path / name).read_bytes() for name in ("a.html", "b.html")]
    assert pages[0] == pages[1]


# --- missing parts, refusals -----------------------------------------------------------------------------


def test_a_run_without_weights_speaks_of_none(tmp_path: Path, monkeypatch) -> None:
    """As `wsae train` makes them by default."""
    monkeypatch.setattr("report_fixture.MEMBERS", {"plain": 0.0})
    page = write_report(write_run(tmp_path / "run"), tmp_path / "report.html").read_text()
    assert "<h1>Sparse autoencoders</h1>" in page
    words = page[page.index("<h1>") : page.index("<script")]
    for word in ("verdict", "weighted member", "plain twin</em>"):
        assert word not in words.lower(), word
    monkeypatch.undo()
    page = write_report(write_run(tmp_path / "two"), tmp_path / "two.html").read_text()
    assert "<h1>Weighted sparse autoencoders beside their plain twin</h1>" in page


def test_training_only_report_says_so(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", evaluation=False)
    text = write_report(path).read_text(encoding="utf-8")
    assert "nothing has been measured on held-out data yet" in text
    assert "<h2>Training</h2>" in text
    assert "Results on held-out data" not in text
    assert 'id="browser"' not in text
    assert Page(text).open == []


def test_arrays_have_no_contexts_and_their_rows_are_not_called_text(tmp_path: Path) -> None:
    text = write_report(write_run(tmp_path / "run", contexts=False)).read_text(encoding="utf-8")
    assert 'id="browser"' not in text
    assert "On held-out data (50,000 rows" in text


def test_unfinished_training_with_a_cut_last_line(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", evaluation=False)
    (path / "manifest.json").unlink()
    with (path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 61, "tok')
    text = write_report(path).read_text(encoding="utf-8")
    assert "Training has not finished" in text
    assert "cut off" in text


def test_damaged_inner_metrics_line_is_refused(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", evaluation=False)
    (path / "manifest.json").unlink()
    lines = (path / "metrics.jsonl").read_text().splitlines()
    (path / "metrics.jsonl").write_text("\n".join([lines[0], "{oops", *lines[1:]]) + "\n")
    with pytest.raises(UserError, match="line 2"):
        write_report(path)


def test_altered_evaluation_is_refused(editable: Path) -> None:
    path = editable / "evaluation" / "arrays.safetensors"
    data = bytearray(path.read_bytes())
    data[-5] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="checksum"):
        write_report(editable)


@pytest.mark.parametrize("make", ["nothing", "empty", "file"])
def test_what_is_no_run_gets_one_line(tmp_path: Path, make: str) -> None:
    path = tmp_path / "run"
    if make == "empty":
        path.mkdir()
    if make == "file":
        path.write_text("x")
    with pytest.raises(UserError) as error:
        write_report(path)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)
    assert not (path / "report.html").exists()


def test_nan_and_missing_numbers_do_not_break_the_page(editable: Path) -> None:
    def spoil(value: dict) -> None:
        metrics = value["hooks"]["layers.9"]["members"]["plain"]["metrics"]
        metrics["kl"] = {"value": None}
        metrics["fvu"] = {"value": float("nan"), "low": 0.1, "high": None}
        del metrics["l0"]
        value["hooks"]["layers.9"]["comparisons"][0]["low"] = None
        value["glossary"] = {}

    edit_evaluation(editable, spoil)
    text = write_report(editable).read_text(encoding="utf-8")
    assert Page(text).open == []
    assert not re.search(r"\bnan\b", text.split("<script")[0], re.IGNORECASE)


def test_every_member_and_metric_is_on_the_page(run: Path, tmp_path: Path) -> None:
    text = write_report(run, tmp_path / "r.html").read_text(encoding="utf-8")
    for word in (
        *MEMBERS,
        CONTROL,
        "Plain FVU",
        "KL divergence",
        "Dead latents",
        "SmolLM2-135M",
        "262,144",
    ):
        assert word in text, word
    assert text.count('<svg class="chart"') == 1 + 2 * 4 + 2 + 2


def test_pack_contexts_of_no_contexts_is_empty(tmp_path: Path) -> None:
    assert pack_contexts(read_run(write_run(tmp_path / "run", evaluation=False))) == {
        "tokens": [],
        "hooks": [],
        "scores": [],
        "images": {},
    }
