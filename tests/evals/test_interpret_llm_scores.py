"""Explanations, detection, fuzzing and simulation through a real endpoint whose judge is known."""

import numpy as np
import pytest
from interpret_llm_worlds import (
    END,
    N_LATENTS,
    WORDS,
    collected,
    half,
    perfect,
    word_fragments,
    yes,
)
from interpret_server import config, error, prompt, said, serving

from wsae.core.errors import UserError
from wsae.evals.interpret import judges
from wsae.evals.interpret.collect import FEW_FRAGMENTS
from wsae.evals.interpret.endpoint import Endpoint
from wsae.evals.interpret.judges import (
    HARD,
    NEGATIVE,
    POSITIVE,
    batches,
    correlation,
    dry_run,
    explain_latents,
    simulation_scores,
)


def parts(kind, chat, tmp_path, **more):
    llm = Endpoint(config(chat, tmp_path, **more))
    found = collected()
    explained = explain_latents(found, llm)
    return llm, found, explained, judges.judged(kind, found, explained.explanations, llm)


def simulate(found, llm):
    explained = explain_latents(found, llm)
    return explained, simulation_scores(found, explained.explanations, llm)


@pytest.mark.parametrize("kind", ["detection", "fuzzing"])
def test_a_judge_that_knows_scores_one_and_one_that_always_agrees_a_half(tmp_path, kind):
    for judge, score in ((perfect, 1.0), (yes, 0.5)):
        with serving(judge) as chat:
            _, _, explained, judged = parts(kind, chat, tmp_path / judge.__name__)
        assert explained.explanations == {j: f"the word {WORDS[j]}" for j in range(N_LATENTS)}
        assert [s.balanced_accuracy for s in judged.scores] == [score] * N_LATENTS
        assert [s.auc for s in judged.scores] == [score] * N_LATENTS
        assert all(s.tp + s.fn == s.tn + s.fp == 10 and s.failed == 0 for s in judged.scores)
        tally = judged.tally
        assert tally.requested == tally.parsed == N_LATENTS * 4


def test_failures_are_neither_hits_nor_misses_and_sum_up(tmp_path):
    with serving(half) as chat:
        _, _, _, judged = parts("detection", chat, tmp_path, per_prompt=2)
    tally = judged.tally
    assert tally.failed > 3
    assert tally.parsed > 3
    assert tally.requested == tally.parsed + tally.failed == N_LATENTS * 10
    assert sum(tally.reasons.values()) == tally.failed
    for score in judged.scores:
        assert score.fn == score.fp == 0, "what did get judged was judged rightly"
        assert score.tp + score.tn + score.failed == 20
    assert sum(s.failed for s in judged.scores) == 2 * tally.failed


def test_hard_negatives_have_counts_of_their_own_and_change_no_other_request(tmp_path):
    with serving(yes) as chat:
        _, _, _, plain = parts("detection", chat, tmp_path)
        sent = len(chat.bodies)
        _, _, _, judged = parts("detection", chat, tmp_path, hard=True)
        assert len(chat.bodies) == sent + N_LATENTS, "five hard windows each; the rest was on disk"
    for before, after in zip(plain.scores, judged.scores, strict=True):
        assert (before.tp, before.fn, before.tn, before.fp) == (
            after.tp,
            after.fn,
            after.tn,
            after.fp,
        )
        assert (before.hard_tn + before.hard_fp, after.hard_tn, after.hard_fp) == (0, 0, 5)
        assert after.auc_hard == 0.5


def test_prompts_mix_the_sides_by_seed_and_last_ones_may_be_shorter(tmp_path):
    with serving(perfect) as chat:
        cfg = config(chat, tmp_path, per_prompt=7, hard=True)
    found = collected()
    made = batches("detection", found, cfg)
    assert made == batches("detection", found, cfg)
    assert made != batches("detection", found, cfg.model_copy(update={"seed": 1}))
    sizes = [len(b.items) for b in made if b.latent == 0]
    assert sizes == [7, 7, 6, 5]
    roles = [item.role for b in made for item in b.items if b.latent == 0]
    assert [roles.count(role) for role in (POSITIVE, NEGATIVE, HARD)] == [10, 10, 5]
    assert roles[:20] != sorted(roles[:20])


def test_sides_of_different_size_are_cut_to_the_smaller(tmp_path):
    from dataclasses import replace

    with serving(perfect) as chat:
        cfg = config(chat, tmp_path)
    found = collected()
    lean = [replace(c, negative=type(c.negative)(c.negative.window[:4], c.negative.acts[:4]))
            for c in found.latents]  # fmt: skip
    made = batches("detection", replace(found, latents=lean), cfg)
    roles = [item.role for b in made for item in b.items]
    assert roles.count(POSITIVE) == roles.count(NEGATIVE) == 4 * N_LATENTS


