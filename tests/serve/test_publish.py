"""Publishing an SAE: the files and the upload say what the run says; each latent arrives once, whatever goes wrong."""

import gzip
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
from interpret_server import Reply
from neuronpedia_site import KEY, Fault, Site, error
from serve_world import D_SAE, HOOK, arrays_of, edit_contexts, latents_of, tiny_model, write_world

from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.interop.saes import about_member
from wsae.run import NamedLatent, Run
from wsae.sae.config import Provenance
from wsae.serve import neuronpedia, upload
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.serve.index import Index
from wsae.serve.neuronpedia import (
    PER_BATCH,
    FiringCounts,
    Interval,
    Source,
    batches,
    latents,
    source_of,
)
from wsae.serve.upload import Patience, Sent

QUICK = Patience(timeout_s=0.4, attempts=4, first_wait_s=0.01, longest_wait_s=0.05)
MEMBER = "plain"
ABOUT = Provenance(hook=HOOK, member=MEMBER, wsae_version="1")
SOURCE = Source("tiny", "wsae-test", 1, "blocks.1.hook_resid_post", ABOUT)


def make_run(at: Path) -> Path:
    """Write a run with a model, and in a context of it what a database or the site refuses."""
    run = write_world(at / "run", tiny_model(at / "tiny"))

    def change(members: dict) -> None:
        tokens = members[MEMBER][0]["contexts"][0]["tokens"]
        tokens[0], tokens[1], tokens[2] = "", "a\0b", "\ud83d"

    edit_contexts(run, "evaluation", change)
    first = min(expected(run))
    Run(run).name_latent(HOOK, MEMBER, first, NamedLatent(name="<b>my\x85own</b>"))
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("publish"))


@pytest.fixture(scope="module")
def index(run: Path) -> Index:
    return Index(ensure_index(run, None, IndexConfig())[0])


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[Site]:
    monkeypatch.setenv(upload.KEY, KEY)
    site = Site()
    yield site
    site.close()


def expected(run: Path) -> dict[int, list[list[str]]]:
    """Latent -> tokens of each context, from the run's own files."""
    shown, scored = (latents_of(run, part, MEMBER) for part in ("evaluation", "interpretation"))
    found = {n: [c["tokens"] for c in e["contexts"]] for n, e in {**scored, **shown}.items()}
    return {n: tokens for n, tokens in found.items() if tokens}


def tidy(token: str) -> str:
    return token.encode("utf-8", "replace").decode().replace("\0", " ") or "⋯"


def lines(path: Path) -> list[dict]:
    data = path.read_bytes()
    data = gzip.decompress(data) if path.suffix == ".gz" else data
    return [json.loads(line) for line in data.decode().split("\n")[:-1]]


def test_the_files_say_what_the_run_says(run: Path, tmp_path: Path, capsys):
    words = ["publish", str(run), "--member", MEMBER, "--dry-run", "--model-id", "tiny", "--json"]
    outs = []
    for name in ("a", "b"):
        assert main([*words, "--out", str(tmp_path / name)]) == 0
        outs.append(json.loads(capsys.readouterr().out))
    told = outs[0]
    for name in told["files"]:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    assert sorted(told["files"]) == sorted(
        str(p.relative_to(tmp_path / "a"))
        for p in (tmp_path / "a").rglob("*")
        if p.is_file() and p.name not in ("manifest.json", ".lock")
    )
    wanted, arrays = expected(run), arrays_of(run, MEMBER)
    assert (told["latents"], told["published"]) == (D_SAE, len(wanted))
    assert told["source"] == "1-wsae-plain"
    at = tmp_path / "a" / "export/tiny/1-wsae-plain"
    features = lines(at / "features/batch-0.jsonl.gz")
    assert [row["index"] for row in features] == [str(n) for n in sorted(wanted)]
    for row in features:
        assert row["frac_nonzero"] == arrays["density"][int(row["index"])]
        assert len(row["pos_str"]) == len(row["pos_values"]) == len(row["neg_str"]) == 10
        assert min(row["pos_values"]) > max(row["neg_values"])
        assert int(row["index"]) not in row["topkCosSimIndices"]
    found: dict[int, list[list[str]]] = {}
    for row in lines(at / "activations/batch-0.jsonl.gz"):
        found.setdefault(int(row["index"]), []).append(row["tokens"])
        assert row["maxValue"] == row["values"][row["maxValueTokenIndex"]] == max(row["values"])
        assert row["values"].index(row["maxValue"]) == row["qualifyingTokenIndex"]
    assert found == {n: [[tidy(t) for t in c] for c in cs] for n, cs in wanted.items()}
    said = {
        int(row["index"]): row["description"] for row in lines(at / "explanations/batch-0.jsonl.gz")
    }
    scored = latents_of(run, "interpretation", MEMBER)
    assert said == {n: tidy(e["explanation"]) for n, e in scored.items() if e.get("explanation")}
    skipped = json.loads((tmp_path / "a/dashboard/skipped_indexes.json").read_text())
    assert {*skipped["skipped_indexes"]} == {*range(D_SAE)} - {*wanted}
    home = str(run.parent)
    assert not any(
        home in (tmp_path / "a" / n).read_text(errors="replace")
        for n in told["files"]
        if n.endswith("json")
    )


