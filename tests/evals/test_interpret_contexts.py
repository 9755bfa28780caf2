"""Collected contexts against plain Python on all rows, whatever the split; sides, silence, memory, bad input."""

from typing import NamedTuple

import numpy as np
import pytest
import torch
from acts_models import make_model, make_text
from hypothesis import given, settings
from hypothesis import strategies as st

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.harvest import harvest
from wsae.acts.live import LiveSource
from wsae.acts.source import HeldoutRows, MatrixRows, StoreSource
from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.core.seeds import seed_for
from wsae.evals.config import ContextConfig
from wsae.evals.interpret.collect import NEIGHBOURS, Pool, Tracked, collect, member_bytes, priority
from wsae.evals.interpret.windows import EXPLAIN, SCORE, Documents, blocks, cut_windows, side_of
from wsae.evals.latents import Context
from wsae.sae import SAE, ReLU, SAEConfig, TopK

HOOK, D_IN, D_SAE, END = "layers.1", 4, 14, 0


class Text:
    """Random sequences with document ends, and integer activations of most of their tokens."""

    def __init__(self, seed=0, n_seq=24, seq_len=10, end=0.06, keep=0.8):
        rng = np.random.default_rng(seed)
        ids = rng.integers(1, 30, (n_seq, seq_len)).astype(np.int32)
        ids[rng.random((n_seq, seq_len)) < end] = END
        ids[0, 0] = 1
        lengths = rng.integers(1, seq_len + 1, n_seq) if seed % 3 == 0 else np.full(n_seq, seq_len)
        kept = (rng.random(ids.shape) < keep) & (ids != END)
        kept &= np.arange(seq_len) < lengths[:, None]
        seq, pos = (torch.from_numpy(a) for a in kept.nonzero())
        self.seq, self.pos = seq, pos
        self.x = torch.from_numpy(rng.integers(-2, 3, (len(seq), D_IN))).float()
        self.table = TokenTable(
            torch.from_numpy(ids),
            torch.from_numpy(lengths).int(),
            {i: f" t{i}" for i in range(30)},
            (END,),
        )
        self.hooks, self.passes = {HOOK: D_IN}, 0

    def heldout(self, batch_size):
        self.passes += 1
        for first in range(0, len(self.x), batch_size):
            part = slice(first, first + batch_size)
            yield HeldoutRows({HOOK: self.x[part]}, self.seq[part], self.pos[part])

    def tokens(self):
        return self.table


def whole_sae(seed=0, d_sae=D_SAE, bias=-2.0) -> SAE:
    """A ReLU SAE that computes whole numbers, so that nothing depends on the order of sums."""
    sae = SAE(SAEConfig(d_in=D_IN, d_sae=d_sae, activation=ReLU()), seed=seed)
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        sae.W_enc_t.copy_(torch.randint(-1, 2, (d_sae, D_IN), generator=g).float())
        sae.b_enc.fill_(bias)
    return sae.requires_grad_(False)


def settings_of(**values) -> ContextConfig:
    small = {
        "width": 4,
        "n_latents": 50,
        "min_windows": 2,
        "n_top": 2,
        "n_quantile": 3,
        "n_score": 3,
        "n_hard": 3,
        "reservoir": 5,
        "pool": 9,
    }
    return ContextConfig(**{**small, **values})


# ---- the reference: one token after another


class Window(NamedTuple):
    number: int
    document: int
    acts: dict[int, list[float]]


