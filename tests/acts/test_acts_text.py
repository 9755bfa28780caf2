"""Documents: every format, constant order, stable split, and one clear line for anything wrong."""

import bz2
import csv
import gzip
import json
import lzma

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset, DatasetDict
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.text import TextCounts, documents, fingerprint, is_heldout, told
from wsae.acts.tokens import TokenTable, alone, decode_table, joined, owner_of, texts_json, texts_of
from wsae.core.errors import UserError

TEXTS = ["one two", "drei vier \u00e4", "", "five\n\nsix"]


def read(path, **options) -> list[str]:
    return [d.text for d in documents(TextConfig(path=str(path), **options))]


def write_jsonl(path, texts, field="text"):
    data = "".join(json.dumps({field: t}) + "\n" for t in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_jsonl_gives_the_texts_in_order(tmp_path, name):
    assert read(write_jsonl(tmp_path / name, TEXTS)) == TEXTS


def test_parquet_gives_the_texts_in_order_across_row_groups(tmp_path):
    texts = [f"document {i}" for i in range(1000)]
    pq.write_table(
        pa.table({"body": texts, "n": list(range(1000))}), tmp_path / "a.parquet", row_group_size=70
    )
    assert read(tmp_path / "a.parquet", field="body") == texts


def test_a_directory_is_read_in_the_order_of_its_file_names(tmp_path):
    write_jsonl(tmp_path / "b.jsonl", ["second"])
    write_jsonl(tmp_path / "a.jsonl.gz", ["first"])
    (tmp_path / "notes.md").write_text("not read")
    assert read(tmp_path) == ["first", "second"]


def test_start_skips_documents_and_keeps_their_numbers(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    found = list(documents(TextConfig(path=str(path)), start=2))
    assert [(d.index, d.text) for d in found] == [(2, ""), (3, "five\n\nsix")]


@given(
    st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r"), max_size=3000), max_size=12
    )
)
def test_plain_text_loses_nothing_but_blank_space(tmp_path_factory, paragraphs):
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_bytes("\n\n".join(paragraphs).encode())
    parts = read(path)
    assert "".join("".join(parts).split()) == "".join("\n\n".join(paragraphs).split())
    assert all(parts)


def test_plain_text_is_cut_at_blank_lines_near_2000_characters(tmp_path):
    paragraph = "word " * 100
    (tmp_path / "a.txt").write_text("\n\n".join([paragraph] * 40))
    parts = read(tmp_path / "a.txt")
    assert all(part.startswith("word") and part.endswith("word") for part in parts)
    assert all(2000 <= len(part) <= 2600 for part in parts[:-1])
    assert sum(part.count("word") for part in parts) == 4000


def test_small_plain_text_is_one_document_and_a_line_without_end_is_cut(tmp_path):
    (tmp_path / "a.txt").write_text("Title\n\nA short text.\n")
    assert read(tmp_path / "a.txt") == ["Title\n\nA short text."]
    (tmp_path / "b.txt").write_text("x" * 50_000)
    assert max(map(len, read(tmp_path / "b.txt"))) == 8000


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": ', "line 2: not JSON"),
        (
            "a.jsonl",
            b'\n{"body": "x", "n": 1}\n',
            "line 2: no field 'text' (it has: body, n); give --field body",
        ),
        ("a.jsonl", b'{"id": "x", "body": "y"}\n', "(it has: id, body); see --field"),
        ("a.jsonl", b'{"text": 5}\n', "line 1: field 'text' is a int, not text"),
        ("a.jsonl", b"[1]\n", "line 1: a list where an object"),
        ("a.jsonl", b'{"text": "\\ud800"}\n', "line 1: holds half a character"),
        ("a.jsonl", b'{"text": "\xff"}\n', "line 1: not JSON"),
        ("a.jsonl", b"[" * 100_000, "line 1: not JSON"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "ok"}\n' * 500, mtime=0)[:-12], "damaged gzip"),
        ("a.jsonl.gz", b"not gzip at all", "damaged gzip"),
        ("a.txt", b"good\n\n\xff\xfe bad", "not UTF-8"),
        ("a.parquet", b"PAR1 nonsense", "not a readable parquet file"),
        ("a.xyz", b"text\nx\n", "unknown kind of file"),
        ("a.csv", b"texts;id\nx;1\n", "no column 'text'"),
        ("a.csv", b'text\n"open\n', "line 2: not CSV"),
        ("a.json", b'[{"text": "a"}, {"text": ', "record 2: not JSON"),
        ("a.json", b'[{"text": "a"}]\n{"text": "b"}', "more after the list's end"),
        (
            "a.jsonl",
            b'{"text": {"en": "x"}}',
            "is a dict, not text; name a key in it: --field text.en",
        ),
        ("a.jsonl", b'{"text": [[1]]}', "is a list of list"),
        ("a.jsonl", b'{"text": [{"a": 1}]}', "messages have role and content"),
        ("a.jsonl", b'{"text": [5, -100]}', "token id -100"),
        ("a.txt", "na\u00efve".encode("latin1"), "iconv -f WINDOWS-1252"),
        ("a.txt", "no mark".encode("utf-16-le"), "UTF-16 without a byte-order mark"),
        ("a.jsonl.zst", b"\x28\xb5\x2f\xfd", "damaged zstd file"),
        ("a.json.xz", lzma.compress(b'{"text": "ok"}\n' * 500)[:-20], "damaged xz file"),
        ("a.jsonl.bz2", bz2.compress(b'{"text": "ok"}\n' * 500)[:-9], "damaged bz2 file"),
        ("a.jsonl", b"PK\x03\x04", "is a zip archive"),
        ("a.parquet", b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
    ],
    ids=range(28),
)
def test_bad_files_are_named_with_their_place_in_one_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


