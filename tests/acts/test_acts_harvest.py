"""Harvests: content against a plain forward pass, exact statistics, kill and resume, damage, bad input."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from acts_models import WIDTH, make_bert, make_model, make_text
from safetensors.torch import load_file

from wsae.acts import store as ledger
from wsae.acts import store as shards
from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import load_language
from wsae.acts.store import Store
from wsae.acts.text import is_heldout, told
from wsae.core.artifact import MANIFEST
from wsae.core.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("base")
    make_model(path / "model")
    make_text(path / "a.jsonl", documents=120)
    return path


def config(base: Path, **values) -> HarvestConfig:
    defaults = {
        "model": str(base / "model"),
        "text": TextConfig(path=str(base / "a.jsonl")),
        "hooks": ("layers.0", "layers.2.mlp"),
        "seq_len": 16,
        "batch_seqs": 3,
        "tokens": 700,
        "heldout_tokens": 150,
        "heldout_fraction": 0.2,
        "shard_tokens": 150,
    }
    return HarvestConfig(**{**defaults, **values})


@pytest.fixture(scope="module")
def store(base, tmp_path_factory) -> Store:
    return harvest(config(base), tmp_path_factory.mktemp("store") / "s")


def contents(path: Path) -> dict[str, bytes]:
    files = (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
    return {str(p.relative_to(path)): p.read_bytes() for p in files}


# ---- what is told of the text


def test_what_is_left_out_or_repeated_is_in_the_manifest(base, tmp_path):
    text = tmp_path / "text"
    text.mkdir()
    (text / "README.md").write_text("about")
    lines = make_text(text / "a.jsonl", documents=60).read_text().splitlines()
    rows = [line for line in lines for _ in range(2)]  # every document twice
    rows[5:5] = ['{"text": null}', '{"text": ""}', '{"id": 3}']
    (text / "a.jsonl").write_text("\n".join(rows))
    cfg = config(base, text=TextConfig(path=str(text)), tokens=400, heldout_tokens=60)
    whole = harvest(cfg, tmp_path / "whole").info["text"]
    assert whole["left_out"] == {"null": 1, "without the field": 1}
    assert (whole["empty"], whole["documents"] < len(rows)) == (1, True)
    assert whole["files_left_out"]["about the data"] == {"n": 1, "names": ["README.md"]}
    held = [is_heldout(i, cfg.seed, cfg.heldout_fraction) for i in range(len(rows))]
    texts = [row for row in rows if len(row) > 15]
    used = {
        half: [row for row, is_held in zip(rows, held, strict=True) if is_held == half]
        for half in (True, False)
    }
    repeated, few = whole["repeated"], whole["repeated"]["heldout"]
    assert 0 < few < len(used[True])
    twice = sum(row in used[False] for row in used[True])
    assert 0 < repeated["in_training"] <= twice < len(texts)
    assert f"{repeated['in_training']} of {few} held-out documents" in told(whole)[-1]


# ---- what is stored


def test_a_store_keeps_what_the_probe_found_under_our_names(base, tmp_path):
    theirs = ("blocks.1.hook_resid_pre", "model.layers.1.self_attn.o_proj.input", "h.1")
    with pytest.raises(UserError, match="no such module"):
        harvest(config(base, hooks=theirs), tmp_path / "s")
    assert not (tmp_path / "s").exists()
    made = harvest(config(base, hooks=theirs[:2]), tmp_path / "s")
    ours = ["layers.1.input", "layers.1.self_attn.o_proj.input"]
    assert sorted(made.hooks) == ours
    assert made.info["causal"] is True
    assert made.info["notes"] == []
    assert made.info["probe"]["layouts"] == dict.fromkeys(ours, "[batch, sequence, width]")
    model = load_language(str(base / "model")).model
    with torch.no_grad():
        ids = made.tokens("train").ids.long()
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    seq, pos = made.places("train")
    rows = made.rows("train", np.arange(made.n_rows["train"]))["layers.1.input"]
    torch.testing.assert_close(rows, hidden[seq, pos])
    for name in ("blocks.1.attn.hook_z", "model.layers.1.self_attn.o_proj.input"):
        assert list(Store(made.path, (name,)).hooks) == ours[1:]


def test_a_model_that_sees_later_tokens_and_too_long_sequences_are_told(base, tmp_path):
    bert = str(make_bert(tmp_path / "bert"))
    made = harvest(config(base, model=bert, hooks=("layer.1",)), tmp_path / "s")
    assert made.info["causal"] is False
    assert "sees later tokens" in made.info["notes"][0]
    assert made.info["probe"]["positions"] == 32
    with pytest.raises(UserError, match=r"--seq-len 33: .*give --seq-len 32 or less"):
        harvest(config(base, model=bert, hooks=("layer.1",), seq_len=33), tmp_path / "long")
    assert not (tmp_path / "long").exists()


def test_every_row_is_the_models_activation_at_its_token(base, store):
    model = load_language(str(base / "model")).model
    for split in ("train", "heldout"):
        ids = store.tokens(split).ids.long()
        with torch.no_grad():
            hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[1]
        seq, pos = store.places(split)
        rows = store.rows(split, np.arange(store.n_rows[split]))["layers.0"]
        torch.testing.assert_close(rows, hidden[seq, pos])


def test_hooks_are_aligned_with_each_other(base, store):
    model = load_language(str(base / "model")).model
    ids = store.tokens("train").ids.long()
    seen = {}
    handle = model.get_submodule("model.layers.2.mlp").register_forward_hook(
        lambda _m, _i, o: seen.update(o=o)
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    seq, pos = store.places("train")
    torch.testing.assert_close(
        store.rows("train", np.arange(700))["layers.2.mlp"], seen["o"][seq, pos]
    )


def test_the_rows_wanted_are_there_and_no_special_or_first_token_is(store):
    assert store.n_rows == {"train": 700, "heldout": 150}
    assert store.hooks == {"layers.0": WIDTH, "layers.2.mlp": WIDTH}
    table = store.tokens("train")
    seq, pos = store.places("train")
    assert not set(table.ids[seq, pos].tolist()) & {0, 1, 2}
    assert int(pos.min()) == 1
    skipped = store.info["skipped"]["train"]
    assert skipped["first"] > 0
    assert skipped["special"] > 0
    assert store.info["exhausted"] is False


def test_shards_hold_whole_batches_and_open_in_the_plain_library(store):
    shards = sorted((store.path / "train" / "layers.0").glob("*.safetensors"))
    parts = [load_file(path) for path in shards]
    assert [len(p["acts"]) for p in parts] == store.info["shard_rows"]["train"]
    assert all(150 <= len(p["acts"]) < 150 + 3 * 16 for p in parts[:-1])
    joined = torch.cat([p["acts"] for p in parts])
    assert torch.equal(joined, store.rows("train", np.arange(700))["layers.0"])


def test_statistics_are_those_of_the_stored_rows(store):
    for hook, stats in store.stats().items():
        rows = store.rows("train", np.arange(700))[hook].double()
        torch.testing.assert_close(stats.kept.mean, rows.mean(0), rtol=1e-12, atol=1e-15)
        torch.testing.assert_close(
            stats.kept.variance, rows.var(0, correction=0), rtol=1e-9, atol=0
        )
        assert stats.kept.n == 700
        skipped = {r: n for r, n in stats.skipped.items() if r != "padding"}
        assert stats.all.n == 700 + sum(skipped.values())


def test_half_precision_stores_hold_rounded_rows_and_their_statistics(base, store, tmp_path):
    exact = store.rows("train", np.arange(700))["layers.0"]
    for name, dtype in (("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        half = harvest(config(base, store_dtype=name), tmp_path / name)
        rows = half.rows("train", np.arange(700))["layers.0"]
        assert torch.equal(rows, exact.to(dtype).float())
        torch.testing.assert_close(
            half.stats()["layers.0"].kept.mean, rows.double().mean(0), rtol=1e-12, atol=1e-15
        )


def test_one_document_a_sequence_pads_and_never_keeps_padding(base, tmp_path):
    made = harvest(config(base, pack=False), tmp_path / "s")
    table = made.tokens("train")
    seq, pos = made.places("train")
    assert bool((pos < table.lengths[seq]).all())
    assert made.info["skipped"]["train"]["padding"] > 0


def test_a_text_may_begin_with_documents_too_short_to_keep(base, tmp_path):
    text = tmp_path / "text.jsonl"
    short = '{"text": "a"}\n' * 40
    text.write_text(short + (base / "a.jsonl").read_text())
    found = harvest(config(base, text=TextConfig(path=str(text)), pack=False), tmp_path / "s")
    assert found.n_rows["train"] > 0
    text.write_text(short)
    with pytest.raises(UserError, match="the text has no token to calibrate on"):
        harvest(config(base, text=TextConfig(path=str(text)), pack=False), tmp_path / "t")


def test_the_two_halves_share_no_document(base, store):
    cfg = config(base, pack=False, tokens=5000, heldout_tokens=5000)
    whole = harvest(cfg, store.path.parent / "unpacked")
    sentences = {
        split: {tuple(r) for r in whole.tokens(split).ids.tolist()}
        for split in ("train", "heldout")
    }
    assert not sentences["train"] & sentences["heldout"]
    assert len(sentences["train"]) + len(sentences["heldout"]) == 120


def test_token_strings_spell_the_documents(base, store):
    table = store.tokens("heldout")
    spelled = "".join(table.decode(table.ids.flatten())).split("</s>")[1:-1]
    sentences = {json.loads(line)["text"] for line in (base / "a.jsonl").read_text().splitlines()}
    assert len(spelled) >= 3
    assert set(spelled) <= sentences


def test_any_order_of_rows_is_gathered(store):
    everything = store.rows("train", np.arange(700))
    index = np.random.default_rng(0).integers(0, 700, 300)
    for hook, rows in store.rows("train", index).items():
        assert torch.equal(rows, everything[hook][torch.from_numpy(index)])


def test_only_what_the_roles_say_is_kept_and_the_rest_is_counted(base, tmp_path):
    shutil.copytree(base / "model", tmp_path / "model")
    template = "{% for m in messages %}<s>{{ m.role }} {{ m.content }}</s>{% endfor %}"
    (tmp_path / "model" / "chat_template.jinja").write_text(template)
    rows = [
        [{"role": "user", "content": f"the cat {i} sat"}, {"role": "assistant", "content": "two dogs ran"}]
        for i in range(40)
    ]  # fmt: skip
    path = tmp_path / "talk.jsonl"
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    text = TextConfig(path=str(path), field="messages")
    given = {"model": str(tmp_path / "model"), "text": text, "roles": ("assistant", "tool")}
    found = harvest(config(base, **given), tmp_path / "s")
    table, (seqs, places) = found.tokens("train"), found.places("train")
    rows, info = found.n_rows["train"], found.manifest.info
    skipped = info["skipped"]["train"]
    assert 0 < rows < skipped["other roles"]  # "user", "assistant" and the user's words
    assert rows + sum(skipped.values()) == table.ids.numel()
    before = len(found.tokens("heldout").ids)  # sequences are numbered in each half
    read = "".join("".join(table.decode(table.ids[seqs, places])).split())
    assert before
    assert set(read) <= set("twodogsran")
    assert read.count("dogs") > 20
    assert "no turn is of the role 'tool' (there are 40 of assistant, 40 of user)" in told(
        info["text"]
    )
    assert found.manifest.config["roles"] == ["assistant", "tool"]
    with pytest.raises(UserError, match="made with roles="):
        harvest(config(base, **given | {"roles": None}), tmp_path / "s")
    with pytest.raises(UserError, match="no token to keep is of the role tool .there are"):
        harvest(config(base, **given | {"roles": ("tool",)}), tmp_path / "t")
    assert not (tmp_path / "t").exists()


def test_text_that_runs_out_is_said(base, tmp_path):
    made = harvest(config(base, tokens=10**6), tmp_path / "s")
    assert made.info["exhausted"] is True
    assert 700 < made.n_rows["train"] < 10**6
    assert harvest(config(base, tokens=10**6), tmp_path / "s").n_rows == made.n_rows


def test_sinks_are_dropped_at_every_hook(base, tmp_path):
    language = load_language(str(base / "model"))
    dogs = language.tokenizer(" dogs")["input_ids"]
    with torch.no_grad():
        language.model.get_input_embeddings().weight[dogs] *= 1000
    made = harvest(config(base), tmp_path / "s", language=language)
    loud = torch.isin(made.tokens("train").ids, torch.tensor(dogs))
    assert made.info["skipped"]["train"]["norm"] == int(loud[:, 1:].sum()) > 0
    assert not loud[made.places("train")].any()
    stats = made.stats()["layers.0"]
    assert float(stats.all.variance.max()) > 10 * float(stats.kept.variance.max())


# ---- killed, finished, other


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("stop_after", [1, 2, 3, 6])
def test_an_interrupted_harvest_continues_to_the_same_bytes(
    base, store, tmp_path, monkeypatch, stop_after
):
    saves = 0
    save = ledger.Ledger.save

    def stopping(self, out, tally):
        nonlocal saves
        saves += 1
        if saves > stop_after:
            raise Stopped
        return save(self, out, tally)

    monkeypatch.setattr(ledger.Ledger, "save", stopping)
    with pytest.raises(Stopped):
        harvest(config(base), tmp_path / "s")
    monkeypatch.undo()
    made = harvest(config(base), tmp_path / "s")
    assert contents(made.path) == contents(store.path)


KILLER = """
import os, signal, sys, time
from pathlib import Path
import torch
from wsae.acts.config import HarvestConfig
from wsae.acts.harvest import harvest

