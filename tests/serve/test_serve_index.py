"""The browser's index: it says what the run's files say, computed another way; it is whole or not there."""

import contextlib
import errno
import os
import re
import signal
import sqlite3
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from interpret_world import Text, write_planted_run
from report_fixture import MEMBERS, write_interpretation, write_run
from serve_world import (
    D_SAE,
    HOOK,
    SHAPE,
    arrays_of,
    latents_of,
    reseal,
    sae_of,
    tiny_model,
    write_world,
)
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaForCausalLM

from wsae.core.artifact import record, write_manifest
from wsae.core.errors import UserError
from wsae.core.files import read_sealed, seal, write_json
from wsae.evals.config import EvalConfig
from wsae.evals.run import evaluate_run
from wsae.report.rundata import read_run
from wsae.sae import SAE
from wsae.serve import model as decoder
from wsae.serve import schema
from wsae.serve.build import alone, ensure_index, is_current, labels, members
from wsae.serve.collect import DRAWN
from wsae.serve.config import IndexConfig
from wsae.serve.index import Index
from wsae.serve.schema import bin_of, seal_of

CFG = IndexConfig(neighbours=5, logits=4)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    return write_world(tmp_path_factory.mktemp("serve") / "run", model)


@pytest.fixture(scope="module")
def index(run: Path) -> Index:
    path, made = ensure_index(run, None, CFG)
    assert made
    return Index(path)


def key(index: Index, member: str, latent: int) -> int:
    return schema.key_of(index.by_slug[member].id, latent)


@pytest.mark.parametrize("member", MEMBERS)
def test_every_latent_has_the_numbers_of_the_evaluation(index: Index, run: Path, member: str):
    arrays, sae = arrays_of(run, member), sae_of(run, member)
    shown = latents_of(run, "evaluation", member)
    gamma = sae.gamma.double().numpy()
    assert index.by_slug[member].size == D_SAE
    for latent in range(D_SAE):
        at = key(index, member, latent)
        numbers = index.numbers([at])[at]
        assert numbers["density"] == arrays["density"][latent]
        assert numbers["variance"] == arrays["variance"][latent]
        assert numbers["match"] == arrays["match_cosine"][latent]
        assert numbers["nearest"] == arrays["decoder_max_cosine"][latent]
        row = sae.W_dec[latent].detach().double().numpy()
        weight = sum(g * g * d * d for g, d in zip(gamma, row, strict=True)) / sum(row * row)
        assert numbers["gamma"] == pytest.approx(weight, rel=1e-5)
        if latent in shown:
            assert numbers["max"] == shown[latent]["max"]
        alive, twin = index.state(key(index, member, latent))
        assert alive == (arrays["density"][latent] > 0)
        wanted = (
            None if member == "plain" else key(index, "plain", int(arrays["match_index"][latent]))
        )
        assert twin == wanted


@pytest.mark.parametrize("member", MEMBERS)
def test_contexts_scores_and_explanations_are_those_of_the_files(
    index: Index, run: Path, member: str
):
    shown, scored = (latents_of(run, part, member) for part in ("evaluation", "interpretation"))
    for latent in range(D_SAE):
        record = index.record(key(index, member, latent))
        wanted = {**scored.get(latent, {}), **shown.get(latent, {})}
        for name in ("explanation", "contexts", "scores", "tokens"):
            assert record.get(name) == (wanted.get(name) or None), (latent, name)
        for score, value in scored.get(latent, {}).get("scores", {}).items():
            at = key(index, member, latent)
            assert index.numbers([at])[at][score] == value


def test_a_plain_latent_knows_who_chose_it_most_alike_first(index: Index, run: Path):
    for latent in range(D_SAE):
        wanted = [
            (cosine, key(index, member, i))
            for member in MEMBERS
            if member != "plain"
            for i, (there, cosine) in enumerate(
                zip(
                    *(arrays_of(run, member)[n] for n in ("match_index", "match_cosine")),
                    strict=True,
                )
            )
            if there == latent
        ]
        found = index.suitors(key(index, "plain", latent), 3)
        assert found == [
            (k, c) for c, k in sorted(wanted, key=lambda pair: (-pair[0], pair[1]))[:3]
        ]


@pytest.mark.parametrize("block", [1 << 24, 7 * D_SAE])
def test_nearest_latents_against_all_cosines_in_fp64(monkeypatch: pytest.MonkeyPatch, block: int):
    monkeypatch.setattr(decoder, "BLOCK", block)
    W = torch.randn(D_SAE, 24, generator=torch.Generator().manual_seed(3))
    W[5] = W[9] * 3 + 1e-3 * W[10]  # nearly the same direction
    unit = W.double() / W.double().norm(dim=1, keepdim=True)
    cosine = (unit @ unit.T).numpy()
    np.fill_diagonal(cosine, -np.inf)
    parts = list(decoder.neighbours(W, 6))
    values, where = (torch.cat([part[i] for part in parts]).numpy() for i in (0, 1))
    order = np.argsort(-cosine, axis=1)[:, :6]
    assert where.tolist() == order.tolist()
    assert np.allclose(values, np.take_along_axis(cosine, order, 1), atol=1e-6)
    assert where[5, 0] == 9


