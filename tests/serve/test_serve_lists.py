"""Lists of latents: search finds what is there, order and filters agree with a plain sort, pages cover all, once."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_fixture import EXPLANATION
from serve_world import D_SAE, arrays_of, latents_of, write_world

from wsae.core.errors import UserError
from wsae.report.charts import matched, spans, visible
from wsae.serve import build as stored
from wsae.serve import index as listing
from wsae.serve import schema
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.serve.index import Asked, Index, Served, asked, beside, find, match_of
from wsae.serve.pages import ALIKE, compared, worth


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_world(tmp_path_factory.mktemp("serve") / "run")


@pytest.fixture(scope="module")
def index(run: Path) -> Index:
    return Index(ensure_index(run, None, IndexConfig(neighbours=3))[0])


def all_pages(index: Index, member, ask: Asked) -> list[int]:
    out: list[int] = []
    for page in range(1, 100):
        found = find(index, member, asked({**ask.address(), "page": str(page)}, index))
        assert len(found.keys) <= listing.PER_PAGE
        out += found.keys
        if len(out) >= found.total or not found.keys:
            assert len(out) == found.total
            return out
    raise AssertionError("pages without end")


def texts(run: Path, member: str) -> dict[int, str]:
    found = {**latents_of(run, "interpretation", member)}
    for latent, entry in latents_of(run, "evaluation", member).items():
        found[latent] = {**found.get(latent, {}), **entry}
    return {
        latent: " ".join(
            [entry.get("explanation") or "", *("".join(c["tokens"]) for c in entry["contexts"])]
            + entry.get("tokens", [])
        )
        for latent, entry in found.items()
    }


def test_search_finds_the_planted_word_and_nothing_else(index: Index, run: Path):
    for query in ("Zyzzyvä", "zyzzyva", "ZYZZ", '"zyzzyva"', "zyzzyva  "):
        found = find(index, None, Asked(query=query))
        wanted = {
            schema.key_of(member.id, latent)
            for member in index.members
            for latent, text in texts(run, member.name).items()
            if "Zyzzyvä" in text
        }
        assert set(found.keys) == wanted
        assert found.total == len(index.members)
    assert find(index, None, Asked(query='"zyzz"')).total == 0, "a closed phrase is no beginning"


def test_what_is_worth_looking_at_and_two_members_agree_with_the_evaluation(
    index: Index, run: Path
):
    served = Served("first", run, index)
    arrays = {member.name: arrays_of(run, member.name) for member in index.members}
    alive = {name: found["density"] > 0 for name, found in arrays.items()}
    kept = np.zeros(D_SAE)
    for name, found in arrays.items():
        if name != "plain":
            np.maximum.at(kept, found["match_index"].astype(int), found["match_cosine"])
    lists = worth(served)
    for slug, found in arrays.items():
        told = {entry["name"]: entry for entry in lists[slug]}
        alike = kept if slug == "plain" else found["match_cosine"]
        wanted = {
            "Lost" if slug == "plain" else "Gained": alive[slug] & (alike <= ALIKE),
            "Dense": found["density"] >= 0.1,
            "Copies": alive[slug] & (found["decoder_max_cosine"] >= 0.9),
            "Dead": ~alive[slug],
        }
        for name, mask in wanted.items():
            assert told.get(name, {"total": 0})["total"] == mask.sum(), (slug, name)
        entry = told.get("Gained") or told["Lost"]
        latents = [one["latent"] for one in entry["latents"]]
        best = sorted(np.flatnonzero(wanted[entry["name"]]), key=lambda j: -found["variance"][j])
        assert latents == best[: len(latents)]
    one, other = (arrays[name] for name in ("variance-a1", "variance-a0.5"))
    pairs = {
        (i, j)
        for i in range(D_SAE)
        for j in range(D_SAE)
        if one["match_index"][i] == other["match_index"][j]
        and min(one["match_cosine"][i], other["match_cosine"][j]) >= ALIKE
        and alive["variance-a1"][i]
        and alive["variance-a0.5"][j]
    }
    view = compared(served, *(index.by_slug[name] for name in ("variance-a1", "variance-a0.5")))
    assert view["counts"] == {
        "both": len(pairs),
        "only_a": int(
            alive["variance-a1"].sum() - sum(alive["variance-a1"][i] for i in {i for i, _ in pairs})
        ),
        "only_b": int(
            alive["variance-a0.5"].sum()
            - sum(alive["variance-a0.5"][j] for j in {j for _, j in pairs})
        ),
    }
    twin = compared(served, index.by_slug["plain"], index.by_slug["variance-a1"])
    live = alive["variance-a1"] & alive["plain"][one["match_index"].astype(int)]
    assert twin["counts"]["both"] == ((one["match_cosine"] >= ALIKE) & live).sum()
    assert live.sum() < D_SAE, "some are dead, and the dead are alike from the start"
    assert {(p["b"]["latent"], p["a"]["latent"]) for p in twin["both"]} <= {
        (i, int(one["match_index"][i])) for i in range(D_SAE)
    }
    turned = compared(served, index.by_slug["variance-a1"], index.by_slug["plain"])
    sides = {"both": "both", "only_a": "only_b", "only_b": "only_a"}
    assert turned["counts"] == {side: twin["counts"][other] for side, other in sides.items()}
    assert {(p["a"]["latent"], p["b"]["latent"]) for p in turned["both"]} <= {
        (i, int(one["match_index"][i])) for i in range(D_SAE)
    }
    alone = compared(served, index.by_slug["plain"], index.by_slug["plain"])
    assert not alone["paired"], "nothing was matched with itself"
    assert alone["counts"] == {}


def test_search_finds_words_of_scripts_without_spaces_in_the_midst_of_a_sentence(tmp_path: Path):
    connection = schema.create(tmp_path / "x.sqlite", 0)
    for said in (
        "the whale 日本語で話す naïve",
        "語本日 is another order",
        "ภาษาไทย and 한국어입니다",
    ):
        connection.execute("INSERT INTO words VALUES(?, ?, ?)", stored.texts({}, [said]))

    def found(query: str) -> list[int]:
        sql = "SELECT rowid FROM words WHERE words MATCH ?"
        return [key for (key,) in connection.execute(sql, (match_of(query),))]

    for query in ("日本語", "本語", "語で話", "日", "whale 話す", "naive 日本", '"日本語"'):
        assert found(query) == ([1, 2] if query == "日" else [1]), query
    assert (found("語"), found("ภาษา"), found("국어"), found("日語")) == ([1, 2], [3], [3], [])
    connection.close()


@pytest.mark.parametrize("query", ["whale", "captain storm", "words about ships", "explanation"])
def test_all_words_must_occur(index: Index, run: Path, query: str):
    import re

    for member in index.members:
        wanted = []
        for latent, text in texts(run, member.name).items():
            words = re.findall(r"[^\W_]+", text.lower())
            *whole, last = query.split()
            if all(w in words for w in whole) and any(w.startswith(last) for w in words):
                wanted.append(schema.key_of(member.id, latent))
        assert all_pages(index, member, Asked(query=query)) == sorted(wanted)
    assert "ships" in EXPLANATION


@settings(max_examples=150)
@given(st.text(max_size=60))
def test_no_text_is_an_error_of_syntax(index: Index, text: str):
    found = find(index, None, Asked(query=text.strip()))
    assert 0 <= len(found.keys) <= found.total <= 3 * D_SAE


@pytest.mark.parametrize(
    "query",
    [
        '"',
        '""',
        "AND",
        "OR NOT",
        "NEAR(a b)",
        "a*",
        "^b",
        "col:c",
        "-d",
        "(",
        "'; DROP TABLE latent; --",
        "\0",
    ],
)
def test_operators_are_words(index: Index, query: str):
    before = find(index, None, Asked()).total
    found = find(index, None, Asked(query=query))
    assert found.total <= before
    if match_of(query) is None:
        assert found.total == 0
    assert find(index, None, Asked()).total == before == 3 * D_SAE


def plain_order(index: Index, member, sort: str, down: bool) -> list[int]:
    low, high = member.keys
    rows = [(k, index.numbers([k])[k]) for k in range(low, high + 1)]

    def place(row: tuple[int, dict]) -> tuple:
        value = row[0] if sort == "latent" else row[1][sort]
        missing = value is None
        return (missing, 0 if missing else -value if down else value, row[0])

    return [k for k, _ in sorted(rows, key=place)]


@pytest.mark.parametrize("down", [False, True])
def test_every_sort_is_a_plain_sort_with_missing_values_last(index: Index, down: bool, monkeypatch):
    monkeypatch.setattr(listing, "PER_PAGE", 7)
    member = index.by_slug["variance-a1"]
    for sort in ("latent", *index.column):
        wanted = plain_order(index, member, sort, down)
        assert all_pages(index, member, Asked(sort=sort, down=down)) == wanted, sort


WALKS = {
    "all": Asked(),
    "density": Asked(sort="density", down=True),
    "missing": Asked(sort="embedding"),
    "searched": Asked(query="whale", sort="variance"),
    "alive": Asked(alive="yes", sort="match", down=True),
}


@pytest.mark.parametrize("ask", WALKS.values(), ids=WALKS)
def test_next_and_previous_walk_the_list(index: Index, ask: Asked):
    for scope in (None, index.by_slug["plain"]):
        order = all_pages(index, scope, ask)
        assert len(order) > 3
        for before, here, after in zip([None, *order], order, [*order[1:], None], strict=False):
            assert beside(index, scope, ask, here) == (before, after)


@settings(max_examples=60)
@given(st.data())
def test_filters_keep_exactly_what_lies_between(index: Index, data: st.DataObject):
    key = data.draw(st.sampled_from(list(index.column)))
    member = data.draw(st.sampled_from([None, *index.members]))
    low, high = (data.draw(st.none() | st.floats(-1, 5, width=16)) for _ in "lh")
    alive, shown = (
        data.draw(st.sampled_from(listing.ALIVE)),
        data.draw(st.sampled_from(listing.SHOWN)),
    )
    ask = Asked(
        alive=alive,
        shown=shown,
        low={} if low is None else {key: low},
        high={} if high is None else {key: high},
    )
    scope = index.members if member is None else [member]
    wanted = []
    for k in (k for m in scope for k in range(m.keys[0], m.keys[1] + 1)):
        value, fired = index.numbers([k])[k][key], index.state(k)[0]
        bounded = low is None and high is None
        inside = (
            value is not None and (low is None or value >= low) and (high is None or value <= high)
        )
        kept = (alive == "any" or fired == (alive == "yes")) and (
            shown == "any" or bool(index.record(k))
        )
        if kept and (bounded or inside):
            wanted.append(k)
    assert all_pages(index, member, ask) == wanted


def test_an_address_says_what_was_asked(index: Index):
    ask = Asked(
        "a b", "density", True, "yes", "contexts", {"gamma": 0.123456789}, {"variance": 2.0}, 3
    )
    assert asked(ask.address(), index) == ask
    assert ask.address()["max.variance"] == "2"
    assert Asked().address() == {}


@pytest.mark.parametrize(
    ("params", "told"),
    [
        ({"sort": "densty"}, "sort: no measure 'densty' (nearest: density"),
        ({"sort": "density; DROP TABLE latent"}, "sort: no measure"),
        ({"page": "0"}, "page: '0' is not a whole number from 1"),
        ({"page": "1e3"}, "page: '1e3'"),
        ({"page": "٣"}, "page: '٣'"),
        ({"alive": "maybe"}, "alive: 'maybe' is not one of any, yes, no"),
        ({"min.density": "nan"}, "min.density: 'nan' is not a number"),
        ({"max.density": "x"}, "max.density: 'x' is not a number"),
        ({"min.m0": "1"}, "min.: no measure 'm0'"),
        ({"q": "x" * 201}, "q: longer than 200 characters"),
    ],
)
def test_a_parameter_that_is_not_valid_is_named(index: Index, params: dict, told: str):
    with pytest.raises(UserError) as error:
        asked(params, index)
    assert str(error.value).startswith(told)


def test_pieces_carry_the_whole_text_and_shade_by_activation(run: Path):
    for entry in latents_of(run, "evaluation", "plain").values():
        for context in entry["contexts"]:
            found = spans(context, entry["max"], ["whale"])
            whole = visible("".join(context["tokens"]))
            assert "".join(p.text for p in found).lstrip(" ") == whole.lstrip(" ")
            shaded = [p for p in found if p.level]
            acts = [a for a in context["acts"] if a > 0]
            levels = [math.ceil(6 * a / entry["max"] - 1e-12) for a in acts]
            assert [p.level for p in shaded] == [max(1, min(6, level)) for level in levels]
            assert sum(p.peak for p in found) == 1


def test_a_token_that_continues_a_character_is_marked_where_it_fires():
    context = {"tokens": ["日", "", "", " sea"], "acts": [0.0, 0.0, 2.0, 1.0], "peak": 2}
    shown = spans(context, 2.0, [])
    assert [(p.text, p.level, p.peak) for p in shown[:2]] == [("日", 0, False), ("⋯", 6, True)]
    assert stored.label({"contexts": [context]}) == "fires on “日”"


def test_marks_cover_words_across_tokens():
    assert matched([" wha", "le", " sea"], ["whale"]) == {0, 1}
    assert matched([" whale", " sea"], ["whale sea"]) == {0, 1}
    assert matched([" sea"], [""]) == set()
    assert matched([" Ca", "fé", "s"], ["CAFE"]) == {0, 1}
    assert matched([" cafe"], ["Cafe\u0301"]) == {0}


def test_hidden_characters_stand_by_name():
    assert visible("a\u202eb\x00\n\t\ud800") == "a⟨202E⟩b⟨0000⟩↵⇥⟨D800⟩"