torch.set_num_threads(1)
cfg, out, kills = HarvestConfig.load(sys.argv[1]), Path(sys.argv[2]), 0
for target in (1, 3, 6, 9):
    child = os.fork()
    if child == 0:
        harvest(cfg, out)
        os._exit(0)
    while len(list(out.glob("train/layers.0/*.safetensors"))) < target:
        time.sleep(0.0002)
    time.sleep(0.002 * target)
    os.kill(child, signal.SIGKILL)
    kills += os.waitpid(child, 0)[1] == signal.SIGKILL
print(kills)
"""


def test_a_harvest_killed_at_any_moment_continues_to_the_same_bytes(base, tmp_path):
    cfg = config(base, tokens=1500, shard_tokens=100)
    whole = harvest(cfg, tmp_path / "whole")
    (tmp_path / "c.json").write_text(json.dumps(cfg.to_dict()))
    out = tmp_path / "killed"
    command = [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "c.json"), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=100)
    assert int(done.stdout) >= 2, done.stderr
    assert contents(harvest(cfg, out).path) == contents(whole.path)
    assert not list(out.rglob(".*.tmp"))


def test_a_finished_harvest_is_not_made_again(base, store):
    before = {p: p.stat().st_mtime_ns for p in store.path.rglob("*")}
    harvest(config(base), store.path)
    assert {p: p.stat().st_mtime_ns for p in store.path.rglob("*")} == before


def test_another_config_in_the_same_place_is_refused(base, store):
    with pytest.raises(UserError, match="was made with seq_len=16, not 8"):
        harvest(config(base, seq_len=8), store.path)


def test_another_text_in_the_same_place_is_refused(base, tmp_path):
    text = make_text(tmp_path / "a.jsonl")
    cfg = config(base, text=TextConfig(path=str(text)), tokens=100)
    harvest(cfg, tmp_path / "s")
    make_text(text, seed=1)
    with pytest.raises(UserError, match="made from another text"):
        harvest(cfg, tmp_path / "s")


def test_a_harvest_killed_before_its_first_record_begins_again(base, tmp_path):
    """Moments are written before the ledger that names them: a kill in between leaves them alone."""
    cfg = config(base, tokens=100)
    harvest(cfg, tmp_path / "whole")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "progress-00000.safetensors").write_bytes(b"moments")
    harvest(cfg, tmp_path / "s")
    names = [{p.name for p in (tmp_path / place).iterdir()} for place in ("s", "whole")]
    assert names[0] == names[1]


def test_a_directory_with_other_files_is_refused_and_untouched(base, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"not empty and not a harvest \(notes.txt"):
        harvest(config(base), tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["notes.txt"]


# ---- damage


@pytest.mark.parametrize(
    "name",
    ["train/layers.0/acts-00001.safetensors", "heldout/tokens-00000.safetensors", "tokens.json"],
)
def test_a_flipped_bit_a_cut_and_a_missing_file_are_named(store, tmp_path, name):
    copy = tmp_path / "s"
    shutil.copytree(store.path, copy)
    data = bytearray((copy / name).read_bytes())
    data[len(data) * 2 // 3] ^= 4
    (copy / name).write_bytes(data)
    with pytest.raises(UserError, match=f"{name}: checksum differs"):
        Store(copy)
    (copy / name).write_bytes(data[:-1])
    with pytest.raises(UserError, match="cut or altered"):
        Store(copy, verify=False)
    (copy / name).unlink()
    with pytest.raises(UserError, match="missing"):
        Store(copy, verify=False)


def test_a_foreign_shard_and_a_missing_manifest_are_refused(store, tmp_path):
    copy = tmp_path / "s"
    shutil.copytree(store.path, copy)
    first, second = (copy / f"train/layers.0/acts-0000{i}.safetensors" for i in (0, 1))
    first.write_bytes(second.read_bytes())
    with pytest.raises(UserError, match="acts-00000.safetensors"):
        Store(copy)
    (copy / MANIFEST).unlink()
    with pytest.raises(UserError, match="not a finished wsae store"):
        Store(copy)


def test_a_hook_the_store_lacks_names_the_nearest(store):
    with pytest.raises(UserError, match=r"no hook 'layers.2' in this store \(nearest: layers.0"):
        Store(store.path, ("layers.2",))


# ---- bad input leaves nothing


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hooks": ("layers.7",)}, "no such module"),
        ({"model": "/no/model"}, "no such file or directory"),
        ({"text": TextConfig(path="/no/text.jsonl")}, "no such file"),
        ({"device": "warp"}, "not available here"),
        ({"heldout_fraction": 0.0001}, "no heldout token is left"),
        ({"skip_first": 15, "pack": True, "tokens": 5}, None),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_directory(base, tmp_path, values, message):
    out = tmp_path / "deep" / "s"
    if message is None:
        assert harvest(config(base, **values), out).n_rows["train"] == 5
        return
    with pytest.raises(UserError, match=message) as caught:
        harvest(config(base, **values), out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_an_empty_text_is_refused(base, tmp_path):
    for name, content in (("a.jsonl", ""), ("b.txt", "\n\n"), ("c.jsonl", '{"text": ""}\n')):
        (tmp_path / name).write_text(content)
        with pytest.raises(UserError, match="no documents|no text for training"):
            harvest(config(base, text=TextConfig(path=str(tmp_path / name))), tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_a_bad_line_far_down_names_its_number_and_keeps_finished_shards(base, tmp_path):
    lines = (base / "a.jsonl").read_text().splitlines()
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*lines, "{oops", *lines]))
    with pytest.raises(UserError, match="line 121: not JSON"):
        harvest(config(base, text=TextConfig(path=str(path)), tokens=10**6), tmp_path / "s")
    assert not (tmp_path / "s" / MANIFEST).exists()
    assert not list((tmp_path / "s").rglob(".*.tmp"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_names_hook_shard_row_and_dimension(base, tmp_path, value):
    language = load_language(str(base / "model"))
    clean = harvest(config(base), tmp_path / "clean", language=language)
    seq, pos = clean.places("train")
    layer, calls = language.model.get_submodule("model.layers.0"), 0

    def poison(_module, _inputs, output):
        nonlocal calls
        calls += 1
        x = output[0] if isinstance(output, tuple) else output
        if calls == 12:
            x[1, 3, 5] = value
        return output

    handle = layer.register_forward_hook(poison)
    with pytest.raises(UserError) as caught:
        harvest(config(base), tmp_path / "s", language=language)
    handle.remove()
    message = str(caught.value)
    assert message.startswith("layers.0: NaN or infinite activation in train shard ")
    assert "position 3, dimension 5" in message
    shard, row = (int(message.split(word)[1].split()[0].rstrip(",")) for word in ("shard ", "row "))
    first = sum(clean.info["shard_rows"]["train"][:shard])
    assert f"sequence {int(seq[first + row])}, position {int(pos[first + row])}" in message


def test_float16_refuses_values_it_cannot_hold(base, tmp_path):
    language = load_language(str(base / "model"))
    handle = language.model.get_submodule("model.layers.0").register_forward_hook(
        lambda _m, _i, o: o * 1e7
    )
    with pytest.raises(UserError, match="does not fit float16"):
        harvest(config(base, store_dtype="float16"), tmp_path / "s", language=language)
    handle.remove()


def test_a_full_disk_is_one_line_and_a_rerun_ends_with_the_same_bytes(
    base, store, tmp_path, monkeypatch
):
    append, written = shards._RowFile.append, 0

    def full(self, rows):
        nonlocal written
        written += 1
        if written > 40:
            raise OSError(errno.ENOSPC, "No space left on device")
        append(self, rows)

    monkeypatch.setattr(shards._RowFile, "append", full)
    with pytest.raises(UserError, match="the disk is full"):
        harvest(config(base), tmp_path / "s")
    monkeypatch.undo()
    assert not list((tmp_path / "s").rglob(".*.tmp"))
    assert list((tmp_path / "s").glob("heldout/layers.0/*"))
    assert contents(harvest(config(base), tmp_path / "s").path) == contents(store.path)
