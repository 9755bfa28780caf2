"""Tables 1-3 and the wider study: the paper's numbers, the plans, the tiny preset end to end, the analysis."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from halting import HaltingProgress
from interpret_server import config, said, serving
from scipy import stats

from wsae.acts.harvest import harvest
from wsae.cli.harvest import Flags as HarvestFlags
from wsae.cli.live import is_data
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.core.progress import quiet
from wsae.studies.reproduce_config import (
    HARVESTS,
    STAGES,
    TABLE_SAES,
    StudyConfig,
    TableChoices,
    TableSAEs,
    all_rules,
    study_config,
    table_plan,
)
from wsae.studies.tables import (
    BagEncoder,
    TableStudy,
    analysis,
    announce,
    refuse_or_estimate,
    tiny_model,
)
from wsae.studies.tables_analysis import Point, at_fvu, bracket
from wsae.theory.record import HALF, ONE, PAPER, PLAIN

HERE = Path("somewhere")


def small(name: str = "table1", **choices: object) -> StudyConfig:
    return study_config(name, "small", HERE, TableChoices.parse(choices))


# --- the paper -------------------------------------------------------------------------------------------


def test_the_papers_gains_are_those_it_prints() -> None:
    printed = {
        HALF: [0.7, 3.5, -0.3, 0.1, 0.8, 0.1, 0.5, -0.4, 4.0, 3.7, 4.5, 0.1],
        ONE: [2.5, 4.8, 4.6, 6.8, 5.4, 3.8, 4.6, 1.8, 6.9, 2.0, 0.8, 1.0],
    }
    assert {method: PAPER["table1"].gains(method) for method in printed} == printed
    assert np.mean(printed[ONE]) == pytest.approx(3.75)  # the paper says 3.8
    assert np.mean(printed[HALF]) == pytest.approx(1.4417, abs=1e-4)
    assert PAPER["table2"].gains(ONE) == [2.5, 1.9, 2.7]
    assert PAPER["table3"].gains(ONE) == [22.0]
    shown = analysis.paper_table("table1")
    assert shown["rows"][-1][-1].startswith("+3.8 [")
    assert len(shown["header"]) == 14
    assert {len(row) for row in shown["rows"]} == {14}


def test_larger_gains_at_better_layers_hold_for_one_alpha_only() -> None:
    """The paper says so of Table 1; by rank, alpha 0.5 gains most where the plain SAE is worst."""
    table = PAPER["table1"]
    rho = {m: analysis.by_baseline(table.scores[PLAIN], table.gains(m)) for m in (HALF, ONE)}
    for method, value in rho.items():
        assert value == pytest.approx(
            stats.spearmanr(table.scores[PLAIN], table.gains(method)).statistic
        )
    assert rho[ONE] is not None
    assert rho[HALF] is not None
    assert rho[ONE] > 0.3
    assert rho[HALF] < -0.3


# --- plans -----------------------------------------------------------------------------------------------


def labels(members) -> list[str]:
    return [member.label for member in members]


def test_a_table_has_the_papers_members_the_outlier_controls_and_the_curve() -> None:
    plan = small("table1").plan
    assert plan.hooks == tuple(f"layers.{i}" for i in (4, 9, 14, 19, 24, 29))
    assert {tuple(labels(run.members)) for run in plan.runs} == {
        (
            *("plain", "variance-a0.5", "variance-a1", "variance-a0-drop", "variance-a1-drop"),
            *("plain-k16", "plain-lr0.0005", "plain-lr0.0001"),
        )
    }
    group = small("table2").plan
    assert group.hooks == ("layers.19", "layers.24", "layers.29")
    assert {m.activation.kind for run in group.runs for m in run.members} == {"group_topk"}
    assert small("table3").plan.hooks == ("layers.29",)


def test_the_wider_study_has_all_rules_at_one_hook_and_seeds_at_two() -> None:
    plan = small("language").plan
    at = {(run.hook, run.seed): labels(run.members) for run in plan.runs}
    assert sorted(seed for hook, seed in at if hook == "layers.9") == [0, 1, 2]
    assert sorted(seed for hook, seed in at if hook == "layers.19") == [0, 1, 2]
    assert len(at) == 6 + 2 + 2
    for (_, seed), names in at.items():
        assert {"plain", "variance-a0.5", "variance-a1"} <= set(names)
        assert len(set(names)) == len(names)
        if seed == 0:
            tamed = {f"variance-a1-{robust}" for robust in ("winsor", "rank", "drop")}
            group = {"plain-group", "variance-a0.5-group", "variance-a1-group"}
            assert tamed | group | {"variance-a0-drop"} <= set(names)
    curved = [hook for (hook, seed), names in at.items() if "plain-k16" in names]
    assert {"layers.9", "layers.19"} <= set(curved)  # where the seeds are, for their matched FVU
    everywhere = set(at["layers.9", 0])
    assert {g.label for g in all_rules()} <= everywhere
    rules = {"latent-variance-a0.5", "latent-variance-a1", "gap-a1", "whiten-a1"}
    powers = {f"variance-a{a:g}" for a in (-1, -0.5, 0.5, 1, 2)}
    powers |= {f"variance-a{a:g}-{r}" for a in (0.5, 1, 2) for r in ("winsor", "rank")}
    assert rules | powers <= everywhere
    assert not (rules & set(at["layers.14", 0]))


def test_group_members_of_the_curve_divide_the_width() -> None:
    sae = TableSAEs(expansion=8, k=32, curve_k=(24, 16))
    plan = table_plan("table2", sae, ("h",))
    ks = [getattr(member.activation, "k", 0) for member in plan.runs[0].members]
    assert 24 not in ks
    assert 16 in ks
    for member in plan.runs[0].members:
        member.sae_config(576)  # raises where k does not divide d_sae


def test_the_small_harvest_is_the_documented_command() -> None:
    hooks = tuple(f"layers.{i}" for i in (4, 9, 14, 19, 24, 29))
    flags = HarvestFlags(
        model="builtin",
        out=Path("STORE"),
        store={"tokens": 1_048_576, "dtype": "bfloat16", "store_dtype": "float16"},
        live={"text": "some.jsonl", "hook": hooks, "heldout_tokens": 262_144},
    )
    made = flags.live.config(flags.model, seed=0, device="cpu", **dict(flags.store))
    assert small(text="some.jsonl").harvest == made
    assert small().harvest.text.path == "builtin"


def test_every_preset_gives_a_valid_study_and_the_papers_sizes() -> None:
    paper = study_config("table1", "paper", HERE, TableChoices())
    assert len(paper.plan.runs) == 12
    assert paper.live is not None
    member = paper.plan.runs[0].members[0]
    assert (member.expansion, member.activation.k) == (32, 32)
    for d_in in (768, 4096):
        for name in ("table1", "table2", "table3"):
            for run in study_config(name, "paper", HERE, TableChoices()).plan.runs:
                for member in run.members:
                    assert member.sae_config(d_in).d_sae == 32 * d_in
    assert study_config("table3", "paper", HERE, TableChoices()).harvest.model.startswith(
        "meta-llama"
    )
    assert "hooks: 12" in announce(paper)
    assert set(TABLE_SAES) == set(HARVESTS) == {"tiny", "small", "paper"}


def test_a_study_goes_by_hook_so_that_memory_does_not_grow_with_hooks(tmp_path) -> None:
    study = TableStudy(small("language"), tmp_path)
    assert [run.hooks for run in study.runs()] == [(run.hook,) for run in study.cfg.plan.runs]
    assert len({run.path for run in study.runs()}) == len(study.runs())
    live = TableStudy(study_config("table1", "paper", HERE, TableChoices()), tmp_path)
    assert [run.hooks for run in live.runs()] == [tuple(f"layers.{i}" for i in range(12))]


# --- the analysis ----------------------------------------------------------------------------------------


def test_the_plain_score_is_read_at_the_weighted_fvu_by_hand() -> None:
    low, high = np.array([0.9, 0.7]), np.array([0.6, 0.4])
    curve = [Point(0.3, high, "poor"), Point(0.1, low, "good")]
    member = Point(0.15, np.array([0.9, 0.8]), "weighted")
    found = at_fvu(member, curve, 500, 0.95, 0)
    # t = 0.25: plain at 0.15 is 0.75 * 0.8 + 0.25 * 0.5 = 0.725
    assert found.difference == pytest.approx(0.85 - 0.725)
    assert found.share == pytest.approx(0.25)
    assert found.between == ("good", "poor")
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.difference <= found.high
    assert at_fvu(Point(0.31, low, "worse than all"), curve, 10, 0.95, 0).difference is None
    assert at_fvu(Point(0.05, low, "better than all"), curve, 10, 0.95, 0).difference is None
    assert bracket(curve, 0.3) is not None


def test_the_matched_interval_covers_the_truth() -> None:
    rng = np.random.default_rng(1)
    hits = 0
    for trial in range(200):
        a, b, w = (rng.normal(mean, 0.1, 60) for mean in (0.8, 0.6, 0.75))
        curve = [Point(0.1, a, "a"), Point(0.2, b, "b")]
        found = at_fvu(Point(0.15, w, "w"), curve, 400, 0.95, trial)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 0.05 <= found.high
    assert 180 <= hits <= 198


def row(hook: str, seed: int, member: str, difference: float | None, **fields: object) -> dict:
    ways = {"all": {"difference": difference, "low": None, "high": None, "n": 5}}
    return {
        "hook": hook,
        "seed": seed,
        "member": member,
        "differences": {"embedding": ways},
        **fields,
    }


def test_seeds_are_pooled_by_students_t_and_hooks_are_the_units_of_the_mean() -> None:
    rows = [row("a", s, "w", d) for s, d in enumerate((0.01, 0.02, 0.06))]
    rows.append(row("b", 0, "w", 0.05))
    lines = analysis.over_seeds(rows)
    by_hook = {line["hook"]: line for line in lines}
    assert by_hook["a"]["difference"] == pytest.approx(0.03)
    half = stats.t.ppf(0.975, 2) * np.std([0.01, 0.02, 0.06], ddof=1) / np.sqrt(3)
    assert by_hook["a"]["high"] == pytest.approx(0.03 + half)
    assert (by_hook["a"]["seeds"], by_hook["b"]["seeds"]) == (3, 1)
    (mean,) = analysis.over_hooks(lines, 2)
    assert mean["difference"] == pytest.approx(0.04)
    assert mean["positive"] == 2
    assert mean["hooks"] == 2
    shown = analysis.gain_table(lines, [mean], ("a", "b", "c"), "embedding")["rows"]
    assert shown[0][-1].endswith("(2 of 3 hooks)")  # a hook left out is said
    assert shown[0][-2] == analysis.NONE
    assert analysis.over_hooks(lines[:1], 3) == []  # one hook is no mean over hooks


def test_a_seed_without_the_difference_leaves_the_hook_out() -> None:
    assert analysis.over_seeds([row("a", 0, "w", 0.1), row("a", 1, "w", None)]) == []


def test_matched_fvu_uses_plain_members_of_the_same_hook_and_the_first_seeds_curve() -> None:
    sae = TableSAEs(k=32, lr=1e-3)

    def member(seed: int, name: str, rule: str, fvu: float, score: float, **f: object) -> dict:
        latents = [{"latent": i, "density": 0.1, "scores": {"embedding": score}} for i in range(4)]
        about = {"rule": rule, "activation": "topk", "k": 32, "lr": 1e-3, **f}
        found = {
            "metrics": {"fvu": {"value": fvu}},
            "scores": {"embedding": {}},
            "latents": latents,
        }
        return row("a", seed, name, 0.0, **about, **found)

    rows = [
        member(0, "plain", "none", 0.1, 0.8),
        member(0, "plain-k8", "none", 0.3, 0.6, k=8),
        member(0, "plain-lr", "none", 0.2, 0.5, lr=1e-5),
        member(0, "w", "variance", 0.2, 0.9),
        member(1, "plain", "none", 0.15, 0.5),
        member(1, "w", "variance", 0.15, 0.9),
        {**member(0, "plain", "none", 0.2, 0.0), "hook": "b"},
    ]
    analysis.add_matched_fvu(rows, sae, small().interpret)
    found = rows[3]["differences"]["embedding"]
    assert found[analysis.FEWER]["difference"] == pytest.approx(0.9 - 0.7)
    assert found[analysis.SLOWER]["difference"] == pytest.approx(0.9 - 0.5)
    assert set(rows[0]["differences"]["embedding"]) == {"all"}
    again = rows[5]["differences"]["embedding"][analysis.FEWER]
    assert again["difference"] == pytest.approx(
        0.9 - 0.5
    )  # its own plain SAE, not the first seed's
    assert again["between"] == ("plain", "plain-k8")


# --- end to end ------------------------------------------------------------------------------------------


def run(capsys, *words: str) -> tuple[int, str, str]:
    code = main(["reproduce", *words])
    out, err = capsys.readouterr()
    return code, out, err


def test_a_killed_study_goes_on_and_ends_as_an_unbroken_one(tmp_path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    choices = TableChoices(until="evaluate")
    configs = {p: study_config("table2", "tiny", p, choices) for p in (whole, broken)}
    TableStudy(configs[whole], whole / "table2", choices=choices).run()
    with pytest.raises(KeyboardInterrupt):
        TableStudy(
            configs[broken], broken / "table2", choices=choices, progress=HaltingProgress()
        ).run()
    kept = broken / "table2/runs/layers.0/seed-0/manifest.json"
    stamp = kept.stat().st_mtime_ns
    said: list[str] = []
    TableStudy(configs[broken], broken / "table2", choices=choices, say=said.append).run()
    assert [line.split(":")[0] for line in said] == [
        "train 2 of 2",
        "evaluate 1 of 2",
        "evaluate 2 of 2",
    ]
    assert kept.stat().st_mtime_ns == stamp
    for path in sorted((whole / "table2").rglob("sae.safetensors")):
        twin = broken / "table2" / path.relative_to(whole / "table2")
        assert path.read_bytes() == twin.read_bytes(), path
    again: list[str] = []
    TableStudy(configs[broken], broken / "table2", choices=choices, say=again.append).run()
    assert again == []


def test_a_finished_study_is_of_its_data_and_its_judge(tmp_path) -> None:
    def study(until: Any, say=lambda _: None, **choices: Any) -> TableStudy:
        given = TableChoices(until=until, controls=(), hooks=("layers.0",), **choices)
        cfg = study_config("table2", "tiny", tmp_path, given)
        return TableStudy(cfg, tmp_path / "table2", choices=given, say=say)

    with serving(lambda _body, _before: said("no explanation")) as chat:

        def judged(name: str) -> list[str]:
            told: list[str] = []
            judge = config(chat, tmp_path / "answers").model_copy(update={"model": name})
            study("interpret", told.append, scores=("detection",), judge=judge).run()
            return told

        assert judged("one") == [f"{stage} 1 of 1: layers.0, seed 0" for stage in STAGES[1:]]
        assert judged("one") == []
        assert judged("another") == ["interpret 1 of 1: layers.0, seed 0"]
    first = study("train")
    other = first.cfg.harvest.model_copy(update={"seed": 1})
    harvest(other, tmp_path / "other")
    with pytest.raises(UserError, match="holds a run of another config .data is"):
        study("train", store=tmp_path / "other").run()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("figure2", "--store", "x"), "figure2: takes no --model"),
        (("table1", "--endpoint", "http://localhost"), "--endpoint and --judge go together"),
        (("language", "--preset", "paper"), "has the presets tiny and small"),
        (("table1", "--hook", "layers.*"), "name them one by one"),
        (("table1", "--store", "nowhere"), "nowhere: no such directory"),
        (("table1", "--preset", "paper"), "the hub is not reachable and EleutherAI/pythia-160m"),
        (("table3", "--preset", "paper"), "the hub is not reachable and meta-llama"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(capsys, tmp_path, words, says) -> None:
    code, out, err = run(capsys, *words, "--out", str(tmp_path))
    assert code == 2
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert last.startswith("wsae: error: ")
    assert says in last
    assert not list(tmp_path.rglob("runs"))


def test_the_tiny_table_goes_from_a_model_to_figures(capsys, tmp_path) -> None:
    place = ("--preset", "tiny", "--out", str(tmp_path))
    code, out, err = run(capsys, "table1", *place, "--json")
    assert code == 0, err
    found = json.loads(out)
    rows = json.loads((tmp_path / "tiny/table1/rows.json").read_text())
    controls = {row["member"] for row in rows if row["rule"] == "control"}
    assert controls == {"control-random", "control-neurons", "control-pca", "control-shuffled"}
    assert len(rows) == 2 * (7 + len(controls))
    for row in rows:
        if row["rule"] != "control":
            assert 0 < row["metrics"]["fvu"]["value"] < 1.5
            assert len(row["latents"]) == row["counts"]["scored"] > 5
            mean = np.mean([latent["scores"]["embedding"] for latent in row["latents"]])
            assert row["scores"]["embedding"]["value"] == pytest.approx(mean)
    weighted = next(row for row in rows if row["member"] == "variance-a1")
    assert set(weighted["differences"]["embedding"]) == set(analysis.WAYS)
    plain = next(row for row in rows if row["member"] == "plain")
    whole = weighted["differences"]["embedding"]["all"]
    gap = weighted["scores"]["embedding"]["value"] - plain["scores"]["embedding"]["value"]
    assert whole["difference"] == pytest.approx(gap)
    assert {line["member"] for line in found["means"]} == {
        *("variance-a0.5", "variance-a1", "variance-a0-drop", "variance-a1-drop"),
    }
    assert found["tables"]["embedding: score in % [95 % interval over latents]"]["rows"]
    latents = found["tables"]["latents scored, of those sampled; pairs with the plain twin"]
    told = {line[0]: line[1] for line in latents["rows"]}  # the first hook
    counts, pairs = weighted["counts"], weighted["matching"]
    assert told["variance-a1"].startswith(f"{counts['scored']} of {counts['sampled']}")
    assert sum(counts["skipped"].values()) == counts["sampled"] - counts["scored"]
    assert f"cosine {pairs['decoder_cosine_mean']:.2f} (chance " in told["variance-a1"]
    assert "cosine" not in told["plain"]
    markdown = (tmp_path / "tiny/table1/tables.md").read_text()
    assert markdown == found["markdown"]
    assert "| weighted SAE, alpha 1 | 77.2 |" in markdown
    for name in ("score-by-layer", "score-against-fvu-embedding"):
        assert (tmp_path / f"tiny/table1/{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (tmp_path / f"tiny/table1/{name}.svg").read_text()


def live_study(model: Path, expansion: int) -> StudyConfig:
    """The preset paper's way, straight from the model, at a tiny size."""
    choices = TableChoices(model=str(model), text="builtin", hooks=("layers.0", "layers.1"))
    data = study_config("table3", "paper", HERE, choices).to_dict()
    sae = TableSAEs(expansion=expansion, k=8, lr=3e-3, curve_lr=(1e-4,))
    data["plan"] = table_plan("table3", sae, choices.hooks).to_dict()
    data["harvest"] |= {"tokens": 2048, "heldout_tokens": 512, "batch_seqs": 4, "dtype": "float32"}
    data["live"] = {"shuffle_tokens": 1024, "stats_tokens": 1024}
    return StudyConfig.parse(data | {"tokens": 2048, "batch_size": 256})