def reference_windows(text: Text, sae: SAE, cfg: ContextConfig):
    """Return the windows of each side and how many straddle, from the dense codes of all rows."""
    ids, lengths = text.table.ids.tolist(), text.table.lengths.tolist()
    z = sae.encode(text.x)
    at = {
        (s, p): z[i]
        for i, (s, p) in enumerate(zip(text.seq.tolist(), text.pos.tolist(), strict=True))
    }
    last = max(at)
    sides, straddling, document = ([], []), 0, 0
    per_seq = -(-text.table.ids.shape[1] // cfg.width)
    for s, (row, length) in enumerate(zip(ids, lengths, strict=True)):
        numbers = []
        for token in row[:length]:
            numbers.append(document)
            document += token == END
        for start in range(0, length, cfg.width):
            span = range(start, min(start + cfg.width, length))
            rows = [at.get((s, p)) for p in span]
            cut = (s, start) <= last < (s, span[-1])
            if cut or all(r is None for r in rows):
                continue
            if len({numbers[p] for p in span}) > 1:
                straddling += 1
                continue
            dense = torch.zeros(cfg.width, sae.cfg.d_sae)
            for offset, r in enumerate(rows):
                if r is not None:
                    dense[offset] = r
            acts = {j: dense[:, j].tolist() for j in range(sae.cfg.d_sae) if dense[:, j].any()}
            window = Window(s * per_seq + start // cfg.width, numbers[start], acts)
            sides[side_of(np.array([window.document]), seed_for(cfg.seed, "sides"))[0]].append(
                window
            )
    return sides, straddling


def by_priority(windows, cfg, latent=-1):
    rank = priority(cfg.seed, np.array([w.number for w in windows], dtype=np.int64), latent)
    return [windows[i] for i in np.argsort(rank)]


def strongest(windows, latent):
    return sorted(windows, key=lambda w: (-max(w.acts[latent]), w.number))


def numbers_of(collected, shown, cfg, per_seq):
    windows = collected.windows
    return (windows.seq[shown.window] * per_seq + windows.start[shown.window] // cfg.width).tolist()


def assert_spread(found: list[int], pool: list[Window], latent: int, n: int):
    """Check that `found` is one window of each of n equal-count quantiles of the pool, or all of it."""
    ranked = [w.number for w in strongest(pool, latent)]
    if len(ranked) <= n:
        assert found == ranked
        return
    place = [ranked.index(number) for number in found]
    for i, p in enumerate(place):
        assert i * len(ranked) // n <= p < (i + 1) * len(ranked) // n


@settings(max_examples=40)
@given(st.integers(0, 10**6), st.integers(1, 90), st.sampled_from([3, 4, 10]), st.integers(0, 2))
def test_every_window_of_every_role_equals_the_reference(seed, batch_size, width, n_top):
    text, sae = Text(seed), whole_sae(seed)
    cfg = settings_of(width=width, n_top=n_top, seed=seed)
    (explain, score), straddling = reference_windows(text, sae, cfg)
    if not explain or not score:
        with pytest.raises(UserError):
            collect(text, {HOOK: {"sae": sae}}, cfg, batch_size)
        return
    found = collect(text, {HOOK: {"sae": sae}}, cfg, batch_size)[HOOK]["sae"]
    assert text.passes == 1
    assert found.counts == {
        "explain": len(explain),
        "score": len(score),
        "straddling": straddling,
    }
    z, pool = sae.encode(text.x), by_priority(score, cfg)[: cfg.pool]
    per_seq = -(-text.table.ids.shape[1] // width)
    units = torch.nn.functional.normalize(sae.W_dec, dim=1)
    alive = (z > 0).any(0)
    reasons = {}
    shown = {c.latent: c for c in found.latents}
    for j in alive.nonzero()[:, 0].tolist():
        mine = [[w for w in side if j in w.acts] for side in (explain, score)]
        silent = by_priority([w for w in pool if j not in w.acts], cfg, j)
        random = [by_priority(side, cfg, j)[: cfg.reservoir] for side in mine]
        n_positive = min(cfg.n_score, len(random[SCORE]))
        if min(map(len, mine)) < cfg.min_windows or len(silent) < n_positive:
            few = min(map(len, mine)) < cfg.min_windows
            reason = "few windows" if few else "few silent windows"
            reasons[reason] = reasons.get(reason, 0) + 1
            assert j not in shown
            continue
        c = shown[j]
        assert c.density == pytest.approx(float((z[:, j] > 0).double().mean()))
        assert c.peak == float(z[:, j].max())
        assert_spread(numbers_of(found, c.positive, cfg, per_seq), random[SCORE], j, cfg.n_score)
        top = [w.number for w in strongest(mine[EXPLAIN], j)[:n_top]]
        told = numbers_of(found, c.explain, cfg, per_seq)
        assert set(top) <= set(told)
        rest = [w for w in random[EXPLAIN] if w.number not in top]
        assert_spread([n for n in told if n not in top], rest, j, cfg.n_quantile)
        order = {w.number: i for i, w in enumerate(strongest(mine[EXPLAIN], j))}
        assert sorted(told, key=order.__getitem__) == told
        for role, side in ((c.explain, explain), (c.positive, score)):
            acts = {w.number: w.acts[j] for w in side if j in w.acts}
            assert role.acts.tolist() == [acts[n] for n in numbers_of(found, role, cfg, per_seq)]
        assert numbers_of(found, c.negative, cfg, per_seq) == [
            w.number for w in silent[:n_positive]
        ]
        cosine = (units @ units[j]).masked_fill(~alive, -9)
        cosine[j] = -9
        near = [k for k in cosine.argsort(descending=True)[:NEIGHBOURS].tolist() if cosine[k] > -9]
        hard = [
            (min(near.index(k) for k in near if k in w.acts), i, w.number)
            for i, w in enumerate(silent[n_positive:])
            if any(k in w.acts for k in near)
        ]
        assert numbers_of(found, c.hard, cfg, per_seq) == [
            n for _, _, n in sorted(hard)[: cfg.n_hard]
        ]
        assert not c.negative.acts.any()
        assert not c.hard.acts.any()
    assert found.skipped == reasons


def plain(collected):
    """Return a collection as comparable values."""
    w = collected.windows
    latents = [
        (c.latent, c.density, c.peak)
        + tuple(
            (r.window.tolist(), r.acts.tolist())
            for r in (c.explain, c.positive, c.negative, c.hard)
        )
        for c in collected.latents
    ]
    columns = (w.ids.tolist(), w.seq.tolist(), w.start.tolist(), w.document.tolist())
    return latents, columns, collected.skipped, collected.counts


@settings(max_examples=15)
@given(
    st.integers(0, 10**6), st.lists(st.integers(1, 200), min_size=2, max_size=3), st.integers(1, 6)
)
def test_the_split_of_the_rows_does_not_matter(seed, sizes, n_latents):
    cfg = settings_of(n_latents=n_latents, reservoir=3, seed=seed)
    members = {HOOK: {"a": whole_sae(seed), "b": whole_sae(seed + 1, d_sae=40)}}
    text = Text(1 + 3 * (seed % 1000), n_seq=40)
    one, *others = [collect(text, members, cfg, size)[HOOK] for size in sizes]
    for other in others:
        assert {k: plain(c) for k, c in one.items()} == {k: plain(c) for k, c in other.items()}
    assert one["a"].windows is one["b"].windows


def test_windows_hold_their_own_text_each_once_and_the_sides_share_no_document():
    text, cfg = Text(0, n_seq=60), settings_of(width=4)
    found = collect(text, {HOOK: {"sae": whole_sae()}}, cfg)[HOOK]["sae"]
    windows = found.windows
    places = list(zip(windows.seq.tolist(), windows.start.tolist(), strict=True))
    assert len(set(places)) == len(windows)
    for i, (s, start) in enumerate(places):
        stop = min(start + 4, int(text.table.lengths[s]))
        ids = text.table.ids[s, start:stop].tolist()
        assert windows.ids[i].tolist() == ids + [-1] * (4 - len(ids))
        assert windows.text(i) == "".join(f" t{j}" for j in ids)
    told = {d for c in found.latents for d in windows.document[c.explain.window].tolist()}
    asked = {
        d
        for c in found.latents
        for role in (c.positive, c.negative, c.hard)
        for d in windows.document[role.window].tolist()
    }
    assert told
    assert asked
    assert not told & asked


# ---- documents


def table(rows, ends=(END,), lengths=None):
    ids = torch.tensor(rows, dtype=torch.int32)
    lengths = torch.full((len(ids),), ids.shape[1]) if lengths is None else torch.tensor(lengths)
    return TokenTable(ids, lengths.int(), {}, ends)


def documents_at(t: TokenTable) -> list[list[int]]:
    seq = torch.arange(len(t.ids)).repeat_interleave(t.ids.shape[1]).numpy()
    start = np.tile(np.arange(t.ids.shape[1]), len(t.ids))
    return Documents(blocks(t)).of(seq, start, 1).first.reshape(t.ids.shape).tolist()


def test_a_document_runs_on_over_sequences_and_ends_with_its_end_token():
    assert documents_at(table([[5, 6, 7], [8, 0, 9], [9, 9, 0], [1, 0, 2]])) == [
        [0, 0, 0],
        [0, 0, 1],
        [1, 1, 1],
        [2, 2, 3],
    ]


def test_the_token_before_every_sequence_is_no_end_even_where_it_is_the_same_token():
    assert documents_at(table([[0, 5, 6], [0, 7, 0], [0, 8, 9]])) == [
        [0, 0, 0],
        [0, 0, 0],
        [1, 1, 1],
    ]


def test_padding_ends_nothing_and_without_ends_each_sequence_is_a_document():
    padded = Documents(blocks(table([[5, 0, 0], [6, 6, 6]], lengths=[2, 3])))
    assert padded.of(np.array([0, 1]), np.array([0, 0]), 3).last.tolist() == [0, 1]
    assert documents_at(table([[5, 6], [7, 8]], ends=())) == [[0, 0], [1, 1]]


@given(st.integers(0, 2**62))
def test_both_sides_get_half_of_the_documents_and_the_key_decides(key):
    side = side_of(np.arange(1000), key)
    assert side.reshape(-1, 2).sum(1).tolist() == [1] * 500
    assert 350 < (side[::2] != side_of(np.arange(1000), key ^ 12345)[::2]).sum() + 200 < 550


# ---- which latents


def test_latents_that_fire_late_are_as_likely_to_be_shown():
    text = Text(1, n_seq=60)
    text.x[:, 0] = (text.seq >= 30).float() * 3
    sae = SAE(SAEConfig(d_in=D_IN, d_sae=60, activation=ReLU()))
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        sae.W_enc_t.copy_(torch.randint(-1, 2, (60, D_IN), generator=g).float())
        sae.W_enc_t[:, 0] = torch.tensor([0.0, 9.0]).repeat(30)
        sae.b_enc.copy_(torch.tensor([-2.0, -27.0]).repeat(30))  # the odd ones fire late only
    late = []
    for seed in range(30):
        cfg = settings_of(n_latents=4, min_windows=1, seed=seed, pool=40)
        found = collect(text, {HOOK: {"sae": sae}}, cfg, 50)[HOOK]["sae"]
        late += [c.latent % 2 for c in found.latents]
    assert len(late) > 80
    assert 0.3 < np.mean(late) < 0.7


def test_given_latents_are_taken_in_their_order_and_dead_ones_are_counted():
    sae = whole_sae()
    with torch.no_grad():
        sae.b_enc[3] = -100
    wanted = torch.tensor([9, 3, 4])
    members = {HOOK: {"sae": sae}}
    cfg, text = settings_of(pool=60), Text(1, 60)
    found = collect(text, members, cfg, latents={HOOK: {"sae": wanted}})
    assert [c.latent for c in found[HOOK]["sae"].latents] == [9, 4]
    assert found[HOOK]["sae"].skipped == {"silent": 1}
    free = collect(text, members, cfg)[HOOK]["sae"]
    both = {c.latent: c for c in free.latents}
    for c in found[HOOK]["sae"].latents:
        assert c.positive.acts.tolist() == both[c.latent].positive.acts.tolist()


# ---- memory


@pytest.mark.parametrize("values", [{}, {"n_latents": 2, "pool": 3}, {"width": 10, "n_top": 0}])
def test_memory_is_what_the_formula_says_whatever_the_number_of_tokens(monkeypatch, values):
    made = []
    init = Tracked.__init__

    def noted(self, *args):
        init(self, *args)
        made.append(self)

    monkeypatch.setattr(Tracked, "__init__", noted)
    cfg, sae = settings_of(**values), whole_sae(d_sae=30)
    for n_seq in (20, 200):
        collect(Text(1, n_seq), {HOOK: {"sae": sae}}, cfg)
    given_ = {HOOK: {"sae": torch.arange(5)}}
    collect(Text(1, 200), {HOOK: {"sae": sae}}, cfg, latents=given_)
    wanted = member_bytes(cfg, 30)

    def size(member: Tracked) -> int:
        every = vars(member) | vars(member.reservoirs)
        lives = [a for name, a in every.items() if name not in handed_out]
        return sum(a.nbytes for a in lives if isinstance(a, np.ndarray | torch.Tensor))

    handed_out = ("given", "_order", "_sorted", "_is_top", "_is_random")
    assert [size(m) for m in made] == [wanted, wanted, member_bytes(cfg, 30, 5)]


@given(st.integers(1, 8), st.lists(st.integers(0, 30), max_size=12), st.integers(0, 99))
def test_the_pool_holds_the_smallest_priorities_and_slots_stay_true(size, cuts, seed):
    pool, where = Pool(size, seed), {}
    windows, first = np.arange(100) * 3, 0
    for cut in [*cuts, 100]:
        part = windows[first : first + cut]
        first += len(part)
        for window, slot in zip(part.tolist(), pool.admit(part).tolist(), strict=True):
            if slot >= 0:
                where[slot] = window
    best = windows[np.argsort(priority(seed, windows))][:size]
    assert sorted(pool.window.tolist()) == sorted(best.tolist())
    assert [where[slot] for slot in range(size)] == pool.window.tolist()


# ---- a real language model, small


@pytest.fixture(scope="module")
def harvested(tmp_path_factory):
    base = tmp_path_factory.mktemp("contexts")
    make_model(base / "model")
    make_text(base / "a.jsonl", documents=80)
    cfg = HarvestConfig(
        model=str(base / "model"),
        text=TextConfig(path=str(base / "a.jsonl")),
        hooks=("layers.0", "layers.2"),
        seq_len=24,
        batch_seqs=3,
        tokens=100,
        heldout_tokens=700,
        heldout_fraction=0.7,
    )
    harvest(cfg, base / "store")
    return cfg, base / "store"


class OnePass(LiveSource):
    """A live source that counts its passes over the held-out rows."""

    passes = 0

    def heldout(self, batch_size):
        self.passes += 1
        return super().heldout(batch_size)


def topk_members(hooks) -> dict[str, dict[str, SAE]]:
    cfg = SAEConfig(d_in=16, d_sae=32, activation=TopK(k=3))
    return {hook: {name: SAE(cfg, seed=i) for i, name in enumerate("ab")} for hook in hooks}


def test_store_and_live_model_give_the_same_contexts_in_one_pass_each(harvested):
    cfg, path = harvested
    contexts = settings_of(width=8, n_latents=12, pool=20)
    members = topk_members(cfg.hooks)
    live = OnePass(cfg)
    found = collect(live, members, contexts, 72)
    assert live.passes == 1
    again = collect(StoreSource(path), members, contexts, 72)
    for hook in cfg.hooks:
        for name in "ab":
            assert plain(found[hook][name]) == plain(again[hook][name])
            assert len(found[hook][name].latents) > 4
    assert found[cfg.hooks[0]]["a"].counts["straddling"] > 0
    ends = [i for i, text in live.tokens()._strings.items() if text == "</s>"]
    assert live.tokens().ends == StoreSource(path).tokens().ends == tuple(ends)


def test_silent_windows_are_silent_when_their_rows_are_encoded_again(harvested):
    cfg, path = harvested
    source, members = StoreSource(path), topk_members(cfg.hooks)
    found = collect(source, members, settings_of(width=8, pool=20), 50)
    n_silent = 0
    for hook in cfg.hooks:
        (chunk,) = source.heldout(10**6)
        z = members[hook]["a"].encode(chunk.x[hook])
        windows = found[hook]["a"].windows
        for c in found[hook]["a"].latents:
            for role, silent in ((c.negative, True), (c.hard, True), (c.positive, False)):
                for i in role.window.tolist():
                    inside = (chunk.seq == int(windows.seq[i])) & (
                        chunk.pos // 8 * 8 == int(windows.start[i])
                    )
                    assert inside.any()
                    assert bool((z[inside, c.latent] == 0).all()) == silent
                    n_silent += silent
    assert n_silent > 50


def test_a_store_from_before_document_ends_were_noted_reads_them_from_the_strings(harvested):
    _, path = harvested
    store = StoreSource(path).store
    noted = store.tokens("heldout").ends
    del store.info["document_ends"]
    assert noted
    assert store.tokens("heldout").ends == noted
    store.manifest.config["pack"] = False
    assert store.tokens("heldout").ends == ()


# ---- bad input


def refused(source, cfg=None, members=None, **values) -> str:
    with pytest.raises(UserError) as caught:
        collect(source, members or {HOOK: {"sae": whole_sae()}}, cfg or settings_of(), **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def text_of(rows, ends: tuple[int, ...] | None = (END,)) -> Text:
    """A text of these sequences, all tokens kept."""
    text = Text()
    text.table = table(rows, ends)
    text.seq, text.pos = (text.table.ids >= 0).nonzero(as_tuple=True)
    text.x = torch.ones(len(text.seq), D_IN)
    return text


def test_bad_input_is_refused_in_one_line_that_names_it():
    assert "array" in refused(MatrixRows(torch.ones(9, D_IN), HOOK))
    assert "no hook 'layers.1'; they have acts" in refused(MatrixRows(torch.ones(9, D_IN)))
    one = text_of([[5] * 8] * 4)
    assert "different documents" in refused(one)
    assert "lower the width" in refused(text_of([[5, 0] * 4] * 4))
    assert "12 tokens" in refused(Text(), settings_of(width=12))
    assert "where documents end" in refused(text_of([[5] * 8] * 4, ends=None))
    empty = text_of([[5] * 8] * 4)
    empty.seq, empty.pos, empty.x = empty.seq[:0], empty.pos[:0], empty.x[:0]
    assert "no held-out rows" in refused(empty)
    back = Text(1)
    back.seq = back.seq.flip(0)
    assert "order" in refused(back)
    broken = Text(1)
    broken.x[5] = float("inf")
    assert "NaN or infinite" in refused(broken)


@pytest.mark.parametrize("wanted", [[0, 0], [D_SAE], [-1]])
def test_given_latents_must_be_latents_of_a_member(wanted):
    latents = {HOOK: {"sae": torch.tensor(wanted)}}
    assert f"0 to {D_SAE - 1}" in refused(Text(1), latents=latents)
    assert "no such member (nearest: sae)" in refused(
        Text(1), latents={HOOK: {"saw": torch.tensor([1])}}
    )


def test_a_character_split_at_a_windows_border_stands_whole_in_both_windows():
    sea = "日本".encode()
    texts = {i: sea[i : i + 1] for i in range(6)} | {6: " a"}
    ids = torch.tensor([[6, 0, 1, 2, 3, 4, 5, 6], [4, 5, 6, 6, 6, 6, 6, 6]]).int()
    table = TokenTable(ids, torch.tensor([8, 3]).int(), texts)
    seq, start = np.array([0, 0, 1]), np.array([0, 4, 0])
    windows = cut_windows(table, seq, start, seq, 4)
    assert [windows.tokens(i) for i in range(3)] == [
        [" a", "日", "", ""],
        ["本", "", "", " a"],
        ["", "", " a"],  # the beginning of the character is in no sequence
    ]
    assert cut_windows(table, seq[:1], start[:1] + 2, seq[:1], 2).text(0) == "日"
    context = Context(seq=0, pos=5, value=2.0, acts={5: 2.0})
    shown = context.window(ids[0].long(), table.decode, 3)
    assert (shown["tokens"], shown["peak"]) == (["日", "本", ""], 2)


def test_a_latent_that_no_window_would_explain_is_refused():
    with pytest.raises(ValueError, match="n_top and n_quantile: both are 0"):
        ContextConfig(n_top=0, n_quantile=0)