def test_fuzzed_negatives_have_as_many_marks_as_the_positives_mean(tmp_path):
    with serving(perfect) as chat:
        cfg = config(chat, tmp_path)
    found = collected()
    silent = [i for b in batches("fuzzing", found, cfg) if b.latent == 0 for i in b.items]
    tokens = [sum(len(run.split()) for run in i.text.split("<<")[1:] for run in [run.split(">>")[0]])
              for i in silent]  # fmt: skip
    own = [n for n, i in zip(tokens, silent, strict=True) if i.role == POSITIVE]
    theirs = {n for n, i in zip(tokens, silent, strict=True) if i.role == NEGATIVE}
    assert theirs == {int(np.ceil(np.mean(own)))}


def test_a_latent_without_explanation_is_not_asked_about(tmp_path):
    def mute(body, before):
        if prompt(body).startswith("Example 1") and "<< bread>>" in prompt(body):
            return said("[EXPLANATION]: one [EXPLANATION]: two")
        return perfect(body, before)

    with serving(mute) as chat:
        _, _, explained, judged = parts("detection", chat, tmp_path)
        assert len(chat.bodies) == 3 + 2 * 4
    assert (explained.tally.parsed, explained.tally.failed) == (2, 1)
    assert (judged.tally.parsed, judged.tally.not_asked) == (8, 4)
    score = judged.scores[1]
    assert (score.balanced_accuracy, score.auc, score.failed) == (None, None, 20)


def test_verdicts_by_probability(tmp_path):
    def unsure(body, before):
        if "Text 1: " not in prompt(body):
            good = perfect(body, before)
            import json

            text = json.loads(good.body)["choices"][0]["message"]["content"]
            return said(
                text, logprobs={"content": [{"token": text, "logprob": 0.0, "top_logprobs": []}]}
            )
        from interpret_llm_worlds import truths

        content = [{"token": "[", "logprob": 0.0, "top_logprobs": []}]
        for truth in truths(body):
            p = {"1": 0.49 if truth else 0.2}
            p["0"] = 0.9 - p["1"]
            top = [{"token": k, "logprob": float(np.log(v))} for k, v in p.items()]
            chosen = max(top, key=lambda t: t["logprob"])
            content += [
                {**chosen, "top_logprobs": top},
                {"token": ", ", "logprob": 0.0, "top_logprobs": []},
            ]
        content[-1]["token"] = "]"
        return said("".join(c["token"] for c in content), logprobs={"content": content})

    with serving(unsure) as chat:
        _, _, _, judged = parts("detection", chat, tmp_path, probabilities=True)
    for score in judged.scores:
        assert (score.auc, score.balanced_accuracy) == (1.0, 1.0)


# Simulation


def test_fragments_are_one_per_document_and_as_direct_search_finds_them():
    """Every fragment's activations, the strongest twenty and the rule of variation, recomputed from the rows."""
    found, source = word_fragments(documents=90)
    acts = np.where(source.ids[..., None] == np.arange(END + 1), source.strength[..., None], 0.0)
    acts[:, 0] = 0  # rows of first positions are not in the data
    windows = found.windows
    assert len(np.unique(windows.document)) == len(windows.document)
    is_end = source.ids == END
    documents = (
        np.cumsum(is_end).reshape(is_end.shape) - is_end
    )  # an end token is its document's last
    documents[np.arange(documents.shape[1]) >= source.lengths[:, None]] = -1
    for row in range(len(windows.ids)):
        seq, start, document = windows.seq[row], windows.start[row], windows.document[row]
        np.testing.assert_array_equal(windows.ids[row], source.ids[seq, start : start + 10])
        assert (documents[seq, start : start + 10] == document).all(), "of one document"
        long_enough = (documents == document).sum(1) >= 10
        assert seq == long_enough.argmax(), "in its first part that is long enough"
    for latent in found.latents:
        for shown in (latent.explain, latent.top, latent.random):
            assert len(shown) == 5
            for row, real in zip(shown.window, shown.acts, strict=True):
                seq, start = windows.seq[row], windows.start[row]
                np.testing.assert_allclose(real, acts[seq, start : start + 10, latent.latent])
                assert real.min() != real.max()
        used = [*latent.explain.window, *latent.top.window, *latent.random.window]
        assert len(set(used)) == 15
        peaks = np.array([s.acts.max(1) for s in (latent.explain, latent.top)]).T.ravel()
        assert (np.diff(peaks) <= 0).all(), "ranks 0, 2, 4, 6, ... from the strongest on"
        assert latent.random.acts.max() <= peaks[0]


@pytest.mark.parametrize("batch_size", [1, 7, 10_000])
def test_fragments_do_not_depend_on_how_rows_are_split(batch_size):
    found, _ = word_fragments()
    other, _ = word_fragments(batch_size=batch_size)
    np.testing.assert_array_equal(found.windows.ids, other.windows.ids)
    assert found.n_fragments == other.n_fragments
    for a, b in zip(found.latents, other.latents, strict=True):
        assert (a.latent, a.density) == (b.latent, b.density)
        for x, y in zip((a.explain, a.top, a.random), (b.explain, b.top, b.random), strict=True):
            np.testing.assert_array_equal(x.window, y.window)
            np.testing.assert_array_equal(x.acts, y.acts)


