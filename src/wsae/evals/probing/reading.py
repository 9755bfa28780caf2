"""What members make of labelled tokens and documents: one pass over the rows for every hook and member.

Beside the members stand a random SAE as sparse as the plain one, and the activations themselves. Classes of tokens
come from rules (`RULES`), those of documents from labels.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import scipy.sparse
import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.flow import Flow
from wsae.acts.stream import HeldOut
from wsae.acts.text import Document, Packer, TextCounts, TokenSequence, labelled
from wsae.acts.tokens import TokenTable
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.core.seeds import seed_for
from wsae.evals.config import CONTROL, ProbeConfig
from wsae.evals.control import random_control
from wsae.evals.measure import EvaluatedSaes, check_width, first_rows
from wsae.sae.model import Encoder

Rule = Callable[[Sequence[str], int], bool]
"""(texts of a sequence's tokens, leading spaces included, and a place in it) -> whether the token is of the class."""


def _matches(pattern: str) -> Rule:
    """Return the rule of tokens whose text, spaces stripped, matches the whole pattern."""
    whole = re.compile(pattern)
    return lambda texts, i: whole.fullmatch(texts[i].strip()) is not None


def _word(words: str) -> Rule:
    """Return the rule of whole words: a token that begins a word, is one of `words`, and ends there."""
    known = frozenset(words.split())
    return lambda texts, i: (
        texts[i].strip().lower() in known and _begins(texts, i) and _ends(texts, i)
    )


def _suffix(ending: str, but: str | None = None) -> Rule:
    """Return the rule of tokens that end a word of more letters than `ending`, and end with it and not with `but`."""

    def rule(texts: Sequence[str], i: int) -> bool:
        text = texts[i].strip().lower()
        if not text.endswith(ending) or (but and text.endswith(but)):
            return False
        if not text.isalpha() or not _ends(texts, i):
            return False
        return len(text) > len(ending) + 1 or not _begins(texts, i)

    return rule


def _begins(texts: Sequence[str], i: int) -> bool:
    """Return whether the token is the first of its word."""
    here = texts[i]
    return bool(here) and (not here[0].isalnum() or i == 0 or not texts[i - 1][-1:].isalnum())


def _ends(texts: Sequence[str], i: int) -> bool:
    """Return whether the token is the last of its word; at the end of a sequence it counts as the last."""
    return i + 1 == len(texts) or not texts[i + 1][:1].isalnum()


def _after(before: Rule) -> Rule:
    """Return the rule of tokens that follow one of another rule."""
    return lambda texts, i: i > 0 and before(texts, i - 1)


def _first_letter(letter: str) -> Rule:
    """Return the rule of tokens that begin a word with `letter`, whatever its case."""
    return lambda texts, i: texts[i].strip()[:1].lower() == letter and _begins(texts, i)


def _quoted(texts: Sequence[str], i: int) -> bool:
    """Return whether an odd number of double quotation marks stands before the token, within 60 tokens."""
    before = "".join(texts[max(0, i - 60) : i])
    opened, closed = before.count("\u201c"), before.count("\u201d")
    return '"' not in texts[i] and (before.count('"') % 2 == 1 or opened > closed)


def _in_brackets(texts: Sequence[str], i: int) -> bool:
    before = "".join(texts[max(0, i - 60) : i])
    return before.rfind("(") > before.rfind(")")


def _repeated(texts: Sequence[str], i: int) -> bool:
    """Return whether the same word of four letters or more stands among the 30 tokens before."""
    text = texts[i].strip().lower()
    return (
        len(text) >= 4
        and text.isalpha()
        and any(t.strip().lower() == text for t in texts[max(0, i - 30) : i])
    )


RULES: dict[str, Rule] = {
    "capitalised": lambda texts, i: (
        re.fullmatch(r"[A-Z][a-z]+", texts[i].strip()) is not None and _begins(texts, i)
    ),
    "all capitals": _matches(r"[A-Z]{2,}"),
    "digits": _matches(r"[0-9]+"),
    "comma": _matches(r","),
    "full stop": _matches(r"\."),
    "question or exclamation": _matches(r"[?!]+"),
    "colon or semicolon": _matches(r"[:;]"),
    "bracket": _matches(r"[()\[\]{}]+"),
    "quotation mark": _matches(r"[\"\u201c\u201d]+"),
    "hyphen or dash": _matches(r"[-\u2013\u2014]+"),
    "line break": lambda texts, i: "\n" in texts[i] and not texts[i].strip(),
    "inside a word": lambda texts, i: texts[i][:1].isalpha() and not _begins(texts, i),
    "begins with a vowel": lambda texts, i: (
        texts[i].strip()[:1].lower() in tuple("aeiou") and _begins(texts, i)
    ),
    **{f"begins with {letter}": _first_letter(letter) for letter in "scpm"},
    "eight letters or more": lambda texts, i: (
        len(texts[i].strip()) >= 8 and texts[i].strip().isalpha()
    ),
    **{f"ends in -{ending}": _suffix(ending) for ending in ("ing", "ed", "ly", "tion", "er")},
    "ends in -s": _suffix("s", but="ss"),
    "month": _matches(
        "January|February|March|April|May|June|July|August|September|October|November|December"
    ),
    "number word": _word(
        "one two three four five six seven eight nine ten eleven twelve twenty thirty forty fifty hundred thousand "
        "million first second third"
    ),
    "article": _word("a an the"),
    "preposition": _word(
        "of in to for with on at by from about into over after under between through against"
    ),
    "conjunction": _word("and or but nor yet because although while if unless"),
    "pronoun": _word("i you he she it we they me him her us them"),
    "possessive": _word("my your his its our their"),
    "form of be": _word("am is are was were be been being"),
    "modal verb": _word("can could may might must shall should will would"),
    "negation": _word("not no never none nothing neither nor cannot"),
    "question word": _word("who whom whose which what when where why how"),
    "demonstrative": _word("this that these those"),
    "after a comma": _after(_matches(r",")),
    "after a full stop": _after(_matches(r"\.")),
    "after an article": _after(_word("a an the")),
    "in quotation marks": _quoted,
    "in brackets": _in_brackets,
    "said before": _repeated,
}
"""Each task's name and its rule."""


def label(texts: Sequence[str]) -> Bool[np.ndarray, "tasks tokens"]:
    """Return, for every rule in order and every token of a sequence, whether the token is of the class."""
    found = [[rule(texts, i) for i in range(len(texts))] for rule in RULES.values()]
    return np.array(found, dtype=bool).reshape(len(RULES), len(texts))


if TYPE_CHECKING:
    from wsae.acts.language import LanguageModel

RAW = "activations"
"""Name of the model's own dimensions in results."""
FLOOR = CONTROL
"""Name of the random SAE."""
FAMILIES = dict[str, EvaluatedSaes]
SORTED = 64
"""Batches of documents within which they are sorted by length, so that little padding is run."""


class Coder:
    """Codes of rows, chunk by chunk, by every member of every hook, by a random SAE, and the rows themselves."""

    def __init__(self, families: FAMILIES, seed: int) -> None:
        self._families, self._seed = families, seed
        self._saes = {hook: dict(family.saes) for hook, family in families.items()}
        self._encoders: dict[str, dict[str, Encoder]] = {}
        self._parts: dict[str, dict[str, list[Any]]] = {}
        self._scaled: dict[str, dict[str, list[Any]]] = {}
        """Codes times their rows' scale, of SAEs that take it away."""

    @torch.inference_mode()
    def add(self, x: Mapping[str, Float[Tensor, "rows _"]], pool: Any = None) -> None:
        """Add rows by hook; `pool` [units, rows] makes units of them, whose numbers are sums over rows."""
        for hook in self._families:
            rows = x[hook]
            if hook not in self._parts:
                self.begin(hook, rows)
            parts = self._parts[hook]
            raw = rows.cpu().numpy()
            parts.setdefault(RAW, []).append(raw if pool is None else np.asarray(pool @ raw))
            for name, encode in self._encoders[hook].items():
                sae = self._saes[hook][name]
                here = rows.to(sae.W_dec.device, torch.float32)
                code = encode(here)
                code = code._replace(values=code.values.float())  # NumPy has no bfloat16
                shape = (len(rows), sae.cfg.d_sae)
                table = scipy.sparse.csr_array(tuple(t.cpu().numpy() for t in code), shape=shape)
                parts.setdefault(name, []).append(table if pool is None else pool @ table)
                if sae.cfg.input_norm is not None:
                    factor = scipy.sparse.diags_array(sae.normalised(here).factor.cpu().numpy())
                    table = scipy.sparse.csr_array(factor @ table)
                    scaled = self._scaled[hook].setdefault(name, [])
                    scaled.append(table if pool is None else pool @ table)

    @torch.inference_mode()
    def begin(self, hook: str, rows: Float[Tensor, "rows _"]) -> None:
        """Centre the random SAE on these rows, and make it as sparse as the plain one is there; else the first do."""
        family = self._families[hook]
        for name, sae in family.saes.items():
            check_width(f"{hook}/{name}", sae.cfg.d_in, rows.shape[1])
        plain = next(iter(family.twins.values()), next(iter(family.saes)))
        like = family.saes[plain]
        l0 = len(Encoder(like)(rows.to(like.W_dec.device)).values) / len(rows)
        control = random_control(like, rows.double().mean(0), l0, self._seed)
        self._saes[hook][CONTROL] = control
        self._encoders[hook] = {name: Encoder(sae) for name, sae in self._saes[hook].items()}
        self._parts[hook], self._scaled[hook] = {}, {}

    def written(self, hook: str, tables: Mapping[str, Any]) -> "Iterator[WrittenCodes]":
        """Yield what the members and the random SAE of a hook write into its rows, given its `tables`.

        Transcoders write elsewhere, and are left out.
        """
        for name, sae in self._saes[hook].items():
            if not sae.cfg.transcoder:
                scaled = self._scaled[hook].get(name)
                codes = tables[name] if scaled is None else _stacked(scaled)
                yield WrittenCodes(name, codes, sae.W_dec.detach().double().cpu().numpy())

    def tables(self) -> dict[str, dict[str, Any]]:
        """Return hook -> member (the activations and the random SAE too) -> what it makes of all rows or units."""
        return {
            hook: {name: _stacked(parts) for name, parts in named.items()}
            for hook, named in self._parts.items()
        }


def _stacked(parts: list[Any]) -> Any:
    if isinstance(parts[0], np.ndarray):
        return np.concatenate(parts)
    return scipy.sparse.csr_array(scipy.sparse.vstack(parts))


class WrittenCodes(NamedTuple):
    """What a member writes into rows or units: codes @ decoder."""

    name: str
    codes: Any
    """Its latents, times their rows' scale where the SAE normalises its rows."""
    decoder: Float64[np.ndarray, "d_sae d_in"]


class LabelledTokens(NamedTuple):
    """Held-out tokens: their sequence, their text, which are of which rule's class, and what members make of them."""

    seq: Int64[np.ndarray, " tokens"]
    texts: list[str]
    whole: Bool[np.ndarray, " tokens"]
    """Whether the token is a whole word of letters."""
    labels: dict[str, Bool[np.ndarray, " tokens"]]
    """Which are of the class, by rule."""
    coder: Coder


def read_tokens(
    source: HeldOut, families: FAMILIES, cfg: ProbeConfig, progress: Progress = quiet
) -> LabelledTokens:
    """Return the first held-out tokens and what every member makes of them; UserError where the data have no text."""
    for hook in families:
        if hook not in source.hooks:
            raise UserError(f"the data have no hook {hook!r}; they have {', '.join(source.hooks)}")
    table = source.tokens()
    if table is None:
        raise UserError(
            "the data have no tokens, which tasks by rule need; probe a store harvested from text, or give "
            "labelled text: --text FILE --label COLUMN"
        )
    ruled = lru_cache(maxsize=1)(partial(_ruled, table))  # rows come sequence by sequence
    coder = Coder(families, cfg.seed)
    seqs, texts, labels, whole = [], [], [], []
    with progress("tokens", cfg.tokens, "tokens") as tick:
        for chunk in first_rows(source.heldout(cfg.batch_size), cfg.tokens):
            coder.add(chunk.x)
            seqs.append(chunk.seq.numpy().astype(np.int64))
            for seq, pos in zip(chunk.seq.tolist(), chunk.pos.tolist(), strict=True):
                found = ruled(seq)
                texts.append(found.texts[pos])
                labels.append(found.labels[:, pos])
                whole.append(found.whole[pos])
            tick(len(chunk.seq))
    if not seqs:
        raise UserError("there are no held-out rows to probe; hold out more data")
    by_rule = dict(zip(RULES, np.stack(labels, axis=1), strict=True))
    return LabelledTokens(np.concatenate(seqs), texts, np.array(whole), by_rule, coder)


class _RuledSequence(NamedTuple):
    texts: list[str]
    labels: Bool[np.ndarray, "rules tokens"]
    whole: list[bool]


def _ruled(table: TokenTable, seq: int) -> _RuledSequence:
    texts = table.decode(table.ids[seq, : int(table.lengths[seq])])
    ends = [*(not t[:1].isalnum() for t in texts[1:]), False]
    whole = [
        t[:1] == " " and t[1:].isalpha() and t.isascii() and end
        for t, end in zip(texts, ends, strict=True)
    ]
    return _RuledSequence(texts, label(texts), whole)


class Corpus(NamedTuple):
    """Texts with the class of each, by name, and what may go with it by accident (none: not asked)."""

    texts: Sequence[str]
    labels: Sequence[str]
    beside: Sequence[str] | None = None
    """A second label of each text, for spurious correlation removal."""
    counts: Mapping[str, int] = {}
    """What was read, and what was left out, by reason."""


MOST_CLASSES = 1000


def read_corpus(
    text: TextConfig, label: str, beside: str | None, cfg: ProbeConfig, progress: Progress = quiet
) -> Corpus:
    """Read the texts with a label in a column; of each class (with its second label) at most `documents`, at random.

    Raises UserError as `labelled` does, and for a column with more than `MOST_CLASSES` values.
    """
    columns = [label] if beside is None else [label, beside]
    reading, rng = TextCounts(), np.random.default_rng(seed_for(cfg.seed, "corpus"))
    kept: dict[tuple[str, ...], list[str]] = {}
    seen = Counter[tuple[str, ...]]()
    with progress("read", None, "documents") as tick:
        for document in labelled(text, columns, reading):
            seen[document.labels] += 1
            texts, n = kept.setdefault(document.labels, []), seen[document.labels]
            if len(kept) > MOST_CLASSES:
                raise UserError(
                    f"text {text.path}: over {MOST_CLASSES:,} different values in {' and '.join(columns)}; name a "
                    "column that tells classes apart"
                )
            place = len(texts) if n <= cfg.documents else int(rng.integers(n))
            if place < cfg.documents:
                texts[place : place + 1] = [document.text]
            tick(1)
    rows = [(t, labels) for labels, texts in sorted(kept.items()) for t in texts]
    counts = {"read": reading.documents, "empty": reading.empty, **reading.records}
    return Corpus(
        [t for t, _ in rows],
        [labels[0] for _, labels in rows],
        None if beside is None else [labels[1] for _, labels in rows],
        {reason: n for reason, n in counts.items() if n},
    )


class LabelledDocuments(NamedTuple):
    """Documents: which of the texts given they are, what members make of their mean, and what was left out."""

    number: Int64[np.ndarray, " documents"]
    coder: Coder
    counts: Counter[str]


class DocumentReader:
    """A model that reads documents one by one, as a run's activations were made; `medians`: norms that mark sinks."""

    def __init__(
        self, cfg: HarvestConfig, language: "LanguageModel", medians: dict[str, float] | None
    ) -> None:
        self._flow, self._packer = Flow(cfg, language), Packer(cfg, language.tokenizer, False)
        self._flow.rule.medians = medians or dict.fromkeys(self._flow.hooks, float("inf"))
        self._size = cfg.batch_seqs
        self.hooks = self._flow.hooks

    def read(
        self,
        texts: Sequence[str],
        chosen: Int64[np.ndarray, " documents"],
        families: FAMILIES,
        seed: int,
        progress: Progress = quiet,
    ) -> LabelledDocuments:
        """Return what every member makes of the mean row of each chosen text; one without a row is counted."""
        coder, counts = Coder(families, seed), Counter[str]()
        order: list[int] = []
        sequences = self._sequences(texts, chosen, seed, order, counts)
        first, kept = 0, []
        with progress("documents", len(chosen), "documents") as tick:
            for step in self._flow.through(sequences):
                batch = len(step.lengths)
                rows = np.bincount(step.seq.numpy() - first, minlength=batch)
                there = np.flatnonzero(rows)
                where = np.searchsorted(there, step.seq.numpy() - first)
                shape = (len(there), len(where))
                mean = scipy.sparse.csr_array(
                    (1 / rows[there][where], (where, np.arange(len(where)))), shape=shape
                )
                if len(where):
                    coder.add(step.x, mean.astype(np.float32))
                kept += [order[first + i] for i in there.tolist()]
                counts["without a token that is kept"] += batch - len(there)
                first += batch
                tick(batch)
        return LabelledDocuments(np.array(kept, dtype=np.int64), coder, +counts)

    def _sequences(
        self,
        texts: Sequence[str],
        chosen: Int64[np.ndarray, " documents"],
        seed: int,
        order: list[int],
        counts: Counter[str],
    ) -> Iterator[tuple[TokenSequence, ...]]:
        """Yield batches of documents of about the same length in random order; `order` tells which they are."""
        rng = np.random.default_rng(seed_for(seed, "documents"))
        shuffled = iter(rng.permutation(chosen).tolist())
        while window := list(islice(shuffled, SORTED * self._size)):
            made = [(i, self._packer.whole(Document(i, str(texts[i])), 0)) for i in window]
            there = [(i, s) for i, s in made if s is not None]
            counts["empty"] += len(made) - len(there)
            counts["cut to the context"] += sum(s.cut for _, s in there)
            there.sort(key=lambda pair: pair[1].length)
            batches = [there[a : a + self._size] for a in range(0, len(there), self._size)]
            for number in rng.permutation(len(batches)).tolist():
                batch = batches[number]
                width = batch[-1][1].length
                order += [i for i, _ in batch]
                yield tuple(s._replace(ids=s.ids[:width]) for _, s in batch)
