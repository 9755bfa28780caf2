"""Labelled evaluations of a family or a run: token tasks by rule, or documents with labels, into RUN/probing.

A task's k latents are those of largest class mean difference on the training side; a logistic regression on them is
tested on as many rows of the class as of the rest: chance is 1/2 (SAEBench's sparse probing). All members see the same
rows and draws.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import scipy.sparse
from jaxtyping import Float, Int64
from torch import Tensor

from wsae.acts.config import HarvestConfig
from wsae.acts.source import StoreSource, open_matrix, open_source
from wsae.acts.stream import HeldOut
from wsae.core.calls import own_settings
from wsae.core.errors import UserError
from wsae.core.files import Json, finite
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.config import ProbeConfig
from wsae.evals.glossary import glossary, numbered
from wsae.evals.measure import EvaluatedSaes
from wsae.evals.probing.reading import (
    FAMILIES,
    FLOOR,
    RAW,
    Coder,
    Corpus,
    DocumentReader,
    LabelledTokens,
    read_tokens,
)
from wsae.evals.probing.scores import (
    LEAST_F1,
    LetterWords,
    ProbeFindings,
    ProbeTask,
    Removal,
    TaskSet,
    balanced,
    differences,
    f1,
    fit_all,
    one_against_others,
    removed,
    score_absorption,
    score_probes,
    summary,
    targeted,
)
from wsae.evals.run import run_subject, write_part
from wsae.run import PROBING, PROBING_PART, SINGLE, Run
from wsae.sae import SAE
from wsae.sae.model import an_sae
from wsae.stats.moments import check_finite

if TYPE_CHECKING:
    from wsae.acts.language import LanguageModel

TOKENS, DOCUMENTS = "tokens", "documents"
"""The two kinds of labelled evaluation."""


@dataclass(frozen=True)
class Probes:
    """What was found, by hook, and the JSON-ready record of it."""

    hooks: dict[str, ProbeFindings]
    record: Json


def probe_tokens(
    families: FAMILIES,
    source: HeldOut,
    cfg: ProbeConfig = ProbeConfig(),  # noqa: B008  (frozen)
    progress: Progress = quiet,
) -> Probes:
    """Score every member on the token tasks by rule, and on the absorption of first letters.

    `families` are hook -> `EvaluatedSaes` (`run_subject(run, source)`). Raises UserError when the data have no text, or
    too little for every task.
    """
    read = read_tokens(source, families, cfg, progress)
    tasks, skipped = rule_tasks(read, cfg)
    if not tasks.tasks:
        raise UserError(
            f"{len(read.seq):,} held-out tokens: no task has {cfg.least} tokens of its class on either side; probe "
            "more text, or lower `least`"
        )
    by_hook, letters, found = read.coder.tables(), letter_tasks(read, cfg), {}
    total = sum(len(named) for named in by_hook.values()) * len(tasks.tasks)
    with progress("probes", total, "probes") as tick:
        for hook, tables in by_hook.items():
            findings, _ = score_probes(tables, tasks, cfg, tick)
            raw, known = tables[RAW], []
            for task in letters:  # those that a probe on the activations finds
                probe = fit_all(raw[task.train], task.train_y, balanced(task.train_y))
                if f1(probe.logits(raw[task.test]) > 0, task.test_y) >= LEAST_F1:
                    known.append(LetterWords(task, probe))
            findings.letters.extend(word.task.name for word in known)
            for name, codes, decoder in read.coder.written(hook, tables) if known else ():
                findings.scores[name] |= score_absorption(tables[RAW], codes, decoder, known)
            found[hook] = findings
    counts = {"classes": len(tasks.tasks), "tokens": len(read.seq), "sequences": tasks.units}
    return _probes(found, families, "sequences", counts, skipped, cfg)


def probe_documents(
    families: FAMILIES,
    reader: DocumentReader,
    corpus: Corpus,
    cfg: ProbeConfig = ProbeConfig(),  # noqa: B008  (frozen)
    progress: Progress = quiet,
) -> Probes:
    """Score every member on telling the classes of documents apart, each the mean over its tokens, and on removing one.

    Raises UserError for labels of one class, for too few documents, or for other than one label a text.
    """
    chosen, skipped = choose_documents(corpus, cfg)
    read = reader.read(corpus.texts, chosen, families, cfg.seed, progress)
    found = _tell_documents(read.coder, read.number, corpus, cfg, progress)
    counts = {"classes": _classes(found), "documents": len(read.number)}
    counts |= {**corpus.counts, **read.counts}
    return _probes(found, families, "documents", counts, skipped, cfg)


def _tell_documents(
    coder: Coder,
    number: Int64[np.ndarray, " documents"],
    corpus: Corpus,
    cfg: ProbeConfig,
    progress: Progress,
) -> dict[str, ProbeFindings]:
    """Tell the classes of documents apart at every hook, and remove them by setting latents to 0."""
    tasks, pairs = document_tasks(number, corpus, cfg), spurious_tasks(number, corpus, cfg)
    if corpus.beside is not None and not pairs:
        raise UserError(
            f"the second label: no two of its values have {3 * cfg.least} documents each with two classes of the "
            "first; give more text, or lower `least`"
        )
    by_hook, found = coder.tables(), {}
    total = sum(len(named) for named in by_hook.values()) * len(tasks.tasks)
    with progress("probes", total, "probes") as tick:
        for hook, tables in by_hook.items():
            findings, probes = score_probes(tables, tasks, cfg, tick)
            along = [fit_all(tables[RAW][task.train], task.train_y) for task in pairs]
            findings.pairs.extend(task.name for task in pairs[::3])
            for name, codes, decoder in coder.written(hook, tables):
                removal = Removal(tables[RAW], codes, decoder, tasks.tasks, probes[RAW])
                findings.scores[name] |= targeted(removal, tasks, cfg.ablated)
                if pairs:
                    removal = removal._replace(tasks=pairs, probes=along)
                    findings.scores[name] |= removed(removal, cfg.ablated)
            found[hook] = findings
    return found


@own_settings
def probe(
    sae: SAE | Mapping[str, SAE],
    acts: object,
    labels: Sequence[object] | np.ndarray | None = None,
    cfg: ProbeConfig = ProbeConfig(),  # noqa: B008  (frozen)
    progress: Progress = quiet,
) -> Probes:
    """Tell classes apart by a few latents of one SAE, or of several by name, beside a random SAE and the activations.

    `acts` are numbers [n, d_in], or [n, seq, d_in] whose mean over seq counts, in memory or in a file, and `labels` the
    n classes. Without labels `acts` is a store of text (or its path), or another source with one hook, and the classes
    are token tasks by rule. `.hooks[hook].accuracy("sae", k)` is by task; `.record` has intervals and comparisons.
    Raises UserError for another width, NaN, infinity, labels of one class or of another number, or too little data.
    """
    given = sae if isinstance(sae, Mapping) else {SINGLE: sae}
    family = EvaluatedSaes({name: an_sae(one, "probe") for name, one in given.items()})
    if not given:
        raise UserError("sae: {} names none; give {NAME: sae, ...}")
    if labels is None:
        source = acts if isinstance(acts, HeldOut) else open_source(acts)
        if len(source.hooks) != 1:
            raise UserError(
                f"the data have {len(source.hooks)} hooks ({', '.join(source.hooks)}); give one"
            )
        return probe_tokens(dict.fromkeys(source.hooks, family), source, cfg, progress)
    rows, classes = open_matrix(acts, "acts"), np.asarray(labels).tolist()
    for row, one in enumerate(classes):
        if one is None or (isinstance(one, float) and math.isnan(one)):
            raise UserError(f"labels[{row}] is {one}; leave such rows out, or give them a class")
    names = [str(one) for one in classes]
    if len(names) != rows.items:
        raise UserError(f"labels: {len(names):,} for {rows.items:,} rows; give one for each")
    each, corpus = rows.shape[0] // len(names), Corpus(names, names)
    chosen, skipped = choose_documents(corpus, cfg)
    coder, families = Coder({"acts": family}, cfg.seed), {"acts": family}
    at_once = max(1, cfg.batch_size // each)

    def taken(number: Int64[np.ndarray, " documents"]) -> Float[Tensor, "rows _"]:
        index = (number[:, None] * each + np.arange(each)).ravel()
        x = rows.take(index)
        for bad in (~x.isfinite().all(1)).nonzero()[:1, 0].tolist():
            check_finite(x[bad : bad + 1], int(index[bad]), "acts")
        return x

    of_all = chosen[:: -(-len(chosen) // at_once)]  # one class follows another
    coder.begin("acts", taken(of_all))
    for start in range(0, len(chosen), at_once):
        number = chosen[start : start + at_once]
        pool = scipy.sparse.kron(scipy.sparse.eye_array(len(number)), np.full((1, each), 1 / each))
        coder.add({"acts": taken(number)}, pool.tocsr().astype(np.float32))
    found = _tell_documents(coder, chosen, corpus, cfg, progress)
    counts = {"classes": _classes(found), "rows": len(chosen)}
    return _probes(found, families, "rows", counts, skipped, cfg)


def _classes(found: dict[str, ProbeFindings]) -> int:
    return len(next(iter(found.values())).tasks)


def rule_tasks(read: LabelledTokens, cfg: ProbeConfig) -> tuple[TaskSet, dict[str, str]]:
    """Return the rules with enough tokens, each with its own balanced draw, and why the others are left out."""
    sequences, unit = np.unique(read.seq, return_inverse=True)
    test_side = unit >= len(sequences) // 2
    tasks, skipped = [], {}
    for name, own in read.labels.items():
        rng = np.random.default_rng(seed_for(cfg.seed, "probe", name))
        sides = []
        for side in (~test_side, test_side):
            yes, no = np.flatnonzero(own & side), np.flatnonzero(~own & side)
            n = min(len(yes), len(no), cfg.examples)
            drawn = [rng.permutation(rows)[:n] for rows in (yes, no)]
            sides.append(np.sort(np.concatenate(drawn)))
        fewest = min(len(side) // 2 for side in sides)
        if fewest < cfg.least:
            skipped[name] = f"{fewest} tokens of the class on one side, {cfg.least} needed"
        else:
            train, test = sides
            tasks.append(ProbeTask(name, train, own[train], test, own[test]))
    return TaskSet(tasks, unit, len(sequences)), skipped


OTHERS = 3
"""Words of other letters for each word of a letter."""


def letter_tasks(read: LabelledTokens, cfg: ProbeConfig) -> list[ProbeTask]:
    """Return a task for each first letter over whole words, each word once, a third of the words testing."""
    words: dict[str, int] = {}
    for row in np.flatnonzero(read.whole).tolist():
        words.setdefault(read.texts[row].strip().lower(), row)
    rows, first = np.array(list(words.values()), dtype=np.int64), np.array([w[0] for w in words])
    rng = np.random.default_rng(seed_for(cfg.seed, "letters"))
    order = rng.permutation(len(rows))
    cut = len(rows) // 3
    tasks = []
    for letter in sorted(set(first.tolist())):
        sides = []
        for side in (order[cut:], order[:cut]):
            yes, no = side[first[side] == letter], side[first[side] != letter]
            sides.append(np.concatenate([yes, no[: OTHERS * len(yes)]]))
        train, test = sides
        ys = [first[side] == letter for side in sides]
        if all(y.sum() >= max(1, cfg.least // 2) and not y.all() for y in ys):
            tasks.append(ProbeTask(f"begins with {letter}", rows[train], ys[0], rows[test], ys[1]))
    return tasks


def choose_documents(
    corpus: Corpus, cfg: ProbeConfig
) -> tuple[Int64[np.ndarray, " documents"], dict[str, str]]:
    """Return which texts are probed, at most so many of each class, and why classes are left out."""
    if len(corpus.labels) != len(corpus.texts):
        raise UserError(
            f"labels: {len(corpus.labels):,} for {len(corpus.texts):,} texts; give one for each text"
        )
    sizes = Counter(corpus.labels)
    if len(sizes) < 2:
        one = ", ".join(map(repr, sizes)) or "none"
        raise UserError(f"labels: only one class ({one}); probes tell at least two apart")
    least = 3 * cfg.least
    skipped = {
        name: f"{n} documents, {least} needed" for name, n in sorted(sizes.items()) if n < least
    }
    if len(sizes) - len(skipped) < 2:
        name, n = sizes.most_common(2)[1]
        raise UserError(
            f"labels: fewer than two classes have {least} documents, 3 times `least` ({name!r} has {n}); give more, or "
            "lower it"
        )
    rng = np.random.default_rng(seed_for(cfg.seed, "choose documents"))
    cells: dict[tuple[str, str], list[int]] = {}
    second = corpus.beside or [""] * len(corpus.labels)
    for i, (name, other) in enumerate(zip(corpus.labels, second, strict=True)):
        cells.setdefault((str(name), str(other)), []).append(i)
    chosen = [
        rng.permutation(rows)[: cfg.documents]
        for (name, _), rows in sorted(cells.items())
        if name not in skipped
    ]
    return np.concatenate(chosen), skipped


def document_tasks(
    number: Int64[np.ndarray, " documents"], corpus: Corpus, cfg: ProbeConfig
) -> TaskSet:
    """Return one class against the others over the documents that were read; a third of each class tests."""
    labels = np.array([corpus.labels[i] for i in number.tolist()], dtype=object)
    rng = np.random.default_rng(seed_for(cfg.seed, "split"))
    train, test = {}, {}
    for name in sorted(set(labels.tolist())):
        rows = rng.permutation(np.flatnonzero(labels == name))
        cut = len(rows) // 3
        train[name], test[name] = rows[cut:], rows[:cut]
    tasks = one_against_others(train, test, seed_for(cfg.seed, "one against others"))
    return TaskSet(tasks, np.arange(len(number)), len(number))


def spurious_tasks(
    number: Int64[np.ndarray, " documents"], corpus: Corpus, cfg: ProbeConfig
) -> list[ProbeTask]:
    """Return three tasks for each pair of classes and of second labels: the class, the second label, both together.

    As SAEBench makes them of the four cells: m documents of each for the first two tasks; 2m of either of the cells in
    which class and second label go together for the last.
    """
    if corpus.beside is None:
        return []
    pairs = [(str(corpus.labels[i]), str(corpus.beside[i])) for i in number.tolist()]
    rng = np.random.default_rng(seed_for(cfg.seed, "spurious"))
    cells: dict[tuple[str, str], np.ndarray] = {}
    for cell in sorted(set(pairs)):
        rows = np.flatnonzero([pair == cell for pair in pairs])
        if len(rows) >= 3 * cfg.least:
            cells[cell] = rng.permutation(rows)
    names, others = (sorted({cell[i] for cell in cells}) for i in (0, 1))
    out = []
    for a, b in combinations(names, 2):
        for p, q in combinations(others, 2):
            four = [cells.get(cell) for cell in ((a, p), (a, q), (b, p), (b, q))]
            known = [rows for rows in four if rows is not None]
            if len(known) == len(four):
                out += _spurious(known, f"{a} or {b}", f"{p} or {q}")
    return out


def _spurious(cells: Sequence[np.ndarray], name: str, other: str) -> list[ProbeTask]:
    """Return the three tasks of the cells (a, p), (a, q), (b, p), (b, q); a third of every cell tests."""
    rows, ys = [], []
    for test in (False, True):
        ap, aq, bp, bq = (
            cell[: len(cell) // 3] if test else cell[len(cell) // 3 :] for cell in cells
        )
        m = min(len(aq), len(bp), len(ap) // 2, len(bq) // 2)
        half = (ap[:m], aq[:m], bp[:m], bq[:m])
        side = [
            np.concatenate(half),
            np.concatenate([half[0], half[2], half[1], half[3]]),
            np.concatenate([ap[: 2 * m], bq[: 2 * m]]),
        ]
        rows.append(side)
        ys.append(np.arange(4 * m) < 2 * m)
    names = (f"{name}, beside {other}", other, f"{name} with {other}")
    return [
        ProbeTask(task, near, ys[0], far, ys[1])
        for task, near, far in zip(names, *rows, strict=True)
    ]


def _probes(
    found: dict[str, ProbeFindings],
    families: FAMILIES,
    unit: str,
    counts: Json,
    skipped: dict[str, str],
    cfg: ProbeConfig,
) -> Probes:
    hooks = {}
    for hook, findings in found.items():
        members = list(families[hook].saes)
        lines = _compared(findings, families[hook].twins, members, unit, cfg)
        entries = {name: _entry(findings, name, cfg) for name in findings.scores}
        for name in members:
            for key, score in entries[name]["summary"].items():
                score["told_from_random"] = all(
                    line["low"] is not None and (line["low"] > 0 or line["high"] < 0)
                    for line in lines
                    if (line["a"], line["b"], line["metric"]) == (name, FLOOR, key)
                )
        hooks[hook] = {
            "tasks": findings.tasks,
            "letters": findings.letters,
            "pairs": findings.pairs,
            "members": {name: entries[name] for name in members},
            "controls": {name: entries[name] for name in (FLOOR, RAW)},
            "comparisons": lines,
        }
    scores = [score for findings in found.values() for score in findings.scores.values()]
    keys = {key: None for score in scores for key in score}
    names = glossary(numbered(keys))
    record = {"hooks": hooks, "counts": counts, "skipped": skipped, "glossary": names}
    return Probes(found, finite(record | {"config": cfg.to_dict()}))


def _entry(findings: ProbeFindings, name: str, cfg: ProbeConfig) -> Json:
    scores = {
        key: summary(score, cfg) | {"by_task": score.by_task.tolist()}
        for key, score in findings.scores[name].items()
    }
    return {"summary": scores, "chosen": findings.latents[name].tolist()}


def _compared(
    findings: ProbeFindings,
    twins: Mapping[str, str],
    members: Sequence[str],
    unit: str,
    cfg: ProbeConfig,
) -> list[Json]:
    """Return the lines: a, b, metric (the score), over (tasks, or units), difference, low, high, effect_size, n."""
    out = []
    for a, b in [*twins.items(), *((name, FLOOR) for name in members)]:
        for key, score in findings.scores[a].items():
            if key not in findings.scores[b]:  # what removing latents does, beside a transcoder
                continue
            found = differences(score, findings.scores[b][key], unit, cfg)
            for over, gap in found.items():
                out.append({"a": a, "b": b, "metric": key, "over": over, **gap._asdict()})
    return out


def document_reader(
    source: HeldOut, hooks: Sequence[str], language: "LanguageModel | None", cfg: ProbeConfig
) -> DocumentReader:
    """Return what reads documents as a source's activations were made; UserError where the source is no text's."""
    from wsae.acts.live import LiveSource  # loads transformers, which numbers in memory do without

    if isinstance(source, StoreSource) and language is not None:
        made = HarvestConfig.parse(source.store.manifest.config, where="store")
        medians = source.store.manifest.info.get("median_norm")
    elif isinstance(source, LiveSource) and language is not None:
        made, medians = source.cfg, source.flow.rule.medians
    else:
        raise UserError(
            "labelled text is read by the model behind the data, and these are arrays or of images; give a store "
            "harvested from text with --source"
        )
    own = {"hooks": tuple(hooks), "seq_len": cfg.context, "pack": False, "roles": None}
    return DocumentReader(made.model_copy(update=own), language, medians)


def probe_run(
    run: Path,
    source: HeldOut,
    cfg: ProbeConfig = ProbeConfig(),  # noqa: B008  (frozen)
    corpus: Corpus | None = None,
    language: "LanguageModel | None" = None,
    progress: Progress = quiet,
    device: str = "cpu",
) -> Json:
    """Probe every member of a finished run into RUN/probing; return the content of probing.json.

    Without a corpus the tasks are those by rule over the held-out tokens; with one, `language` reads its documents.
    What was found of the other kind stays. Raises UserError when `run` is not finished or does not fit the source.
    """
    opened, families = Run(run), run_subject(run, source)
    for family in families.values():
        for sae in family.saes.values():
            sae.to(device)
    if corpus is None:
        found = {TOKENS: probe_tokens(families, source, cfg, progress).record}
    else:
        reader = document_reader(source, list(families), language, cfg)
        found = {DOCUMENTS: probe_documents(families, reader, corpus, cfg, progress).record}
    former = opened.probing_record if opened.has(PROBING_PART) else {}
    record = {**former, **found}
    write_part(run, PROBING_PART, cfg, {PROBING: record}, {})
    return record