ROWS = b'{"text": "x"}\n{"text": "y"}\n'


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data).to_pybytes()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.json", ROWS),
        ("a.json", b'[{"text": "x"},\n {"text": "y"}]\n'),
        ("a.json", b'{\n "text": "x"\n}\n{"text":\n"y"}'),
        ("a.jsonl", b'[{"text": "x"}, {"text": "y"}]'),
        ("a.jsonl", ROWS.replace(b"\n", b"\r\n")),
        ("a.ndjson", b"\xef\xbb\xbf" + ROWS),
        ("a.jsonl", ROWS.decode().encode("utf-16")),
        ("c4-train.00000-of-01024.json.gz", gzip.compress(ROWS, mtime=0)),
        ("a.jsonl.zst", zstd(ROWS[:14]) + zstd(ROWS[14:])),
        ("a.jsonl.xz", lzma.compress(ROWS[:14]) + lzma.compress(ROWS[14:])),
        ("a.jsonl.bz2", bz2.compress(ROWS)),
        ("a.jsonl", gzip.compress(ROWS, mtime=0)),
        ("a.jsonl.gz", ROWS),
        ("a.zst", zstd(ROWS)),
        ("download", ROWS),
        ("a.csv", b'id,text\r\n1,x\r\n2,"y"\r\n'),
        ("a.csv", b"\xef\xbb\xbftext;id\nx;1\ny;2\n"),
        ("a.tsv.gz", gzip.compress(b"id\ttext\n1\tx\n2\ty\n", mtime=0)),
    ],
)
def test_every_kind_of_file_is_read_by_what_is_in_it(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    assert read(tmp_path / name) == ["x", "y"]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_plain_text_may_begin_with_a_byte_order_mark(tmp_path, encoding):
    (tmp_path / "a.txt").write_bytes("The wh\u00e4le".encode(encoding))
    assert read(tmp_path / "a.txt") == ["The wh\u00e4le"]


def test_a_list_is_read_across_the_chunks_it_arrives_in(tmp_path):
    texts = ["\u00e4" * n for n in (700_000, 3, 600_001, 0, 900_000)]
    (tmp_path / "a.json").write_text(json.dumps([{"text": t} for t in texts], ensure_ascii=False))
    assert read(tmp_path / "a.json") == texts


def test_csv_cells_may_hold_lines_quotes_and_long_texts(tmp_path):
    texts = ['one, "two"\nthree', "x" * 300_000, ""]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "text"), *enumerate(texts)])
    assert read(tmp_path / "a.csv") == texts