def test_latents_that_vary_in_fewer_than_twenty_fragments_are_skipped_and_counted():
    found, _ = word_fragments(documents=20)
    assert found.latents == []
    assert found.skipped == {FEW_FRAGMENTS: N_LATENTS}
    assert word_fragments(limit=25)[0].n_fragments <= 25
    with pytest.raises(UserError, match="no held-out document has 39 tokens"):
        word_fragments(width=39, length=6, documents=10)


@pytest.mark.parametrize("simulator", ["logprobs", "json"])
def test_a_perfect_simulator_predicts_where_the_latent_fires(tmp_path, simulator):
    found, _ = word_fragments()
    with serving(perfect) as chat:
        explained, done = simulate(found, Endpoint(config(chat, tmp_path, simulator=simulator)))
        assert len(chat.bodies) == N_LATENTS * 11
    assert (done.tally.requested, done.tally.parsed) == (N_LATENTS * 10, N_LATENTS * 10)
    assert explained.tally.parsed == N_LATENTS
    for latent, score in zip(found.latents, done.scores, strict=True):
        assert (score.n_top, score.n_random, score.failed) == (5, 5, 0)
        real = np.concatenate([latent.top.acts, latent.random.acts]).astype(np.float64)
        firing = np.isin(
            found.windows.ids[[*latent.top.window, *latent.random.window]], latent.latent
        )
        guess = np.where(firing, 10.0, 0.0)  # expectations are affine in this: 9.9 and 0.1
        assert score.mixed == pytest.approx(np.corrcoef(guess.ravel(), real.ravel())[0, 1])
        assert score.top == pytest.approx(np.corrcoef(guess[:5].ravel(), real[:5].ravel())[0, 1])
        assert score.random == pytest.approx(np.corrcoef(guess[5:].ravel(), real[5:].ravel())[0, 1])


def test_failed_simulations_enter_no_score(tmp_path):
    found, _ = word_fragments()

    def sometimes(body, before):
        if "Example 1" in prompt(body) or sum(prompt(body).encode()) % 2:
            return perfect(body, before)
        return error(400, "no")

    with serving(sometimes) as chat:
        _, done = simulate(found, Endpoint(config(chat, tmp_path, simulator="json")))
    tally = done.tally
    assert 0 < tally.failed < tally.requested
    assert tally.requested == tally.parsed + tally.failed
    assert sum(s.failed for s in done.scores) == tally.failed
    assert sum(s.n_top + s.n_random for s in done.scores) == tally.parsed


def test_correlation_of_nothing_of_constants_and_of_opposites():
    x = np.array([0.0, 1.0, 5.0])
    assert correlation([], []) is None
    assert correlation([x], [np.zeros(3)]) is None
    assert correlation([np.full(3, 2.0)], [x]) == 0.0
    assert correlation([-x], [x]) == -1.0
    assert correlation([x[:1], x[1:]], [3 * x[:1] + 1, 3 * x[1:] + 1]) == pytest.approx(1.0)


@pytest.mark.parametrize("simulator", ["logprobs", "json"])
def test_the_dry_run_sends_nothing_and_knows_what_will_be_sent(tmp_path, simulator):
    found, (frags, _) = collected(), word_fragments()
    scores = ("detection", "fuzzing", "simulation")
    with serving(perfect) as chat:
        llm = Endpoint(config(chat, tmp_path, simulator=simulator, hard=True))
        plan = dry_run(llm, scores, found, frags)
        assert not chat.bodies
        assert not list(tmp_path.rglob("*.json"))
        explained = explain_latents(found, llm)
        assert len(chat.bodies) == plan["explanation"].requests == N_LATENTS
        again = dry_run(llm, scores, found, frags)
        assert (again["explanation"].requests, again["explanation"].cached) == (0, N_LATENTS)
        for name, run in (
            ("detection", lambda: judges.judged("detection", found, explained.explanations, llm)),
            ("fuzzing", lambda: judges.judged("fuzzing", found, explained.explanations, llm)),
            ("simulation", lambda: simulate(frags, llm)),
        ):
            before = len(chat.bodies)
            run()
            sent = len(chat.bodies) - before
            both = plan[name].requests + (
                plan["simulation explanation"].requests if name == "simulation" else 0
            )
            assert sent == both > 0, name
        nothing = dry_run(llm, scores, found, frags)
        assert all(
            p.requests == p.prompt_tokens == p.completion_tokens == 0 for p in nothing.values()
        )
        sizes = [len(str(b["messages"])) for b in chat.bodies]
        estimated = sum(p.prompt_tokens for p in plan.values())
        assert 0.2 < estimated / sum(sizes) < 0.5, "a third of the bytes, about"


def test_a_dry_run_leaves_out_what_a_failed_explanation_will_not_ask(tmp_path):
    def mute(body, before):
        return said("no marker") if "Example 1" in prompt(body) else perfect(body, before)

    with serving(mute) as chat:
        llm = Endpoint(config(chat, tmp_path))
        explain_latents(collected(), llm)
        plan = dry_run(llm, ["detection"], collected())
    assert (plan["detection"].requests, plan["detection"].not_asked) == (0, 12)
