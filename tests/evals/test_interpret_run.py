"""A whole run interpreted: planted latents score near 1, shuffled ones near 1/2, and a killed run ends alike."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from interpret_world import CFG, D_IN, HOOK, TOPICS, BagEncoder, KeywordLlm, Text, write_planted_run

from wsae.acts.source import MatrixRows
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError
from wsae.core.files import read_json
from wsae.evals.config import InterpretConfig
from wsae.evals.glossary import SCORES, glossary
from wsae.evals.interpret.run import interpret_run, plan_run
from wsae.evals.interpret.scoring import selected, survey_hooks
from wsae.evals.interpret.summary import (
    METRIC,
    agreement,
    rank_correlation,
    spearman,
)
from wsae.evals.run import run_subject
from wsae.report.html import write_report

CONTROLS = ("random_sae", "neurons", "pca", "shuffled")
FULL = CFG.model_copy(update={"controls": CONTROLS})


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted_run(tmp_path_factory.mktemp("interpret") / "run")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> Path:
    return shutil.copytree(base, tmp_path / "run")


@pytest.fixture(scope="module")
def done(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    run = shutil.copytree(base, tmp_path_factory.mktemp("done") / "run")
    return run, interpret_run(run, Text(), FULL, encoder=BagEncoder())


def planted(member: str) -> set[int]:
    return set(range(TOPICS)) if member == "plain" else {(j - 1) % D_IN for j in range(TOPICS)}


def test_planted_latents_score_near_one_and_shuffled_ones_near_a_half(done) -> None:
    found = done[1]["hooks"][HOOK]
    for name, member in found["members"].items():
        scores = {row["latent"]: row["scores"]["embedding"] for row in member["latents"]}
        known = [scores[j] for j in scores if j in planted(name)]
        assert len(known) >= 5
        assert np.mean(known) > 0.9
        noise = [scores[j] for j in scores if j not in planted(name)]
        assert abs(np.mean(noise) - 0.5) < 0.15, "what does not show in the text cannot be told"
    shuffled = found["controls"]["control-shuffled"]["summary"]["embedding"]["value"]
    assert abs(shuffled - 0.5) < 0.1
    neurons = found["controls"]["control-neurons"]
    topical = [r["scores"]["embedding"] for r in neurons["latents"] if r["latent"] < TOPICS]
    assert np.mean(topical) > 0.85, "here the neurons are the topics"


def test_means_are_over_the_sample_and_counts_add_up(done) -> None:
    for member in done[1]["hooks"][HOOK]["members"].values():
        counts, summary = member["counts"], member["summary"]["embedding"]
        assert counts["sampled"] == counts["scored"] + sum(counts["skipped"].values()) == 12
        assert counts["silent"] == 2
        values = [row["scores"]["embedding"] for row in member["latents"]]
        assert summary["n"] == len(values) == counts["scored"]
        assert summary["value"] == pytest.approx(np.mean(values))
        assert summary["low"] < summary["value"] < summary["high"]
        rows = [row["details"]["embedding"] for row in member["latents"]]
        rates = [
            sum(r[hit] for r in rows) / sum(r[hit] + r[miss] for r in rows)
            for hit, miss in (("tp", "fn"), ("tn", "fp"))
        ]
        pooled = summary["pooled"]["balanced_accuracy"]["value"]
        assert pooled == pytest.approx(np.mean(rates))
        densities = sorted(row["density"] for row in member["latents"])
        assert member["density"]["0.5"] == pytest.approx(np.median(densities))


def test_the_twin_is_compared_over_pairs_that_point_the_same_way(done) -> None:
    found = done[1]["hooks"][HOOK]
    lines = {line["over"]: line for line in found["comparisons"] if line["b"] == "plain"}
    assert set(lines) == {"matched", "all", "density", "adjusted"}
    weighted, plain = (found["members"][name] for name in ("variance-a1", "plain"))
    of = {r["latent"]: r["scores"]["embedding"] for r in plain["latents"] + plain["partners"]}
    pairs = [(r["scores"]["embedding"], (r["latent"] + 1) % D_IN) for r in weighted["latents"]]
    assert lines["matched"]["n"] == len(pairs), "each partner was collected too"
    assert lines["matched"]["paired"]
    wanted = np.mean([value - of[partner] for value, partner in pairs])
    assert lines["matched"]["difference"] == pytest.approx(wanted, abs=1e-12)
    gap = weighted["summary"]["embedding"]["value"] - plain["summary"]["embedding"]["value"]
    assert lines["all"]["difference"] == pytest.approx(gap)
    controls = {(x["a"], x["b"]) for x in found["comparisons"] if x["over"] == "control"}
    assert len(controls) == 2 * len(CONTROLS)


def test_the_directory_is_whole_and_its_contexts_carry_the_scores(done) -> None:
    run, record = done
    manifest = read_manifest(run / "interpretation", "interpretation")
    assert manifest.config == FULL.to_dict()
    assert set(manifest.files) == {"interpretation.json", "contexts.json"}
    assert read_json(run / "interpretation" / "interpretation.json") == record
    contexts = read_json(run / "interpretation" / "contexts.json")[HOOK]
    assert set(contexts) == {"plain", "variance-a1"}
    scores = {
        row["latent"]: row["scores"]
        for row in record["hooks"][HOOK]["members"]["variance-a1"]["latents"]
    }
    for entry in contexts["variance-a1"]:
        assert entry["scores"] == scores[entry["latent"]]
        assert entry["match"]["latent"] == (entry["latent"] + 1) % D_IN
        for context in entry["contexts"]:
            assert context["acts"][context["peak"]] == max(context["acts"]) > 0
            assert len(context["tokens"]) == len(context["acts"]) == CFG.contexts.width
        if entry["latent"] in planted("variance-a1"):
            topic = (entry["latent"] + 1) % D_IN
            assert all(token.startswith(f" t{topic}w") for token in entry["tokens"])


def test_nothing_changed_means_nothing_done_until_forced(run) -> None:
    first = interpret_run(run, Text(), CFG, encoder=BagEncoder())
    source, encoder = Text(), BagEncoder()
    assert interpret_run(run, source, CFG, encoder=encoder) == first
    assert encoder.calls == 0
    assert source.passes == 1, "one pass to name data that have no digest of their own"
    source = Text()
    assert interpret_run(run, source, CFG, force=True, encoder=encoder) == first
    assert encoder.calls > 0
    other = interpret_run(run, Text(seed=1), CFG, encoder=BagEncoder())
    assert other != first, "other data are another interpretation"


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 3, 5])
def test_a_killed_run_scores_nothing_twice_and_ends_with_the_same_bytes(at, run, done) -> None:
    class Mortal(BagEncoder):
        def encode(self, texts, *rest):
            if self.calls == at - 1:
                raise Killed
            return super().encode(texts, *rest)

    with pytest.raises(Killed):
        interpret_run(run, Text(), FULL, encoder=Mortal())
    assert not (run / "interpretation" / MANIFEST).exists()
    kept = len(list((run / "interpretation" / "parts").glob("*.json")))
    assert kept == at - 1
    again = BagEncoder()
    assert interpret_run(run, Text(), FULL, encoder=again) == done[1]
    for name in ("interpretation.json", "contexts.json", MANIFEST):
        wanted = (done[0] / "interpretation" / name).read_bytes()
        assert (run / "interpretation" / name).read_bytes() == wanted


def test_another_score_keeps_the_parts_that_are_there(run) -> None:
    interpret_run(run, Text(), CFG, encoder=BagEncoder())
    names = sorted(path.stem[:16] for path in (run / "interpretation" / "parts").glob("*.json"))
    assert names == ["47c0f62472ed8eb1", "edeb28a109045d79"], (
        "other names would score old runs anew"
    )
    encoder = BagEncoder()
    both = CFG.model_copy(update={"scores": ("embedding", "detection")})
    record = interpret_run(run, Text(), both, encoder=encoder, llm=KeywordLlm())
    assert encoder.calls == 0
    assert set(record["judges"]) == {"embedding", "detection"}


ASKED = CFG.model_copy(
    update={
        "scores": ("detection", "fuzzing"),
        "controls": ("shuffled",),
        "contexts": CFG.contexts.model_copy(update={"n_latents": 6}),
    }
)


def test_a_language_model_s_explanations_judge_latents_and_every_request_is_counted(run) -> None:
    record = interpret_run(run, Text(), ASKED, llm=KeywordLlm(unparsable=2))
    found = record["hooks"][HOOK]
    for name, member in found["members"].items():
        for score in ("detection", "fuzzing"):
            part = member["summary"][score]
            assert part["requested"] == part["parsed"] + part["failed"] + part["not_asked"]
        known = [r for r in member["latents"] if r["latent"] in planted(name) and r["explanation"]]
        assert known
        for row in known:
            topic = row["latent"] if name == "plain" else (row["latent"] + 1) % D_IN
            assert set(row["explanation"].split()) <= {f"t{topic}w{i}" for i in range(6)}
            assert row["scores"]["detection"] > 0.9
    plain = found["members"]["plain"]
    assert plain["summary"]["detection"]["explanations_failed"] == 2
    lost = [r for r in plain["latents"] + plain["partners"] if r["explanation"] is None]
    assert len(lost) == 2
    assert all(row["scores"]["detection"] is None for row in lost), "a failure is no score"
    assert plain["summary"]["detection"]["not_asked"] > 0
    shuffled = found["controls"]["control-shuffled"]["summary"]["detection"]["value"]
    assert shuffled < 0.75


def test_a_run_stopped_by_its_budget_is_unfinished_and_goes_on(run) -> None:
    record = interpret_run(run, Text(), ASKED, llm=KeywordLlm(stop_after=10))
    summary = record["hooks"][HOOK]["members"]["plain"]["summary"]["detection"]
    assert summary["reasons"].get("budget", 0) > 0
    assert read_manifest(run / "interpretation", "interpretation").info["unfinished"]
    whole = interpret_run(run, Text(), ASKED, llm=KeywordLlm())
    assert whole["hooks"][HOOK]["members"]["plain"]["summary"]["detection"]["not_asked"] == 0
    llm = KeywordLlm()
    assert interpret_run(run, Text(), ASKED, llm=llm) == whole
    assert llm.asked == 0


def test_simulation_correlates_what_the_explanation_predicts(run) -> None:
    alone = {"scores": ("simulation",), "members": ("plain",), "fragment_tokens": 16}
    cfg = ASKED.model_copy(update=alone)
    record = interpret_run(run, Text(), cfg, llm=KeywordLlm())
    found = record["hooks"][HOOK]
    plain = found["members"]["plain"]
    known = [r["scores"]["simulation"] for r in plain["latents"] if r["latent"] in planted("plain")]
    assert np.mean(known) > 0.9
    assert found["controls"]["control-shuffled"]["summary"]["simulation"]["value"] < 0.3


def test_a_plan_counts_the_requests_that_the_run_then_makes(run) -> None:
    planned = plan_run(run, Text(), ASKED, llm=KeywordLlm())
    assert not (run / "interpretation" / MANIFEST).exists()
    llm = KeywordLlm()
    record = interpret_run(run, Text(), ASKED, llm=llm)
    total = sum(part.requests for part in planned.values())
    entries = [e for kind in ("members", "controls") for e in record["hooks"][HOOK][kind].values()]
    asked = sum(e["summary"][s]["requested"] for e in entries for s in ASKED.scores)
    explained = sum(e["summary"]["detection"]["explanations_requested"] for e in entries)
    assert set(planned) == {"explanation", "detection", "fuzzing"}
    assert total <= asked + explained == llm.asked, "the same request is planned once"
    assert planned["detection"].prompt_tokens > 0


def test_agreement_is_a_rank_correlation_over_the_latents_that_have_both(run) -> None:
    cfg = CFG.model_copy(update={"scores": ("embedding", "detection")})
    record = interpret_run(run, Text(), cfg, encoder=BagEncoder(), llm=KeywordLlm())
    line = next(one for one in agreement(record, cfg) if one["score"] == "embedding")
    members = record["hooks"][HOOK]["members"].values()
    both = [
        (r["scores"]["embedding"], r["scores"]["detection"]) for m in members for r in m["latents"]
    ]
    assert line["n"] == len(both)
    assert line["low"] <= line["value"] <= line["high"]
    assert line["value"] == pytest.approx(by_hand(both))
    assert line["value"] > 0.5


def by_hand(pairs: list[tuple[float, float]]) -> float:
    def ranks(values: list[float]) -> np.ndarray:
        return np.array([sum(v < w for v in values) + (values.count(w) + 1) / 2 for w in values])

    return float(np.corrcoef(*(ranks([p[i] for p in pairs]) for i in (0, 1)))[0, 1])


def test_rank_correlation_of_too_few_or_constant_values_is_none() -> None:
    assert spearman(np.array([[1.0, 2.0], [2.0, 3.0]])) is None
    assert rank_correlation(np.ones((5, 2)), CFG).value is None
    rising = np.stack([np.arange(9.0), np.arange(9.0) ** 3], axis=1)
    assert rank_correlation(rising, CFG) == (1.0, 1.0, 1.0)


def test_hooks_and_members_can_be_chosen_and_a_weighted_one_brings_its_twin(run) -> None:
    families = run_subject(run)
    chosen = selected(families, InterpretConfig(members=("variance-a1",)))
    assert set(chosen[HOOK].saes) == {"variance-a1", "plain"}
    alone = selected(families, InterpretConfig(members=("plain",)))
    assert set(alone[HOOK].saes) == {"plain"}
    assert alone[HOOK].twins == {}
    for bad in (InterpretConfig(hooks=("layers.7",)), InterpretConfig(members=("x",))):
        with pytest.raises(UserError, match="the run has"):
            selected(families, bad)


def test_the_sample_is_alike_from_run_to_run_and_never_dead(run) -> None:
    families = run_subject(run)
    first, again = (survey_hooks(Text(), families, CFG)[HOOK] for _ in range(2))
    assert first.sample == again.sample
    for sample in first.sample.values():
        assert len(set(sample)) == 12
        assert max(sample) < D_IN
    partners = first.partners("variance-a1")
    assert partners == {j: (j + 1) % D_IN for j in first.sample["variance-a1"]}
    collected = first.latents()["plain"].tolist()
    assert set(collected) == set(first.sample["plain"]) | set(partners.values())


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (("surprisal",), "score surprisal: needs the one model"),
        (("detection",), "score detection: asks"),
    ],
)
def test_a_score_without_its_judge_is_refused_before_anything_is_done(scores, says, run) -> None:
    with pytest.raises(UserError, match=says):
        interpret_run(run, Text(), CFG.model_copy(update={"scores": scores}))
    assert not (run / "interpretation").exists()


def test_an_array_has_no_text_and_nothing_is_left_behind(run) -> None:
    rows = MatrixRows(torch.randn(50, D_IN), HOOK)
    with pytest.raises(UserError, match="no text"):
        interpret_run(run, rows)  # before the model that the scores lack
    assert not (run / "interpretation" / MANIFEST).exists()


def test_every_score_has_its_metric_and_the_docs_its_formula() -> None:
    assert set(METRIC) == set(SCORES)
    text = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text().replace("\\|", "|")
    for key, entry in glossary(SCORES).items():
        row = (entry["name"], f"`{key}`", entry["formula"], entry["direction"])
        assert f"| {' | '.join(row)} |" in text, key


def test_the_report_shows_the_scores_of_an_interpreted_run(done, tmp_path) -> None:
    text = write_report(done[0], tmp_path / "r.html").read_text()
    assert "Are the latents interpretable?" in text
    assert "control-shuffled" in text
    assert "each judged by the explaining windows of another" in text
    assert json.dumps("Embedding detection") in text
