"""Documents and conversations become sequences of tokens, and whose words a role said."""

import json
from pathlib import Path

import numpy as np
import pytest
from acts_models import config, make_text, make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.text import REFUSED, Packer, Position, documents
from wsae.acts.tokens import decode_table
from wsae.core.errors import UserError


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return str(make_text(tmp_path_factory.mktemp("text") / "a.jsonl"))


def texts(path: str) -> list[str]:
    return [json.loads(line)["text"] for line in Path(path).read_text().splitlines()]


@pytest.mark.parametrize("bos", [False, True])
def test_packed_sequences_are_the_joined_documents(text, bos):
    tokenizer, cfg = make_tokenizer(bos), config(text)
    halves = {held: list(Packer(cfg, tokenizer, held).sequences()) for held in (False, True)}
    got = []
    for sequences in halves.values():
        for s in sequences:
            ids = s.ids[: s.length].tolist()
            assert not bos or ids[0] == tokenizer.bos_token_id
            got += ids[1:] if bos else ids
            assert (s.ids[s.length :] == tokenizer.pad_token_id).all()
        assert all(s.length == 16 for s in sequences[:-1])
    documents = [
        [*tokenizer(t, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        for t in texts(text)
    ]
    assert len(got) == sum(map(len, documents))
    joined = " ".join(map(str, got))
    assert all(" ".join(map(str, d)) in joined for d in documents)


def test_unpacked_sequences_are_one_truncated_document_each(text):
    tokenizer, cfg = (
        make_tokenizer(),
        config(text, pack=False, heldout_fraction=0.0, heldout_tokens=0),
    )
    sequences = list(Packer(cfg, tokenizer, heldout=False).sequences())
    assert len(sequences) == len(texts(text))
    for s, t in zip(sequences, texts(text), strict=True):
        assert s.ids[: s.length].tolist() == tokenizer(t)["input_ids"][:16]


TALK = [[("user", "the cat"), ("assistant", "sat")], [("system", "a mat")], [("user", "ran")]]
TEMPLATE = (
    "{{ bos_token }}{{ strftime_now('%d %b %Y') }} {{ date_string }}\n{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}{{ m.content }}|{% endfor %}</s>"
)


@pytest.mark.parametrize("template", [None, TEMPLATE, "{{ raise_exception('nothing') }}"])
def test_conversations_are_read_as_the_models_chat_template_writes_them(tmp_path, template):
    rows = [[{"role": role, "content": text} for role, text in turns] for turns in TALK]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(json.dumps({"messages": row}) for row in rows))
    tokenizer = make_tokenizer(bos=True)
    tokenizer.chat_template = template
    cfg = HarvestConfig(
        text=TextConfig(path=str(path), field="messages"), seq_len=99, heldout_tokens=0, heldout_fraction=0
    )  # fmt: skip
    packer = Packer(cfg, tokenizer, heldout=False)
    if template is not None and "nothing" in template:
        with pytest.raises(UserError, match="chat template refuses all"):
            list(packer.sequences())
        return
    (sequence,) = packer.sequences()
    day = "26 Jul 2024 26 Jul 2024\n"
    whole = ["user: the cat\nassistant: sat", "system: a mat", "user: ran"]
    texts = whole if template is None else [f"{day}the cat|sat|", f"{day}ran|"]
    assert tokenizer.decode(sequence.ids[: sequence.length]) == "<s>" + "".join(
        f"{text}</s>" for text in texts
    )
    refused = [packer.refuses(d) for d in documents(cfg.text)]
    assert refused == ([""] * 3 if template is None else ["", REFUSED, ""])


CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>\n{% endfor %}"
)
TRIMMED = (
    "{% for m in messages %}[{{ m.role }}] {{ m.content | trim }}"
    "{% if not loop.last %} ;; {% endif %}{% endfor %}"
)
MERGED = (  # the system's words stand before the last user's, and old thoughts are not written
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}[INST] {% if messages[0].role == 'system' "
    "and loop.index >= loop.length - 1 %}{{ messages[0].content }}\n\n{% endif %}{{ m.content }}[/INST]"
    "{% else %} {{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
)
SPOKEN = st.lists(
    st.sampled_from([*"ab\n |<>", "</s>", "<|user|>\n", "</s>\n<|assistant|>\n"]), max_size=6
).map("".join)


def masked(turns, template, roles, tmp_path) -> tuple[str, list[str], Packer]:
    """Return the text of one conversation and the runs of tokens that are kept in it."""
    path, tokenizer = tmp_path / "talk.jsonl", make_tokenizer()
    rows = [{"role": role, "content": text} for role, text in turns]
    path.write_text(json.dumps({"messages": rows}) + "\n")
    tokenizer.chat_template = template
    packer = Packer(
        HarvestConfig(text=TextConfig(path=str(path), field="messages"), seq_len=999, roles=roles,
                      pack=False, heldout_tokens=0, heldout_fraction=0), tokenizer, heldout=False
    )  # fmt: skip
    (sequence,) = packer.sequences()
    ids, said = sequence.ids[: sequence.length], sequence.said[: sequence.length]
    assert not sequence.said[sequence.length :].any()
    parts = np.split(np.arange(len(ids)), np.flatnonzero(np.diff(said)) + 1)
    kept = [tokenizer.decode(ids[part]) for part in parts if len(part) and said[part[0]]]
    return tokenizer.decode(ids), kept, packer