def test_bars_keep_the_count_and_end_at_the_strongest():
    counts = [0] * 72
    counts[36], counts[37], counts[39] = 10, 20, 3  # 10^0.5, 10^0.625, 10^0.75, gap, 10^0.875, 10^1
    fired = FiringCounts(counts, peak=9.0)
    middles, heights = fired.bars()
    assert sum(heights) == pytest.approx(33, abs=0.05)
    width = middles[1] - middles[0]
    assert middles[0] - width / 2 == pytest.approx(10**0.5, rel=1e-3)
    assert middles[-1] + width / 2 == pytest.approx(9.0, rel=1e-3)
    in_gap = [h for m, h in zip(middles, heights, strict=True) if 5.8 < m < 7.3]
    assert in_gap
    assert not any(in_gap)
    found = [fired.interval(act, density=0.033) for act in (0.1, 2.0, 4.0, 6.0, 8.5, 9.0)]
    assert [(round(i.low, 6), round(i.high, 6)) for i in found] == [
        *((0.0, 1.8), (1.8, 3.6), (3.6, 5.4), (5.4, 7.2), (7.2, 9.0), (7.2, 9.0)),
    ]
    assert found[0].share == pytest.approx(1 - 0.033)  # silent there, as SAEDashboard counts
    assert sum(i.share for i in found[:5]) == pytest.approx(1)
    assert found[4].share == pytest.approx(0.003)
    assert FiringCounts([0] * 72, 1.0).bars() == ([], [])
    assert FiringCounts([0] * 72, 1.0).interval(0.5, 0.1) is None


def send(index: Index, site: Site, size: int = 5, patience: Patience = QUICK) -> Sent:
    """Send in batches of a few latents."""
    found = [x for batch in batches(latents(index, index.by_slug[MEMBER], {})) for x in batch]
    few = [found[i : i + size] for i in range(0, len(found), size)]
    with upload.site_at(site.url, patience) as at:
        return at.send(SOURCE, few, len(found))


def assert_once(site: Site, run: Path) -> None:
    """Every latent is there with each of its contexts once."""
    wanted = {n: [[tidy(t) for t in c] for c in cs] for n, cs in expected(run).items()}
    there = {n: [a["tokens"] for a in e["activations"]] for (_, n), e in site.latents.items()}
    assert there == wanted
    assert {source for source, _ in site.latents} == {SOURCE.id}


def test_whatever_goes_wrong_each_latent_arrives_once(index: Index, run: Path, site: Site):
    slow, html = Reply(delay=1.0), Reply("<html>", 200, {"content-type": "text/html"})
    faults = [
        Fault(error(429, "slow down", retry_after="0.02")),
        Fault(slow, done=True),  # carried out, but the answer comes too late
        Fault(error(500, "no")),
        Fault(Reply(close=True), done=True),
        Fault(None, done=True, cut=True),
        Fault(error(502, "no"), done=True),
        Fault(html),
        Fault(Reply('{"mess'), done=True),
    ]

    def faulty(_: str, n: int) -> Fault | None:
        return faults[n // 3 % len(faults)] if n % 3 == 1 else None

    site.faulty = faulty
    sent = send(index, site, size=2)
    assert len(site.paths) > 3 * len(faults)
    assert sent == Sent(new=len(expected(run)), there=0)
    assert_once(site, run)
    assert len(site.bodies) == -(-len(expected(run)) // 2)  # no batch was carried out twice
    assert send(index, site, size=2) == Sent(new=0, there=len(expected(run)))
    assert_once(site, run)


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_killed_upload_goes_on_where_it_stopped(index: Index, run: Path, site: Site):
    child: list[int] = []

    def faulty(path: str, _: int) -> Fault | None:
        if path.endswith("upload-batch") and len(site.bodies) == 2:
            os.kill(child[0], signal.SIGKILL)
            return Fault(Reply(close=True), done=True)  # carried out, and nobody hears of it
        return None

    site.faulty = faulty
    child.append(os.fork())
    if child[0] == 0:
        try:
            send(index, site, size=2, patience=Patience(timeout_s=60.0))
        finally:
            os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child[0], 0)[1]) == -signal.SIGKILL
    site.faulty = lambda *_: None
    sent = send(index, site, size=2)
    assert sent == Sent(new=len(expected(run)) - 6, there=6)
    assert_once(site, run)