def counted(path, **options) -> tuple[list[str], dict]:
    reading = TextCounts()
    found = documents(TextConfig(path=str(path), **options), reading=reading)
    return [d.text for d in found], reading.info()


def test_records_that_say_nothing_are_left_out_and_counted(tmp_path):
    pq.write_table(pa.table({"text": ["a", None, "b", ""]}), tmp_path / "a.parquet")
    texts, info = counted(tmp_path / "a.parquet")
    assert (texts, info["left_out"], info["empty"]) == (["a", "b", ""], {"null": 1}, 1)
    rows = b'{"t": 1}\n{"text": null}\n{"text": NaN}\n{"text": "a"}\n{"t": 2}\n'
    (tmp_path / "a.jsonl").write_bytes(rows)
    texts, info = counted(tmp_path / "a.jsonl")
    assert (texts, info["left_out"]) == (["a"], {"null": 2, "without the field": 2})
    assert told(info) == ["records left out: 2 null, 2 without the field"]


def test_a_directory_names_what_it_leaves_out(tmp_path):
    data = tmp_path / "set"
    (data / "data").mkdir(parents=True)
    (data / "data/00.jsonl.zst").write_bytes(zstd(ROWS))
    (data / "more.jsonl").write_text('{"other": "z"}\n')
    for name in ("LICENSE.txt", "README.md", "dataset_infos.json", "model.bin", ".gitattributes"):
        (data / name).write_text("{}")
    (data / "elsewhere").symlink_to(tmp_path)
    texts, info = counted(data)
    assert texts == ["x", "y"]
    left = {reason: found["names"] for reason, found in info["files_left_out"].items()}
    assert left == {
        "about the data": ["LICENSE.txt", "README.md", "dataset_infos.json"],
        "hidden": [".gitattributes"],
        "links to folders": ["elsewhere"],
        "of an unknown kind": ["model.bin"],
        "without the field": ["more.jsonl"],
    }
    assert "3 about the data (LICENSE.txt, README.md, dataset_infos.json)" in told(info)[0]


def test_a_licence_alone_is_not_taken_for_the_text(tmp_path):
    (tmp_path / "LICENSE.txt").write_text("MIT License. Permission is hereby granted ...")
    (tmp_path / "weights.bin").write_text("")
    with pytest.raises(UserError, match=r"only 1 about the data \(LICENSE.txt\); 1 of an unknown"):
        read(tmp_path)
    assert len(read(tmp_path / "LICENSE.txt")) == 1


def test_prose_is_read_from_a_directory_of_nothing_else(tmp_path):
    (tmp_path / "a.md").write_text("# One")
    assert read(tmp_path) == ["# One"]
    write_jsonl(tmp_path / "b.jsonl", ["two"])
    assert read(tmp_path) == ["two"]


def test_data_sets_saved_to_disk_are_read_by_split_and_without_their_caches(tmp_path):
    saved = Dataset.from_dict({"text": ["a", None, "b", "c"]})
    DatasetDict(train=saved, test=saved.select([0])).save_to_disk(
        str(tmp_path / "d"), num_shards={"train": 2, "test": 1}
    )
    saved.map(lambda row: row, cache_file_name=str(tmp_path / "d/train/old-copy.arrow"))
    texts, info = counted(tmp_path / "d")
    assert (texts, info["left_out"]) == (["a", "b", "c"], {"null": 1})
    assert info["files_left_out"]["of other splits"]["names"] == ["test"]
    assert info["files_left_out"]["not listed in state.json"]["names"] == ["old-copy.arrow"]
    assert read(tmp_path / "d", split="test") == ["a"]
    assert read(tmp_path / "d/test") == ["a"]
    with pytest.raises(UserError, match="no split 'dev'; give --split train or test"):
        read(tmp_path / "d", split="dev")


