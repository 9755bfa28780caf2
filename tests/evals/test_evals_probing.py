"""Labelled evaluations: the fits at their optimum, scores against SAEBench's own output, planted latents, the rules."""

import json
from collections.abc import Iterator

import numpy as np
import pytest
import scipy.sparse
import torch
from acts_models import make_model
from hypothesis import given, settings
from hypothesis import strategies as st

import wsae
from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.language import load_language
from wsae.acts.source import HeldoutRows
from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.evals.config import CONTROL, ProbeConfig
from wsae.evals.control import random_control
from wsae.evals.measure import EvaluatedSaes
from wsae.evals.probing.reading import (
    RAW,
    RULES,
    Coder,
    Corpus,
    DocumentReader,
    label,
    read_corpus,
)
from wsae.evals.probing.run import (
    choose_documents,
    document_tasks,
    probe_documents,
    probe_tokens,
    spurious_tasks,
)
from wsae.evals.probing.scores import (
    LinearProbe,
    ProbeTask,
    Removal,
    TaskSet,
    absorbed,
    fit_all,
    fit_few,
    one_against_others,
    removed,
    sparse_right,
    targeted,
)
from wsae.sae import SAE, ReLU, SAEConfig, make_activation

UPSTREAM = {
    1: [0.725, 0.6083333333333333, 0.6, 0.775],
    2: [0.875, 0.6166666666666667, 0.6333333333333333, 0.75],
    5: [0.8333333333333334, 0.6916666666666667, 0.7333333333333333, 0.8166666666666667],
    16: [0.8333333333333334, 0.75, 0.7583333333333333, 0.8333333333333334],
}
"""What `train_probe_on_activations` of sae-bench 0.6.0 gives for `documents` after torch.manual_seed(42), by k."""


def documents(n: int, first: int) -> dict[str, torch.Tensor]:
    """Four classes of n documents, each with six of 60 latents that lean to it; the recording made them so too."""
    out = {}
    for c in range(4):
        made = torch.Generator().manual_seed(first + c)
        fires = torch.rand(n, 60, generator=made) < 0.15
        lean = torch.zeros(60)
        lean[3 * c : 3 * c + 6] = 0.35
        out[f"class {c}"] = fires * torch.rand(n, 60, generator=made) + lean * torch.rand(
            n, 60, generator=made
        )
    return out


def rows_of(sizes: dict[str, int], first: int = 0) -> dict[str, np.ndarray]:
    """Return each class's rows where the classes lie one after another."""
    ends = first + np.cumsum([0, *sizes.values()])
    return {name: np.arange(ends[i], ends[i + 1]) for i, name in enumerate(sizes)}


@pytest.mark.parametrize("k", UPSTREAM)
@pytest.mark.parametrize("form", [np.asarray, scipy.sparse.csr_array])
def test_documents_are_probed_as_saebench_does(k, form):
    train, test = documents(120, 0), documents(60, 100)
    table = form(torch.cat([*train.values(), *test.values()]).numpy())
    train_rows = rows_of({name: len(x) for name, x in train.items()})
    test_rows = rows_of({name: len(x) for name, x in test.items()}, 480)
    tasks = one_against_others(train_rows, test_rows, 42)
    found = [float(sparse_right(table, task, (k,))[0][k].mean()) for task in tasks]
    assert found == pytest.approx(UPSTREAM[k], abs=1e-6)


def top(x: torch.Tensor, weights: dict[str, torch.Tensor], k: int = 4) -> torch.Tensor:
    z = (x - weights["b_dec"]) @ weights["W_enc"]
    values, index = z.topk(k, dim=-1)
    return torch.zeros_like(z).scatter(-1, index, values.relu())


D, L, F = 12, 5, 40


def upstream_sae() -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(7)
    shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_dec": (D,)}
    return {name: torch.randn(*shape, generator=made) for name, shape in shapes.items()}