def test_packed_neighbours_and_tokens_come_back(index: Index, run: Path, model: Path):
    language = LlamaForCausalLM.from_pretrained(model).double()
    head, norm = language.lm_head.weight, language.model.norm.weight
    for member in MEMBERS:
        W = sae_of(run, member).W_dec.detach().double()
        unit = W / W.norm(dim=1, keepdim=True)
        logits = (W * norm) @ head.T
        for latent in (0, 17, D_SAE - 1):
            near, tokens, counts = index.packed(key(index, member, latent))
            cosine = unit @ unit[latent]
            cosine[latent] = -1
            best = cosine.topk(CFG.neighbours)
            assert [i for i, _ in near] == best.indices.tolist()
            up, down = logits[latent].topk(CFG.logits), (-logits[latent]).topk(CFG.logits)
            assert [t for t, _ in tokens] == [*up.indices.tolist(), *down.indices.tolist()]
            values = torch.cat([up.values, -down.values]).tolist()
            assert [v for _, v in tokens] == pytest.approx(values, abs=1e-5)
            assert set(index.tokens([t for t, _ in tokens])) == {t for t, _ in tokens}
            assert counts == index.fires(key(index, member, latent)) == []
    assert index.model["about"] == "gain of the final LlamaRMSNorm folded in"


def test_promoted_tokens_are_in_the_order_of_the_models_own_logits():
    """norm(d) goes through gain, bias, centring and a division that all tokens share; the bias is no latent's doing."""
    torch.manual_seed(0)
    config = GPTNeoXConfig(
        vocab_size=90,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
    )
    model = GPTNeoXForCausalLM(config).eval()
    with torch.no_grad():
        model.gpt_neox.final_layer_norm.weight.uniform_(0.2, 2.0)
        model.gpt_neox.final_layer_norm.bias.normal_()
    out = decoder.unembedding(model)
    assert out is not None
    assert out.about == "gain and centring of the final LayerNorm folded in"
    rows = torch.randn(20, 16)
    with torch.no_grad():
        through = [
            model.get_output_embeddings()(model.gpt_neox.final_layer_norm(x))
            for x in (rows, rows[:1] * 0)
        ]
    own = through[0] - through[1]
    (block,) = decoder.promoted(rows, out, 90)
    assert block.up[1].tolist() == own.argsort(dim=1, descending=True).tolist()
    ratio = block.up[0] / own.gather(1, block.up[1])
    assert torch.allclose(ratio, ratio.median(1, keepdim=True).values.expand_as(ratio), rtol=1e-2)
    model.gpt_neox.final_layer_norm.weight.data.fill_(torch.nan)  # as when its files lack it
    assert decoder.unembedding(model) is None


def test_labels_are_the_classes_whose_probes_chose_a_latent_nearest_to_the_top_first(
    tmp_path: Path,
):
    run = write_world(tmp_path / "run")
    chosen = [[7, 3], [3, 9]]
    hooks = {HOOK: {"tasks": ["digits", "names"], "members": {"plain": {"chosen": chosen}}}}
    write_json(run / "probing" / "probing.json", {"tokens": {"hooks": hooks}})
    write_manifest(run / "probing", "probing", {}, ["probing.json"])
    data = read_run(run)
    plain, *others = members(data)
    told = {j: [(one["task"], one["rank"]) for one in v] for j, v in labels(data, plain).items()}
    assert told == {7: [("digits", 0)], 3: [("names", 0), ("digits", 1)], 9: [("names", 1)]}
    assert [labels(data, other) for other in others] == [{}] * len(others)
    index = Index(ensure_index(run, None, IndexConfig(neighbours=0, logits=0))[0])
    assert index.record(key(index, "plain", 3))["labels"] == labels(data, plain)[3]


def test_it_is_made_once_and_again_when_the_scores_change(tmp_path: Path):
    run = write_world(tmp_path / "run")
    path, made = ensure_index(run, None, CFG)
    first = path.stat().st_mtime_ns
    assert made
    assert not ensure_index(run, None, CFG)[1]
    assert path.stat().st_mtime_ns == first
    assert ensure_index(run, None, IndexConfig(neighbours=2))[1], "other settings, another index"
    ensure_index(run, None, CFG)
    write_interpretation(run)
    with pytest.raises(UserError, match="latent 9999 of plain, which has 64"):
        ensure_index(run, None, CFG)
    (run / "interpretation" / "manifest.json").unlink()
    assert ensure_index(run, None, CFG)[1]
    assert "embedding" not in Index(path).column