def test_a_split_chooses_the_files_of_a_directory_that_are_named_by_it(tmp_path):
    for split in ("train", "test"):
        table = pa.table({"text": [split]})
        pq.write_table(table, tmp_path / f"{split}-00000-of-00001.parquet")
    assert read(tmp_path) == ["test", "train"]
    assert read(tmp_path, split="test") == ["test"]
    with pytest.raises(UserError, match="no file of the split 'dev'"):
        read(tmp_path, split="dev")


TALK = [
    {"role": "user", "content": [{"type": "text", "text": "hi"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "yo"}, {"type": "image"}]},
]


def test_conversations_deeper_fields_and_lists_are_read(tmp_path):
    share = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    talk = "user: hi\nassistant: yo"
    row = {"messages": TALK, "conversations": share, "data": {"text": "x"}, "parts": ["a", "b"]}
    row |= {"choices": [{"text": "c"}], "a.b": "d"}
    wanted = {"messages": talk, "conversations": talk, "data.text": "x", "parts": "a\nb"}
    wanted |= {"choices.0.text": "c", "a.b": "d"}
    (tmp_path / "a.jsonl").write_text(json.dumps(row) + "\n")
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.parquet"):
        for field, text in wanted.items():
            assert read(tmp_path / name, field=field) == [text], (name, field)
        _, info = counted(tmp_path / name, field="messages")
        assert info["left_out"] == {"read without its parts that are no text": 1}
    (tmp_path / "b.jsonl").write_text(json.dumps({"id": 5, "conversations": share}))
    with pytest.raises(UserError, match="give --field conversations"):
        read(tmp_path / "b.jsonl")


def test_token_ids_are_read_under_their_mask(tmp_path):
    table = pa.table(
        {"input_ids": [[5, 6, 0], [7, 8, 9]], "attention_mask": [[1, 1, 0], [1, 1, 1]]}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in table.to_pylist()))
    for name in ("a.parquet", "a.jsonl"):
        found = documents(TextConfig(path=str(tmp_path / name), field="input_ids"))
        assert [d.ids.tolist() for d in found] == [[5, 6], [7, 8, 9]]


def test_a_missing_column_names_the_nearest(tmp_path):
    pq.write_table(pa.table({"texts": ["a"], "id": [1]}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"no column 'text' \(nearest: texts\)"):
        read(tmp_path / "a.parquet")


@pytest.mark.parametrize("path", ["/no/such/place", "./missing", "missing.jsonl", "a/b/c", ""])
def test_a_missing_path_is_refused_without_asking_a_hub(path):
    with pytest.raises(UserError, match="no such file"):
        read(path)


def test_a_hub_name_without_a_network_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="there is no network"):
        read("owner/dataset")


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(UserError, match="no .jsonl"):
        read(tmp_path)


def test_the_split_is_stable_and_has_the_fraction_asked_for():
    held = [i for i in range(20_000) if is_heldout(i, seed=3, fraction=0.1)]
    assert abs(len(held) / 20_000 - 0.1) < 0.01
    assert held[:4] == [i for i in range(held[3] + 1) if is_heldout(i, 3, 0.1)]
    assert held != [i for i in range(20_000) if is_heldout(i, seed=4, fraction=0.1)]
    assert not any(is_heldout(i, 0, 0.0) for i in range(1000))


def test_a_larger_fraction_holds_out_a_superset():
    small = {i for i in range(2000) if is_heldout(i, 0, 0.1)}
    assert small < {i for i in range(2000) if is_heldout(i, 0, 0.3)}