def test_batches_that_begin_elsewhere_are_sent_where_they_lack_latents(
    index: Index, run: Path, site: Site
):
    assert send(index, site, size=2).there == 0
    assert not any(path.startswith("feature/tiny") for path in site.paths)  # a new set is empty
    numbers = sorted(expected(run))
    for gone in (numbers[1], numbers[-1]):  # an upload of other latents, or stopped within a batch
        del site.latents[SOURCE.id, gone]
    assert send(index, site, size=3) == Sent(new=2, there=len(numbers) - 2)
    assert_once(site, run)


def test_the_command_sends_it_all_and_a_refusal_is_one_line_without_the_key(
    run: Path, site: Site, capsys, monkeypatch
):
    words = ["publish", str(run), "--member", MEMBER, "--url", site.url]
    mine = ["--model-id", "tiny", "--set", "wsae-test"]
    assert main([*words, *mine]) == 0
    assert (
        f"{site.url}/tiny/1-wsae-test: {len(expected(run))} latents sent" in capsys.readouterr().out
    )
    assert_once(site, run)

    def refused(*more: str) -> str:
        assert main([*words, *more]) == 2
        err = capsys.readouterr().err.strip()
        assert KEY not in err
        assert "\n" not in err
        return err

    assert "model not found" in refused("--set", "wsae-test", "--model-id", "other").lower()
    site.layers = 1
    assert "1 sources and no '1-few'" in refused("--model-id", "tiny", "--set", "few")
    assert "--set 'A b'" in refused("--model-id", "tiny", "--set", "A b")
    site.latents[SOURCE.id, min(expected(run))]["activations"].pop()
    assert "with other contexts" in refused(*mine)
    moved = Reply("", 308, {"location": "https://www.example.org/api"})
    site.faulty = lambda *_: Fault(moved)
    assert "moved to https://www.example.org/api; give that address" in refused(*mine)
    site.faulty = lambda *_: None
    monkeypatch.setenv(upload.KEY, f"{KEY}0")
    assert "HTTP 401" in refused(*mine)
    monkeypatch.setenv(upload.KEY, "")
    assert upload.KEY in refused(*mine)
    words[-1] = "http://example.org"
    assert "in the clear" in refused(*mine)
    words[-1] = "example.org"
    assert "--url" in refused(*mine)


def test_a_site_that_stays_away_or_asks_for_hours_ends_it(index: Index, site: Site):
    site.faulty = lambda path, _: Fault(error(503, "no")) if "upload" in path else None
    with pytest.raises(UserError, match="HTTP 503, 4 times; 0 latents are there, the same command"):
        send(index, site)
    site.faulty = lambda path, _: (
        Fault(error(429, "no", retry_after="3600")) if "upload" in path else None
    )
    with pytest.raises(UserError, match="HTTP 429, asks to wait 3600 s"):
        send(index, site)
    assert not site.latents


def test_names_are_those_that_the_site_takes(run: Path):
    about = about_member(Run(run), HOOK, MEMBER)
    assert source_of(about, None, None)[:4] == ("tiny", "wsae-plain", 1, "blocks.1.hook_resid_post")
    named = about.model_copy(update={"member": "Var_a1.5"})
    assert source_of(named, "gemma-2-2b", None).id == "1-wsae-var-a1-5"
    for bad in ("a--b", "neurons", "-a", "a-", "9a", "é"):
        with pytest.raises(UserError, match="--set"):
            source_of(about, None, bad)
    with pytest.raises(UserError, match="--model-id"):
        source_of(about, "../x", None)
    with pytest.raises(UserError, match="lies in no block"):
        source_of(about.model_copy(update={"hook": "norm"}), None, None)


def test_long_explanations_fit_the_site_and_samples_say_what_they_stand_for(index: Index):
    latent = next(latents(index, index.by_slug[MEMBER], {}))
    sample = latent.windows[0]._replace(of=Interval(0.5, 1.0, 0.25))
    long = latent._replace(said=["é" * 511 + "😀" * 9], windows=[latent.windows[0], sample])
    (feature,) = neuronpedia.upload_body([long], SOURCE)["features"]
    assert [said["text"] for said in feature["explanations"]] == ["é" * 511]
    quantile = ("quantileMin", "quantileMax", "quantileFraction")
    assert [[a[n] for n in quantile] for a in feature["activations"]] == [
        *([None] * 3, [0.5, 1.0, 0.25]),
    ]
    strongest = [-1.0, latent.peak, -1.0]
    made = neuronpedia.dashboard(long, SOURCE, 9)["activations"]
    found = [[a[n] for n in ("bin_min", "bin_max", "bin_contains")] for a in made]
    assert found == [strongest, [0.5, 1.0, 0.25]]
    rows = neuronpedia.activation_rows(long, SOURCE)
    assert [[row[n] for n in ("binMin", "binMax", "binContains")] for row in rows] == found
    assert [len(batch) for batch in batches([latent] * (2 * PER_BATCH + 1))] == [128, 128, 1]