def test_a_live_study_is_estimated_first_and_trains_all_hooks_in_one_pass(tmp_path) -> None:
    model = tiny_model(tmp_path / "model")
    cfg, said = live_study(model, 8), []
    refuse_or_estimate(cfg, tmp_path / "out", quiet, said.append)
    assert [line.split(":")[0] for line in said] == ["memory", "time", "disk"]
    study = TableStudy(cfg, tmp_path / "out", choices=TableChoices(until="evaluate"))
    (run,) = study.run()
    rows = study.rows(run)
    assert {row["hook"] for row in rows} == {"layers.0", "layers.1"}
    assert all(0 < row["metrics"]["fvu"]["value"] < 2 for row in rows)
    again: list[str] = []
    refuse_or_estimate(cfg, tmp_path / "out", quiet, again.append)
    assert again == []  # under way


def test_a_live_study_that_does_not_fit_in_memory_is_refused(tmp_path) -> None:
    model = tiny_model(tmp_path / "model")
    with pytest.raises(UserError, match=r"table3: memory: .* free"):
        refuse_or_estimate(live_study(model, 20_000_000), tmp_path, quiet, lambda _: None)


def test_the_tiny_model_is_made_once_and_made_whole(tmp_path) -> None:
    place = tiny_model(tmp_path / "model")
    stamp = (place / "model.safetensors").stat().st_mtime_ns
    assert tiny_model(place) == place
    assert (place / "model.safetensors").stat().st_mtime_ns == stamp
    (place / "manifest.json").unlink()  # killed before the end
    tiny_model(place)
    assert (place / "manifest.json").exists()
    assert not is_data(str(place))  # though it has a manifest


def test_a_study_may_end_with_its_harvest(tmp_path, capsys) -> None:
    words = ["table2", "--preset", "tiny", "--hook", "layers.0", "--until", "harvest"]
    code, out, err = run(capsys, *words, "--out", str(tmp_path))
    assert code == 0, err
    assert (tmp_path / "tiny" / "store" / "manifest.json").exists()
    assert "table2.json" in out


def test_the_bag_encoder_gives_unit_vectors_and_nan_for_no_text() -> None:
    rows = BagEncoder().encode(["the cat", "the cat sat", "quite other words", ""])
    assert np.linalg.norm(rows[:3], axis=1) == pytest.approx(np.ones(3), abs=1e-6)
    assert np.isnan(rows[3]).all()
    assert rows[0] @ rows[1] > rows[0] @ rows[2]