def test_the_shipped_text_has_its_five_sources_and_a_few_megabytes():
    texts = read("builtin")
    assert len(texts) > 2000
    assert 3.2e6 < sum(len(t.encode()) for t in texts) < 3.6e6
    assert all(len(t.strip()) > 100 for t in texts)


def test_a_fingerprint_changes_with_the_text(tmp_path):
    around, found = "x" * 2_100_000, []  # as many bytes, and the same at both ends
    for word in ("one", "two", "two"):
        path = write_jsonl(tmp_path / "a.jsonl", [around, word, around])
        found.append(fingerprint(TextConfig(path=str(path))))
    assert found[0] != found[1] == found[2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hooks": ()}, "name at least one"),
        ({"skip_first": 8, "seq_len": 8}, "leaves nothing"),
        ({"heldout_fraction": 0.0}, "heldout_fraction > 0"),
        ({"seq_length": 8}, "nearest: seq_len"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_bad_harvest_configs_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        HarvestConfig.parse(values)


def byte_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """A tokenizer of bytes: the byte-level alphabet with some merges, or "<0xE6>" where a word is unknown."""
    if kind == "level":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        letters = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=290, special_tokens=["</s>"], initial_alphabet=letters
        )
        made.train_from_iterator(["a 日 本 日本 é"] * 9, trainer)
    else:
        names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "日"]
        vocab = {name: i for i, name in enumerate(names)}
        made = Tokenizer(models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
        made.normalizer = normalizers.Replace(" ", "▁")
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>")


@pytest.mark.parametrize("kind", ["level", "fallback"])
def test_characters_split_over_tokens_stand_whole_in_any_cut(kind):
    tokenizer = byte_tokenizer(kind)
    texts = decode_table(tokenizer, range(len(tokenizer)))
    letters = st.text(st.sampled_from("ab 日本é👩\u200d�ก\n") | st.characters(codec="utf-8"))

    @settings(max_examples=60)
    @given(letters, st.integers(0, 40), st.integers(0, 40))
    def check(text: str, a: int, b: int) -> None:
        a, b = sorted((a, b))
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        tokens = [texts[i] for i in ids]
        assert "".join(joined(tokens)) == text == tokenizer.decode(ids)
        seen = joined(tokens, slice(a, b))
        assert len(seen) == len(tokens[a:b])
        assert "".join(seen) in text
        assert seen == [] or not tokens[a:b] or "".join(seen)  # a cut within a character shows it
        alone_seen = "".join(joined(tokens[a:b]))  # nothing known beyond the cut
        raw = b"".join(t if isinstance(t, bytes) else t.encode() for t in tokens[a:b])
        assert alone_seen == raw.decode("utf-8", "ignore")

    check()


def test_tokens_of_part_of_a_character_are_named_and_written_by_their_bytes():
    texts = {1: b"\xe6", 2: b" \xe6\x97", 3: " the", 4: b"\x97z\xe6"}
    assert texts_of(json.loads(json.dumps(texts_json(texts)))) == texts
    assert [alone(t) for t in texts.values()] == [
        "<0xE6>",
        " <0xE6><0x97>",
        " the",
        "<0x97>z<0xE6>",
    ]
    assert owner_of(["日", "", ""], 2) == "日"
    assert texts_of({"7": "\ufffd"}) == {7: "\ufffd"}  # stores of before there were bytes
    table = TokenTable(torch.tensor([[2, 1]]).int(), torch.tensor([2]).int(), texts)
    assert table.decode([3, 9]) == [" the", "<9>"]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "nested.json"])
def test_a_key_given_twice_is_refused_in_text_too(name, tmp_path):
    """Readers would not agree on which of the two texts is meant."""
    inner = '"m": {"a": 1, "a": 2}' if name == "nested.json" else '"text": "x"'
    row = f'{{{inner}, "text": "y"}}'
    (tmp_path / name).write_text(row if name == "a.jsonl" else f"[{row}]")
    with pytest.raises(UserError, match=r"key '(text|a)' is given twice"):
        list(documents(TextConfig(path=str(tmp_path / name))))