@pytest.mark.parametrize("template", [CHATML, TRIMMED, MERGED])
def test_the_words_of_a_role_are_marked_where_the_template_writes_them(tmp_path, template):
    turns = [("system", "be kind"), ("user", "the [INST] cat?"), ("assistant", "<think>hm</think>it sat"),
             ("user", "sat user"), ("assistant", "ran on a mat")]  # fmt: skip
    kept = masked(turns, template, ("assistant",), tmp_path)[1]
    first = "it sat" if template == MERGED else "<think>hm</think>it sat"
    assert [k.strip() for k in kept] == [first, "ran on a mat"]
    kept = masked(turns, template, ("system",), tmp_path)[1]
    assert [k.strip() for k in kept] == ["be kind"]


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from(["user", "assistant"]), SPOKEN), min_size=1, max_size=4))
def test_marked_tokens_are_those_that_the_library_calls_the_assistants(tmp_path_factory, turns):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    rows = [{"role": role, "content": text} for role, text in turns]
    theirs = tokenizer.apply_chat_template(
        rows, return_dict=True, return_assistant_tokens_mask=True, add_special_tokens=False
    )
    packed = tmp_path_factory.mktemp("talk", numbered=True)
    path = packed / "talk.jsonl"
    path.write_text(json.dumps({"messages": rows}) + "\n")
    cfg = HarvestConfig(
        text=TextConfig(path=str(path), field="messages"), seq_len=999, pack=False, roles=("assistant",)
    )  # fmt: skip
    (found,) = (Packer(cfg, tokenizer, heldout=False).whole(d, 0) for d in documents(cfg.text))
    assert found.ids[: found.length].tolist() == theirs["input_ids"]
    assert found.said[: found.length].astype(int).tolist() == theirs["assistant_masks"]


def test_roles_need_conversations_a_template_and_turns_that_can_be_told_apart(tmp_path):
    turns = [("user", "the cat"), ("assistant", "sat")]
    for template, message in (
        (None, "has no chat template"),
        (
            "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}",
            "cannot be told apart",
        ),
        ("{{ raise_exception('no') }}", "refuses all 1 conversations"),
    ):
        with pytest.raises(UserError, match=message):
            masked(turns, template, ("assistant",), tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.chat_template = CHATML
    for row in ({"messages": "plain"}, {"messages": [4, 5]}):
        (tmp_path / "b.jsonl").write_text(json.dumps(row) + "\n")
        text = TextConfig(path=str(tmp_path / "b.jsonl"), field="messages")
        cfg = HarvestConfig(text=text, roles=("user",), heldout_fraction=0, heldout_tokens=0)
        with pytest.raises(UserError, match="document 0: field 'messages' holds no conversation"):
            list(Packer(cfg, tokenizer, heldout=False).sequences())


def test_token_ids_are_taken_as_they_are_and_must_be_the_tokenizers(tmp_path):
    path, tokenizer = tmp_path / "a.jsonl", make_tokenizer(bos=True)
    path.write_text('{"input_ids": [0, 40, 41]}\n{"input_ids": []}\n{"input_ids": [42, 1]}\n')
    text = TextConfig(path=str(path), field="input_ids")
    cfg = HarvestConfig(text=text, seq_len=16, heldout_tokens=0, heldout_fraction=0)
    (sequence,) = Packer(cfg, tokenizer, heldout=False).sequences()
    assert sequence.ids[: sequence.length].tolist() == [0, 40, 41, 1, 42, 1]
    path.write_text('{"input_ids": [5]}\n{"input_ids": [50256]}\n')
    with pytest.raises(UserError, match="document 1: token id 50256, but .* ids up to"):
        list(Packer(cfg, tokenizer, heldout=False).sequences())


@pytest.mark.parametrize("pack", [True, False])
def test_a_position_continues_with_the_very_next_sequence(text, pack):
    packer = Packer(config(text, pack=pack), make_tokenizer(), heldout=False)
    sequences = list(packer.sequences())
    assert [s.after.sequence for s in sequences] == list(range(1, len(sequences) + 1))
    for k in range(0, len(sequences), 7):
        rest = list(packer.sequences(Position(*sequences[k].after)))
        assert [s.ids.tolist() for s in rest] == [s.ids.tolist() for s in sequences[k + 1 :]]
        assert [s.after for s in rest] == [s.after for s in sequences[k + 1 :]]


def test_empty_documents_give_no_tokens(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n' * 5)
    for pack in (True, False):
        cfg = config(str(path), pack=pack, heldout_fraction=0.0, heldout_tokens=0)
        assert list(Packer(cfg, make_tokenizer(), heldout=False).sequences()) == []


def test_token_strings_keep_their_spaces():
    tokenizer = make_tokenizer()
    ids = tokenizer("the cat sat</s>", add_special_tokens=False)["input_ids"]
    table = decode_table(tokenizer, sorted(set(ids)))
    assert "".join(table[i] for i in ids) == "the cat sat</s>"
    assert np.array(ids).dtype.kind == "i"