def upstream_documents(n: int, first: int, classes: str) -> dict[str, torch.Tensor]:
    """Documents of five tokens, none of them padding: sae-bench lets codes of padding count where it removes them."""
    out = {}
    for c, name in enumerate(classes.split()):
        x = torch.randn(n, L, D, generator=torch.Generator().manual_seed(first + c))
        x[:, :, c] += 0.6
        out[name] = x
    return out


def upstream_probe(seed: int, **leans: float) -> LinearProbe:
    made = torch.Generator().manual_seed(seed)
    weight = torch.randn(1, D, generator=made)[0].double().numpy()
    bias = float(torch.randn(1, generator=made)) * 0.1
    for at, more in leans.items():
        weight[int(at[1:])] += more
    return LinearProbe(weight, bias)


def pooled(x: torch.Tensor, weights: dict[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
    """Return the means of rows and of codes over the tokens that are not padding."""
    live = (x.sum(-1) != 0).float()[..., None]
    codes = top(x, weights) * live
    return tuple((part.sum(1) / live.sum(1)).double().numpy() for part in (x, codes))


def removal(train, test, pairs, probes) -> Removal:
    """Return a removal over documents by name; `pairs` says which are of a task's class and which are not."""
    weights = upstream_sae()
    names = list(train)
    halves = [pooled(torch.cat([half[name] for name in names]), weights) for half in (train, test)]
    raw, codes = (np.concatenate([half[i] for half in halves]) for i in (0, 1))
    near = rows_of({name: len(train[name]) for name in names})
    far = rows_of({name: len(test[name]) for name in names}, len(halves[0][0]))
    tasks = []
    for name, (yes, no) in pairs.items():
        sides = []
        for rows in (near, far):
            own = np.concatenate([rows[y] for y in yes])
            others = [rows[o][: -(-len(own) // len(no))] for o in no]
            side = np.concatenate([own, np.concatenate(others)[: len(own)]])
            sides += [side, np.arange(len(side)) < len(own)]
        tasks.append(ProbeTask(name, *sides))
    decoder = weights["W_dec"].double().numpy()
    return Removal(raw, scipy.sparse.csr_array(codes), decoder, tasks, probes)


TPP = {
    1: [0.0375, -0.0125, 0.2],
    2: [0.0375, -0.05, 0.225],
    5: [-0.0625, -0.0625, 0.1125],
}
"""What sae-bench 0.6.0's `perform_feature_ablations` and `create_tpp_plotting_dict` give, its draws the first rows."""


def test_classes_are_removed_as_saebench_does():
    train, test = upstream_documents(30, 0, "a b c"), upstream_documents(20, 100, "a b c")
    pairs = {name: ([name], [o for o in "abc" if o != name]) for name in "abc"}
    probes = [upstream_probe(50 + i, **{f"d{i}": 3.0}) for i in range(3)]
    found = removal(train, test, pairs, probes)
    tasks = TaskSet(found.tasks, np.arange(150), 150)
    scores = targeted(found, tasks, tuple(TPP))
    for n, wanted in TPP.items():
        score = scores[f"tpp_{n}"]
        assert score.by_task.tolist() == pytest.approx(wanted, abs=1e-6)
        assert score.by_unit is not None
        assert score.by_unit.value == pytest.approx(np.mean(wanted), abs=1e-6)


SCR = {1: -0.363636, 2: -0.363636, 5: -0.090909}
"""`get_scr_plotting_dict` of the same: scr_metric_threshold_n."""


def cells(n: int, first: int) -> dict[str, torch.Tensor]:
    out = upstream_documents(2 * n, first, "ap aq bp bq")
    for name, x in out.items():
        shift = torch.zeros(D)
        shift[5] = 1.0 if name[0] == "a" else -1.0
        shift[6] = 1.5 if name[1] == "p" else -1.5
        x += (x.sum(-1) != 0)[..., None] * shift
    halves = {name: x[:n] for name, x in out.items()}
    return {**halves, "more ap": out["ap"][n:], "more bq": out["bq"][n:]}


def test_a_spurious_class_is_removed_as_saebench_does():
    pairs = {
        "a": (["ap", "aq"], ["bp", "bq"]),
        "p": (["ap", "bp"], ["aq", "bq"]),
        "both": (["ap", "more ap"], ["bq", "more bq"]),
    }
    probes = [
        upstream_probe(81, d5=3.0),
        upstream_probe(80, d6=3.0),
        upstream_probe(82, d5=2.0, d6=3.0),
    ]
    scores = removed(removal(cells(15, 200), cells(10, 300), pairs, probes), tuple(SCR))
    for n, wanted in SCR.items():
        assert scores[f"scr_{n}"].by_task.tolist() == pytest.approx([wanted], abs=1e-5)


SHARES = {
    0: 1,
    3: 0.596967,
    5: 1,
    8: 0.193804,
    9: 0.340078,
    14: 0.069087,
    19: 0.531036,
    20: 0.633042,
}
SHARES |= {21: 0.38238}
"""Absorption fractions above 0 of 24 words by sae-bench's `calculate_absorption`; 0 and 5 are absorbed in full."""


def test_letters_are_absorbed_as_saebench_counts_it():
    made = torch.Generator().manual_seed(9)
    along = torch.nn.functional.one_hot(torch.tensor(3), D).float()
    rows = torch.randn(24, D, generator=made) + 2.0 * along
    direction = (along + 0.3 * torch.randn(D, generator=made)).double().numpy()
    weights = upstream_sae()
    codes = scipy.sparse.csr_array(top(rows, weights, 12).double().numpy())
    decoder = weights["W_dec"].double().numpy()
    found = absorbed(rows.double().numpy(), codes, decoder, direction, np.array([15, 28]))
    assert np.flatnonzero(found.full).tolist() == [0, 5]
    wanted = [SHARES.get(i, 0.0) for i in range(24)]
    assert found.share.tolist() == pytest.approx(wanted, abs=1e-5)


@given(st.integers(0, 1000), st.integers(1, 6), st.booleans(), st.booleans())
@settings(max_examples=20)
def test_the_fits_end_where_the_gradient_of_the_stated_loss_vanishes(seed, k, every, weighted):
    made = np.random.default_rng(seed)
    x, y = made.normal(size=(80, k)) + 1, made.random(80) < 0.3
    y[:2] = True, False
    weight = made.uniform(0.2, 3, 80) if weighted else 1.0
    probe = (fit_all if every else fit_few)(x, y, weight)
    spread = np.sqrt(((x - x.mean(0)) ** 2).sum(1).mean()) if every else 1.0
    w = torch.tensor(probe.weight * spread, requires_grad=True)  # of rows scaled to variance 1
    b = torch.tensor(probe.bias, requires_grad=True)
    margin = torch.tensor(np.where(y, 1.0, -1.0)) * (torch.tensor(x / spread) @ w + b)
    loss = w.square().sum() / 2 + (torch.tensor(weight) * torch.log1p(torch.exp(-margin))).sum()
    loss.backward()
    assert w.grad is not None
    assert b.grad is not None
    small = 2e-3 if every else 1e-5
    assert float(w.grad.abs().max()) < small
    assert float(b.grad.abs().max()) < small


def test_separable_classes_end_at_the_ridges_optimum_too():
    found = fit_few(np.array([[-1.0], [-2], [1], [2]]), np.array([False, False, True, True]))
    assert 0 < found.weight[0] < 5
    assert found.bias == pytest.approx(0, abs=1e-9)


def test_all_columns_sparse_or_dense_give_the_same_probe():
    made = np.random.default_rng(0)
    values = made.random((200, 30)) * (made.random((200, 30)) < 0.2)
    y = values[:, 0] > 0
    dense, sparse = fit_all(values, y), fit_all(scipy.sparse.csr_array(values), y)
    np.testing.assert_allclose(dense.weight, sparse.weight, atol=1e-4)
    assert dense.bias == pytest.approx(sparse.bias, abs=1e-4)
    assert ((dense.logits(values) > 0) == y).mean() > 0.9


@given(st.integers(0, 500), st.integers(2, 5), st.integers(5, 30))
@settings(max_examples=30)
def test_a_class_stands_against_as_many_of_the_others_evenly(seed, classes, n):
    train, test = (
        rows_of({f"{c}": n for c in range(classes)}),
        rows_of({f"{c}": 7 for c in range(classes)}),
    )
    for task in one_against_others(train, test, seed):
        assert task.train_y.sum() == (~task.train_y).sum() == n
        assert set(task.train[task.train_y]) == set(train[task.name])
        counts = [np.isin(task.train, train[name]).sum() for name in train if name != task.name]
        assert max(counts) <= -(-n // (classes - 1))
        assert len(set(task.train.tolist())) == 2 * n


def test_rules_on_a_sentence_read_by_hand():
    texts = ["The", " quick", " fox", ",", " 19", "49", ' "', "run", "ning", '"', " isn", "'t"]
    texts += [" (", "May", ")", "."]
    found = {
        name: [texts[i].strip() for i in np.flatnonzero(row)]
        for name, row in zip(RULES, label(texts), strict=True)
    }
    assert found["capitalised"] == ["The", "May"]
    assert found["digits"] == ["19", "49"]
    assert found["inside a word"] == ["ning"]
    assert found["ends in -ing"] == ["ning"]
    assert found["in quotation marks"] == ["run", "ning"]
    assert found["in brackets"] == ["May", ")"]
    assert found["after a comma"] == ["19"]
    assert found["after an article"] == ["quick"]
    assert found["month"] == ["May"]
    assert found["article"] == ["The"]
    assert len(RULES) >= 30


@given(st.lists(st.text(max_size=6), max_size=12))
def test_every_rule_answers_for_every_text(texts):
    assert label(texts).shape == (len(RULES), len(texts))


WORDS = (" the", " Paris", " ran", ",", " of", " seven", "\n", " quickly")


class Planted:
    """Held-out text whose activations are one-hot in the token, plus noise in eight other dimensions."""

    hooks = {"h": 16}

    def __init__(self, sequences: int = 60, length: int = 40) -> None:
        made = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, len(WORDS), (sequences, length), generator=made)

    def heldout(self, batch_size: int) -> Iterator[HeldoutRows]:  # noqa: ARG002  (one sequence a chunk)
        made = torch.Generator().manual_seed(1)
        for seq, ids in enumerate(self.ids):
            x = torch.cat([torch.eye(8)[ids], torch.rand(len(ids), 8, generator=made)], dim=1)
            yield HeldoutRows({"h": x}, torch.full((len(ids),), seq), torch.arange(len(ids)))

    def tokens(self) -> TokenTable | None:
        lengths = torch.full((len(self.ids),), self.ids.shape[1])
        return TokenTable(self.ids, lengths, dict(enumerate(WORDS)))


def identity(d: int = 16) -> SAE:
    """An SAE whose latent j is dimension j."""
    sae = SAE(SAEConfig(d_in=d, d_sae=d, activation=ReLU()))
    with torch.no_grad():
        sae.W_dec.copy_(torch.eye(d))
        sae.W_enc.copy_(torch.eye(d))
    return sae


def planted(**values) -> tuple:
    cfg = ProbeConfig(**{"least": 20, "k": (1, 2), "draws": 200} | values)
    family = EvaluatedSaes({"planted": identity(), "twin": identity()}, {"planted": "twin"})
    found = probe_tokens({"h": family}, Planted(), cfg)
    return found.hooks["h"], found.record


def test_a_planted_latent_is_found_and_a_random_sae_knows_less():
    found, record = planted()
    at = found.tasks.index("article")
    assert found.latents["planted"][at, 0] == WORDS.index(" the")
    assert found.accuracy("planted", 1)[at] == 1
    assert found.accuracy(RAW, 1)[at] == 1
    assert found.accuracy(CONTROL, 1).mean() < found.accuracy("planted", 1).mean()
    assert "month" in record["skipped"]
    assert set(found.tasks) | set(record["skipped"]) == set(RULES)
    entry = record["hooks"]["h"]["members"]["planted"]["summary"]["probe_1"]
    assert entry["told_from_random"]
    assert entry["low"] < entry["value"] < entry["high"]
    assert entry["by_unit"]["low"] < entry["value"] < entry["by_unit"]["high"]
    json.dumps(record, allow_nan=False)


def test_a_member_is_compared_with_its_twin_over_tasks_and_over_sequences():
    lines = planted()[1]["hooks"]["h"]["comparisons"]
    twin = [line for line in lines if line["b"] == "twin" and line["metric"] == "probe_1"]
    assert [line["over"] for line in twin] == ["tasks", "sequences"]
    assert all(line["difference"] == line["low"] == line["high"] == 0 for line in twin)
    floor = [line for line in lines if line["b"] == CONTROL and line["metric"] == "probe_1"]
    assert {line["a"] for line in floor} == {"planted", "twin"}
    assert all(line["low"] > 0 for line in floor)


def test_a_score_like_the_random_saes_is_marked():
    sae = random_control(identity(), torch.zeros(16).double(), 12.0, seed=9)
    cfg = ProbeConfig(least=20, k=(1, 2), draws=200)
    found = probe_tokens({"h": EvaluatedSaes({"another": sae})}, Planted(), cfg)
    scores = found.record["hooks"]["h"]["members"]["another"]["summary"]
    assert not scores["probe_1"]["told_from_random"]
    assert not scores["probe_2"]["told_from_random"]


def test_no_sequence_trains_and_tests():
    found, record = planted(tokens=1200)
    assert record["counts"] == {"classes": len(found.tasks), "tokens": 1200, "sequences": 30}
    units = found.scores["planted"]["probe_1"].by_unit
    assert units is not None
    assert len(units.num) == 15  # the half that tests


def test_too_little_text_and_none_at_all_are_one_line():
    with pytest.raises(UserError, match="no task has 5000 tokens"):
        planted(least=5000)
    silent = Planted()
    silent.tokens = lambda: None
    with pytest.raises(UserError, match="no tokens, which tasks by rule need"):
        probe_tokens({"h": EvaluatedSaes({"planted": identity()})}, silent)


# Documents through a model.


@pytest.fixture(scope="module")
def language(tmp_path_factory):
    return load_language(str(make_model(tmp_path_factory.mktemp("model") / "model")))


def reader(language, context: int = 24) -> DocumentReader:
    cfg = HarvestConfig(hooks=("layers.1",), seq_len=context, pack=False, sink_norm_ratio=None)
    return DocumentReader(cfg, language, None)


ANIMALS, PLACES = (
    ("the cat saw two dogs", "dogs run and cat sat"),
    ("rain fell over green hills", "hills all day"),
)


def corpus(n: int = 60) -> Corpus:
    texts = [f"{ANIMALS[i % 2]} {'on a mat ' * (i % 7)}" for i in range(n)]
    texts += [f"{PLACES[i % 2]} {'on a mat ' * (i % 7)}" for i in range(n)]
    beside = ["long" if i % 7 > 3 else "short" for i in range(n)] * 2
    return Corpus(texts, ["animals"] * n + ["places"] * n, beside)


def test_a_document_is_the_mean_of_its_tokens(language):
    texts = ["the cat sat", "", "rain fell all day on green hills", "dogs " * 40]
    family = {"layers.1": EvaluatedSaes({"sae": identity(16)})}
    found = reader(language).read(texts, np.arange(4), family, seed=0)
    assert sorted(found.number.tolist()) == [0, 2, 3]
    assert found.counts == {"empty": 1, "cut to the context": 1}
    tables = found.coder.tables()["layers.1"]
    for row, number in enumerate(found.number.tolist()):
        ids = torch.tensor(language.tokenizer(texts[number])["input_ids"][:24])[None]
        with torch.no_grad():
            states = language.model(ids, output_hidden_states=True).hidden_states[2][0, 1:]
        np.testing.assert_allclose(tables[RAW][row], states.mean(0), atol=1e-5)
        codes = identity(16).encode(states).mean(0).detach()
        np.testing.assert_allclose(tables["sae"][[row]].toarray()[0], codes, atol=1e-5)


def test_documents_of_two_kinds_are_told_apart_and_one_is_removed(language):
    cfg = ProbeConfig(least=5, k=(1, 2), ablated=(1, 4), draws=100, documents=60)
    family = {"layers.1": EvaluatedSaes({"a": identity(16), "b": identity(16)}, {"a": "b"})}
    found = probe_documents(family, reader(language), corpus(), cfg)
    hook = found.hooks["layers.1"]
    assert hook.tasks == ["animals", "places"]
    assert hook.accuracy("a", None).min() > 0.9
    assert {"tpp_1", "tpp_4", "scr_1", "scr_4"} < set(hook.scores["a"])
    assert hook.pairs == ["animals or places, beside long or short"]
    np.testing.assert_array_equal(hook.accuracy("a", 1), hook.accuracy("b", 1))
    assert RAW in hook.scores
    assert "tpp_1" not in hook.scores[RAW]
    assert found.record["counts"]["documents"] == 120


def test_removal_of_means_is_the_mean_of_tokens_decoded_without_the_latents():
    """x - sum_S z_j W_dec[j] of the means, against every token decoded with S at 0 and the error kept."""
    weights = upstream_sae()
    x = upstream_documents(6, 40, "a")["a"]
    x[::2, -1] = 0  # padding
    raw, codes = pooled(x, weights)
    latents = np.argsort(-codes.mean(0))[:5]
    z = top(x, weights)
    error = x - (z @ weights["W_dec"] + weights["b_dec"])
    z[..., latents] = 0
    changed = z @ weights["W_dec"] + weights["b_dec"] + error
    live = (x.sum(-1) != 0).float()[..., None]
    wanted = ((changed * live).sum(1) / live.sum(1)).double().numpy()
    found = raw - codes[:, latents] @ weights["W_dec"].double().numpy()[latents]
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_pairs_of_classes_share_documents_evenly():
    given_ = corpus(90)
    cfg = ProbeConfig(least=5, documents=90)
    chosen, _ = choose_documents(given_, cfg)
    tasks = spurious_tasks(chosen, given_, cfg)
    labels, beside = (np.array(column)[chosen] for column in (given_.labels, given_.beside))
    wanted, spurious, both = tasks
    for rows, y in ((wanted.train, wanted.train_y), (wanted.test, wanted.test_y)):
        assert set(labels[rows[y]]) == {"animals"}
        assert (
            (beside[rows[y]] == "long").sum() == (beside[rows[~y]] == "long").sum() == y.sum() / 2
        )
    assert set(beside[spurious.test[spurious.test_y]]) == {"long"}
    assert set(zip(labels[both.train], beside[both.train], strict=True)) == {
        ("animals", "long"),
        ("places", "short"),
    }
    for task in tasks:
        assert not set(task.train) & set(task.test)
    split = document_tasks(chosen, given_, cfg)
    assert all(not set(task.train) & set(task.test) for task in split.tasks)


def test_activations_with_labels_are_told_apart_by_row_or_by_document():
    made = np.random.default_rng(0)
    labels = np.arange(300) % 3
    tokens = made.random((300, 4, 16)).astype(np.float32)
    tokens[..., :3] += 2 * np.eye(3, dtype=np.float32)[labels][:, None]
    cfg = ProbeConfig(least=30, k=(1,), draws=50, ablated=(1,))
    by_document = wsae.probe({"a": identity(), "b": identity()}, tokens, labels, cfg)
    by_row = wsae.probe(identity(), tokens.mean(1), labels, cfg)
    assert by_row.hooks["acts"].tasks == ["0", "1", "2"]
    assert by_row.hooks["acts"].accuracy("sae", 1).min() > 0.95
    assert by_row.hooks["acts"].latents["sae"][:, 0].tolist() == [0, 1, 2]
    for member in (
        "a",
        "b",
    ):  # ReLU of these is linear, so that the mean's latents are the latents' mean
        np.testing.assert_array_equal(
            by_document.hooks["acts"].accuracy(member, 1), by_row.hooks["acts"].accuracy("sae", 1)
        )
    assert by_row.record["hooks"]["acts"]["members"]["sae"]["summary"]["tpp_1"]["value"] > 0.2
    with pytest.raises(UserError, match="labels: 7 for 300 rows; give one for each"):
        wsae.probe(identity(), tokens.mean(1), labels[:7], cfg)
    for missing in (
        np.where(labels == 1, np.nan, labels),
        [None if one == 1 else one for one in labels],
    ):
        with pytest.raises(UserError, match=r"labels\[1\] is (nan|None); leave such rows out"):
            wsae.probe(identity(), tokens.mean(1), missing, cfg)
    for acts, n in ((tokens.mean(1), 150), (tokens, 600)):  # no pairs of rows, nor halves
        with pytest.raises(UserError, match=f"labels: {n} for 300 rows"):
            wsae.probe(identity(), acts, np.resize(labels, n), cfg)
    with pytest.raises(UserError, match="width 16, .*width 15"):
        wsae.probe(identity(), tokens.mean(1)[:, :15], labels, cfg)
    assert wsae.probe(identity(), Planted(), cfg=cfg).hooks["h"].tasks


def test_the_random_sae_is_centred_on_all_classes_however_few_rows_are_read_at_once(monkeypatch):
    labels = np.repeat(np.arange(3), 100)
    x = 2 * np.eye(16, dtype=np.float32)[labels]
    means = []

    def seen(like, mean, l0, seed):
        means.append(mean.numpy())
        return random_control(like, mean, l0, seed)

    monkeypatch.setattr("wsae.evals.probing.reading.random_control", seen)
    for rows in (1000, 50):
        wsae.probe(identity(), x, labels, ProbeConfig(k=(1,), least=30, draws=50, batch_size=rows))
    np.testing.assert_allclose(means[0], x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(means[1], x.mean(0), atol=0.05)


def test_what_latents_write_counts_at_their_rows_own_scale():
    """What is written is the reconstruction less what it is without latents, in units of rows too."""
    cfg = SAEConfig(
        d_in=8, d_sae=20, activation=make_activation("topk", 3), input_norm="layer_norm"
    )
    sae = SAE(cfg, 1).requires_grad_(False)
    sae.b_dec += 0.3
    x = (
        torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
        * torch.arange(1, 31)[:, None]
    )
    pool = scipy.sparse.csr_array(np.kron(np.eye(10), np.full((1, 3), 1 / 3)).astype(np.float32))
    silent = sae.decode(torch.zeros(30, 20), x)
    for units, make in ((pool, lambda rows: pool @ rows.numpy()), (None, torch.Tensor.numpy)):
        coder = Coder({"h": EvaluatedSaes({"sae": sae})}, 0)
        coder.add({"h": x}, units)
        tables = coder.tables()["h"]
        (own, _) = coder.written("h", tables)
        wanted = make(sae(x) - silent)
        np.testing.assert_allclose(own.codes @ own.decoder, wanted, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(tables["sae"].toarray(), make(sae.encode(x)), atol=1e-5)


def test_a_transcoder_is_probed_but_its_latents_are_not_taken_out_of_what_it_reads():
    """Beside a random one whose latents see the rows about their mean."""
    made = np.random.default_rng(0)
    labels = np.arange(300) % 3
    x = made.random((300, 16)).astype(np.float32) + 50
    x[:, :3] += 2 * np.eye(3, dtype=np.float32)[labels]
    cfg = SAEConfig(d_in=16, d_out=5, d_sae=40, activation=make_activation("topk", 4))
    found = wsae.probe(
        {"b": identity(), "a": SAE(cfg)}, x, labels, ProbeConfig(least=30, k=(1,), draws=50)
    )
    members = found.record["hooks"]["acts"]["members"]
    assert set(members["a"]["summary"]) == {"probe_1", "probe_all"}
    assert {"tpp_5"} <= set(members["b"]["summary"]) <= set(found.record["glossary"])
    control = random_control(SAE(cfg), torch.from_numpy(x).double().mean(0), 4.0, 0)
    assert control.b_enc is not None
    pre = torch.from_numpy(x) @ control.W_enc + control.b_enc
    torch.testing.assert_close(pre.mean(0), torch.zeros(40), atol=1e-3, rtol=0)


def test_rows_that_are_not_finite_are_refused_and_half_precision_is_probed_alike():
    labels, rng = np.arange(300) % 3, np.random.default_rng(0)
    x = rng.standard_normal((300, 16)).astype(np.float32) + labels[:, None]
    cfg = ProbeConfig(least=30, k=(1,), draws=50)
    half = wsae.probe(identity().bfloat16(), x, labels, cfg).hooks["acts"]
    full = wsae.probe(identity(), x, labels, cfg).hooks["acts"]
    np.testing.assert_allclose(half.accuracy("sae", 1), full.accuracy("sae", 1), atol=0.1)
    x[7, 3] = np.nan
    with pytest.raises(UserError, match="acts: activation is nan at row 7, dimension 3"):
        wsae.probe(identity(), x, labels, cfg)
    with pytest.raises(UserError, match="names none"):
        wsae.probe({}, x, labels, cfg)


BAD = {
    "labels for others": (Corpus(["a"] * 3, ["x"] * 2), "2 for 3 texts"),
    "one class": (Corpus(["a"] * 3, ["x"] * 3), "only one class \\('x'\\)"),
    "none": (Corpus([], []), "only one class \\(none\\)"),
    "too few": (Corpus(["a"] * 200, ["x"] * 190 + ["y"] * 10), "'y' has 10"),
}


@pytest.mark.parametrize("kind", BAD)
def test_labels_that_tell_nothing_are_refused_in_one_line(kind):
    given_, says = BAD[kind]
    with pytest.raises(UserError, match=says):
        choose_documents(given_, ProbeConfig())


def test_classes_with_too_few_documents_are_named():
    given_ = Corpus(["a"] * 310, ["x"] * 150 + ["y"] * 150 + ["z"] * 10)
    chosen, skipped = choose_documents(given_, ProbeConfig())
    assert skipped == {"z": "10 documents, 120 needed"}
    assert set(np.array(given_.labels)[chosen]) == {"x", "y"}


def test_labels_are_read_beside_their_texts(tmp_path):
    path = tmp_path / "data.jsonl"
    rows = [{"text": f"text {i}", "n": i % 3, "ok": i % 2 == 0} for i in range(30)]
    rows += [{"text": "no label"}, {"text": "", "n": 1, "ok": True}, {"n": 1, "ok": False}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = read_corpus(TextConfig(path=str(path)), "n", "ok", ProbeConfig(documents=4))
    assert found.beside is not None
    assert set(zip(found.labels, found.beside, strict=True)) == {
        (str(n), ok) for n in range(3) for ok in ("True", "False")
    }
    for text, n, ok in zip(found.texts, found.labels, found.beside, strict=True):
        i = int(text.split()[1])
        assert (str(i % 3), str(i % 2 == 0)) == (n, ok)
    assert len(found.texts) == 6 * 4
    assert found.counts == {
        "read": 32,
        "empty": 1,
        "without the field": 1,
        "without a label": 1,
    }
    with pytest.raises(UserError, match="no field 'm'.*see --label"):
        read_corpus(TextConfig(path=str(path)), "m", None, ProbeConfig())