@pytest.mark.parametrize(
    "harm", ["cut", "flip", "letter", "trigger", "view", "empty", "text", "no seal", "seal"]
)
def test_a_damaged_or_foreign_file_is_made_again(
    run: Path, index: Index, tmp_path: Path, harm: str
):
    place, beside = tmp_path / "copy.sqlite", tmp_path / "copy.sqlite.json"
    place.write_bytes(index.path.read_bytes())
    beside.write_bytes(seal_of(index.path).read_bytes())
    identity = read_sealed(beside)["identity"]
    assert is_current(place, identity)
    assert not is_current(place, "another")
    data = place.read_bytes()
    if harm in ("trigger", "view"):
        told = {
            "trigger": "TRIGGER t AFTER INSERT ON meta BEGIN SELECT 1; END",
            "view": "VIEW v AS SELECT 1",
        }
        with contextlib.closing(sqlite3.connect(place)) as connection:
            connection.execute(f"CREATE {told[harm]}")
            connection.commit()
        forged = {"identity": identity, "file": record(place).to_dict()}
        write_json(beside, seal(forged))  # whoever adds a trigger can compute a checksum
    elif harm == "no seal":
        beside.unlink()
    elif harm == "seal":
        beside.write_bytes(beside.read_bytes().replace(b"sha256", b"sha255"))
    else:
        at = data.index(b"fires on")  # in a label: SQLite itself has no checksum of values
        place.write_bytes(
            {
                "cut": data[: len(data) // 2],
                "flip": data[: len(data) // 2] + b"\xff" * 4096 + data[len(data) // 2 + 4096 :],
                "letter": data[:at] + b"tires on" + data[at + 8 :],
                "empty": b"",
                "text": b"no database" * 99,
            }[harm]
        )
    assert not is_current(place, identity)
    assert ensure_index(run, place, CFG)[1]
    assert is_current(place, identity)


KILLED = """
import os, signal, sys
from pathlib import Path
from wsae.serve import build
from wsae.serve.config import IndexConfig
inner, calls = build.write_packed, []
def dying(*args):
    inner(*args)
    calls.append(1)
    if len(calls) == 99:
        os.kill(os.getpid(), signal.SIGKILL)
build.write_packed = dying
build.ensure_index(Path(sys.argv[1]), None, IndexConfig(neighbours=5, logits=4))
"""


def test_killed_while_indexing_it_leaves_no_index_and_the_next_start_makes_it(tmp_path: Path):
    run = write_world(tmp_path / "run")
    before = {p.name for p in run.iterdir()}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(run)], check=False, timeout=250, env={**os.environ}
    )
    assert done.returncode == -signal.SIGKILL
    left = {p.name for p in run.iterdir()} - before
    assert schema.NAME not in left
    assert any(name.endswith(".tmp") for name in left), "it was killed in the middle"
    path, made = ensure_index(run, None, CFG)
    assert made
    made_now = {p.name for p in run.iterdir()} - before
    assert made_now == {schema.NAME, f"{schema.NAME}.json", f".{schema.NAME}.lock"}
    assert [m.size for m in Index(path).members] == [D_SAE] * 3


def test_what_is_no_run_or_not_evaluated_is_said_in_one_line(tmp_path: Path):
    with pytest.raises(UserError, match="no such run directory"):
        ensure_index(tmp_path / "nowhere", None, CFG)
    with pytest.raises(UserError, match="not a wsae run directory"):
        ensure_index(tmp_path, None, CFG)
    bare = write_run(tmp_path / "bare", SHAPE, evaluation=False)
    with pytest.raises(UserError, match="has not been evaluated; run: wsae evaluate"):
        ensure_index(bare, None, CFG)


def test_an_altered_evaluation_or_a_match_out_of_range_is_refused(tmp_path: Path):
    run = write_world(tmp_path / "run")
    place = run / "evaluation" / "contexts.json"
    place.write_text(place.read_text().replace("ship", "shop"))
    with pytest.raises(UserError, match=r"contexts\.json: checksum differs"):
        ensure_index(run, None, CFG)
    reseal(run, "evaluation")
    assert ensure_index(run, None, CFG)[1]


START = """
import sys
from pathlib import Path
from wsae.serve import build
from wsae.serve.config import IndexConfig
if len(sys.argv) > 2:
    import resource, signal
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
print(build.ensure_index(Path(sys.argv[1]), None, IndexConfig(neighbours=5, logits=4))[1])
"""


def test_two_processes_at_once_make_one_index(tmp_path: Path):
    run = write_world(tmp_path / "run")
    command = [sys.executable, "-c", START, str(run)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert sorted(p.communicate(timeout=250)[0].strip() for p in both) == ["False", "True"]
    assert ensure_index(run, None, CFG) == (run / schema.NAME, False)


def test_a_disk_that_is_full_is_one_line_and_leaves_nothing(tmp_path: Path):
    run = write_world(tmp_path / "run")
    command = [sys.executable, "-c", START, str(run), "20000"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=250)
    assert "the disk is full" in done.stderr.splitlines()[-1]
    assert not [p for p in run.iterdir() if p.name.startswith(schema.NAME) or p.suffix == ".tmp"]
    assert ensure_index(run, None, CFG)[1]


@pytest.mark.parametrize(
    ("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EROFS, "cannot write here")]
)
def test_what_sqlite_keeps_to_itself_is_asked_of_the_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, words: str
):
    """SQLite says "disk I/O error" of a full disk and of one that has turned read-only."""
    error = sqlite3.OperationalError("disk I/O error")
    error.sqlite_errorcode = sqlite3.SQLITE_IOERR_WRITE

    def refused(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refused)
    with pytest.raises(UserError, match=words), alone(tmp_path / "x.sqlite"):
        raise error
    assert [p.name for p in tmp_path.iterdir()] == [".x.sqlite.lock"]


def test_collected_contexts_and_histograms_against_a_dense_pass(tmp_path: Path):
    """Every activation of every held-out row, encoded densely."""
    run, source = write_planted_run(tmp_path / "run"), Text()
    evaluate_run(run, source, EvalConfig(n_latents=0, random_control=False, draws=20))
    cfg, told = IndexConfig(per_latent=3, samples=4, neighbours=2, window=6), []
    index = Index(ensure_index(run, None, cfg, lambda _: source, say=told.append)[0])
    (line,) = told
    assert re.search(r"contexts of [\d,]+ latents from [\d,]+ tokens: about \d+ s", line)
    table = source.tokens()
    for member in index.members:
        sae = SAE.load(run / "members" / member.hook / member.name)
        found: list[tuple[int, int, int, float]] = []
        for chunk in source.heldout(64):
            z = sae.encode(chunk.x[member.hook].float()).detach()
            found += [
                (j, int(chunk.seq[i]), int(chunk.pos[i]), float(z[i, j]))
                for i, j in (z > 0).nonzero().tolist()
            ]
        for latent in range(member.size):
            mine = [(seq, pos, value) for j, seq, pos, value in found if j == latent]
            at = schema.key_of(member.id, latent)
            counts = index.packed(at)[2]
            bins = Counter(
                bin_of(torch.tensor([v for *_, v in mine], dtype=torch.float64)).tolist()
            )
            assert {i: n for i, n in enumerate(counts) if n} == dict(bins)
            most = max((v for *_, v in mine), default=None)
            assert index.numbers([at])[at]["max"] == (
                None if most is None else pytest.approx(most, rel=1e-5)
            )
            contexts = index.record(at).get("contexts", [])
            best = sorted({s: max(v for t, _, v in mine if t == s) for s, *_ in mine}.values())[
                ::-1
            ]
            assert [max(c["acts"]) for c in contexts] == pytest.approx(best[:3], rel=1e-3)
            samples = index.record(at).get("samples", [])
            assert len(samples) <= cfg.samples
            if len(best) > cfg.per_latent and len(mine) > 40:
                assert len(samples) >= 1, "of many firings some are not among the strongest"
            z = {(seq, pos): value for seq, pos, value in mine}
            for context in (*contexts, *samples):
                text = table.decode(table.ids[context["seq"]].tolist())
                assert "".join(context["tokens"]) in "".join(text)
                peak = context["acts"][context["peak"]]
                there = [
                    pos
                    for (s, pos), v in z.items()
                    if s == context["seq"] and v == pytest.approx(peak, rel=1e-3)
                ]
                starts = [pos - context["peak"] for pos in there]
                assert any(
                    context["acts"]
                    == pytest.approx(
                        [z.get((context["seq"], start + i), 0.0) for i in range(6)], rel=1e-3
                    )
                    for start in starts
                ), "every activation in the window, beside the peak too"
            on = Counter(table.decode([int(table.ids[seq, pos])])[0] for seq, pos, _ in mine)
            fires = index.fires(at)
            if 0 < len(mine) <= DRAWN:  # all firings are drawn
                texts = index.tokens([token for token, _ in fires])
                assert {
                    texts[t]: round(share * len(mine)) for t, share in fires
                }.items() <= on.items()
                assert [round(s * len(mine)) for _, s in fires] == sorted(on.values())[::-1][
                    : len(fires)
                ]
