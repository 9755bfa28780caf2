"""An SAE as Neuronpedia takes it: SAEDashboard's batches, rows of Neuronpedia's database, bodies of its upload.

All three say the same of a latent, and that is what the run's index says of it; nothing is measured here. Texts of
models and users stay data: what a database or the site refuses (a NUL, an empty token, half a surrogate pair) is
replaced, nothing is marked up.
"""

import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np

from wsae.acts.hooknames import hook_name
from wsae.core.artifact import free, replacing, write_manifest
from wsae.core.errors import UserError
from wsae.core.files import Json, write_json, writing
from wsae.report.charts import CONTINUED
from wsae.sae.config import Provenance
from wsae.serve.build import clean
from wsae.serve.index import Index, Member, Pairs
from wsae.serve.schema import occupied

PER_BATCH = 128
"""Latents of a batch: the most that the site takes in one call."""
BARS, INTERVALS = 40, 5
"""Bars of a histogram of activations and intervals that samples stand for, as SAEDashboard has them."""
KIND = "neuronpedia folder"
CREATOR = "clkht01d40000jv08hvalcvly"
"""The user whom every new Neuronpedia has and its own exports name; an upload has the key's owner."""
_MODEL = re.compile(r"[a-z0-9][a-z0-9._-]*")
_SET = re.compile(r"(?!.*--)(?!neurons$)[a-z]([a-z0-9-]*[a-z0-9])?")
MOST_TOKENS, MOST_LOGITS, MOST_TEXT = 1024, 20, 512
"""The site's limits: tokens of a context, tokens a latent promotes, UTF-16 units of an explanation."""


class Source(NamedTuple):
    """The place of one SAE on Neuronpedia: a model, a set of sources, and the layer of this one."""

    model: str
    set: str
    layer: int
    hook: str
    """The hook point's name in TransformerLens."""
    about: Provenance

    @property
    def id(self) -> str:
        """The source's name, LAYER-SET."""
        return f"{self.layer}-{self.set}"

    @property
    def words(self) -> str:
        """The SAE in a few words."""
        about = self.about
        made = "trained with wsae" if about.wsae_version else f"by {about.origin.get('format')}"
        return plain(f"{about.member or 'SAE'} at {about.hook}, {made}")


def source_of(about: Provenance, model: str | None, named: str | None) -> Source:
    """Return where an SAE goes, its model and its set named as asked, else after the run's model and the member.

    Raises UserError for a name that Neuronpedia does not take, or a hook in no block.
    """
    model = model or (about.model or "").rsplit("/", 1)[-1].lower()
    named = named or "-".join(re.findall("[a-z0-9]+", f"wsae {about.member or ''}".lower()))
    if not _MODEL.fullmatch(model):
        why = f"not {model!r}" if model else "the run does not say it"
        raise UserError(f"--model-id: the model's name on Neuronpedia, such as gemma-2-2b; {why}")
    if not _SET.fullmatch(named):
        raise UserError(
            f"--set {named!r}: Neuronpedia's names of sets have lower-case letters, digits and single hyphens"
        )
    hook = hook_name(about.hook or "")
    if hook.layer is None:
        raise UserError(
            f"hook {about.hook!r} lies in no block, and Neuronpedia names sources LAYER-SET"
        )
    return Source(model, named, hook.layer, hook.name, about)


class Interval(NamedTuple):
    """An interval of activations, and the share of all tokens whose activation lies in it."""

    low: float
    high: float
    share: float


class Window(NamedTuple):
    """Some tokens with a latent's activations around a firing: one of its strongest, or one drawn at random."""

    tokens: list[str]
    acts: list[float]
    peak: int
    of: Interval | None = None
    """The interval that a random firing stands for; none: it is among the strongest."""


class PromotedToken(NamedTuple):
    """A token that a latent promotes, and by how much."""

    token: str
    value: float


class Written(NamedTuple):
    """A folder's files, and how many latents they hold."""

    files: list[str]
    latents: int


class Bars(NamedTuple):
    """A histogram: the middle of each bar, and how many activations it stands for."""

    middles: list[float]
    heights: list[float]


class FiringCounts:
    """How many of a latent's activations lie where, up to the strongest.

    The index counts in bins of an eighth of a decade; each one's count is spread evenly over its width.
    """

    def __init__(self, counts: list[int], peak: float) -> None:
        powers, found = occupied(counts)
        self.edges = 10.0 ** np.array(powers)
        self.peak, self.sums = peak, np.concatenate([[0], np.cumsum(found)])
        if found:
            self.edges[-1] = max(self.edges[-2], min(self.edges[-1], peak))

    def bars(self) -> Bars:
        """Return them in equal bars; empty where nothing was counted."""
        if not len(self.edges):
            return Bars([], [])
        low, high = self.edges[0], max(self.edges[-1], self.edges[0] * (1 + 1e-9))
        new = np.linspace(low, high, BARS + 1)
        heights = np.diff(np.interp(new, self.edges, self.sums))
        middles = (new[1:] + new[:-1]) / 2
        return Bars([float(f"{x:.5g}") for x in middles], [round(float(h), 3) for h in heights])

    def interval(self, act: float, density: float) -> Interval | None:
        """Return the interval that an activation is in, of equal ones from 0 on; none where nothing was counted.

        SAEDashboard's: the first one holds the tokens on which the latent is silent.
        """
        if not len(self.edges):
            return None
        step = self.peak / INTERVALS
        place = min(int(act / step), INTERVALS - 1)
        low, high = place * step, (place + 1) * step
        below = np.interp([low, high], self.edges, self.sums) / self.sums[-1] * density
        silent = 0.0 if place else 1.0 - density
        return Interval(low, high, min(1.0, float(below[1] - below[0]) + silent))


class Latent(NamedTuple):
    """What is published of a latent."""

    number: int
    density: float
    peak: float
    """The strongest activation."""
    up: list[PromotedToken]
    down: list[PromotedToken]
    near: Pairs
    bars: Bars
    windows: list[Window]
    said: list[str]
    """What a user called it, and its explanation."""


Names = Mapping[str, Json]
"""Number of a latent, in words -> {"name": ...}, as users typed it (`Run.names`)."""


def latents(index: Index, member: Member, names: Names) -> Iterator[Latent]:
    """Yield every latent of a member that has contexts of text, in order: the site takes no others."""
    for number in range(member.size):
        key = member.key(number)
        told = index.record(key)
        strongest, samples = (_windows(told.get(n, [])) for n in ("contexts", "samples"))
        if not strongest:
            continue
        numbers = index.numbers([key])[key]
        near, logits, counts = index.packed(key)
        half, density = len(logits) // 2, numbers["density"] or 0.0
        named = names.get(str(number), {}).get("name")
        peak = max(numbers["max"] or 0.0, *(max(window.acts) for window in strongest))
        fired = FiringCounts(counts, peak)
        samples = [w._replace(of=fired.interval(w.acts[w.peak], density)) for w in samples]
        yield Latent(
            number=number,
            density=density,
            peak=peak,
            up=_logits(index, logits[:half]),
            down=_logits(index, logits[half:]),
            near=near,
            bars=fired.bars(),
            windows=strongest + samples,
            said=[plain(text) for text in (named, told.get("explanation")) if text],
        )


def _windows(contexts: list[Json]) -> list[Window]:
    """Return contexts of text as they are published, those that the site takes."""
    return [
        Window(
            [plain(token) or CONTINUED for token in context["tokens"]],
            [float(act) for act in context["acts"]],
            context["peak"],
        )
        for context in contexts
        if context.get("peak") is not None and len(context["tokens"]) <= MOST_TOKENS
    ]


def _logits(index: Index, pairs: Pairs) -> list[PromotedToken]:
    texts = index.tokens([token for token, _ in pairs])
    return [PromotedToken(plain(texts[t]) or CONTINUED, float(f"{v:.4g}")) for t, v in pairs]


def plain(text: str) -> str:
    """Return a text that a database takes."""
    return clean(text).replace("\0", " ")


# One latent in the words of each.


def dashboard(latent: Latent, source: Source, sequences: int) -> Json:
    """Return a feature of SAEDashboard's batches; what the index does not know is empty, as SAEDashboard leaves it."""
    return {
        "feature_index": latent.number,
        **_UNKNOWN,
        **_measured(latent),
        "n_prompts_total": sequences,
        "n_tokens_in_prompt": source.about.context or 0,
        "dataset": source.about.dataset or "",
        "activations": [
            {
                **_interval(latent, window, "bin_min", "bin_max", "bin_contains"),
                "tokens": window.tokens,
                "values": window.acts,
                "qualifying_token_index": window.peak,
            }
            for window in latent.windows
        ],
        "vector": [],
    }


_UNKNOWN: Json = {
    **{f"neuron_alignment_{name}": [] for name in ("indices", "values", "l1")},
    **{f"correlated_neurons_{name}": [] for name in ("indices", "l1", "pearson")},
    **{f"correlated_features_{name}": [] for name in ("indices", "l1", "pearson")},
    "logits_hist_data_bar_heights": [],
    "logits_hist_data_bar_values": [],
    "decoder_weights_dist": [],
}
"""Of neurons, correlations and the whole vocabulary; the last is of attention heads."""


def _measured(latent: Latent) -> Json:
    return {
        "neg_str": [logit.token for logit in latent.down],
        "neg_values": [logit.value for logit in latent.down],
        "pos_str": [logit.token for logit in latent.up],
        "pos_values": [logit.value for logit in latent.up],
        "frac_nonzero": latent.density,
        "freq_hist_data_bar_heights": latent.bars.heights,
        "freq_hist_data_bar_values": latent.bars.middles,
    }


def _interval(latent: Latent, window: Window, *names: str) -> Json:
    """Return the interval that a window stands for; SAEDashboard's mark where it is of the strongest."""
    of = window.of or Interval(-1.0, latent.peak, -1.0)
    return dict(zip(names, of, strict=True))


def feature_row(latent: Latent, source: Source) -> Json:
    """Return a row of Neuronpedia's table of features."""
    return {
        **_place(latent, source),
        "creatorId": CREATOR,
        "maxActApprox": latent.peak,
        "hasVector": False,
        "vector": [],
        "vectorLabel": None,
        "vectorDefaultSteerStrength": latent.peak,
        "hookName": source.hook,
        "topkCosSimIndices": [number for number, _ in latent.near],
        "topkCosSimValues": [round(cosine, 6) for _, cosine in latent.near],
        **_UNKNOWN,
        **_measured(latent),
        "sourceSetName": source.set,
    }


def activation_rows(latent: Latent, source: Source) -> Iterator[Json]:
    """Yield a row for each context."""
    for rank, window in enumerate(latent.windows):
        yield {
            "id": _id(source, latent, "activation", rank),
            "tokens": window.tokens,
            **_place(latent, source),
            "maxValue": max(window.acts),
            "maxValueTokenIndex": window.acts.index(max(window.acts)),
            "minValue": min(window.acts),
            "values": window.acts,
            "creatorId": CREATOR,
            "dataSource": None,
            "dataIndex": None,
            "dfaValues": [],
            "dfaTargetIndex": None,
            "dfaMaxValue": None,
            "lossValues": [],
            "logitContributions": None,
            **_interval(latent, window, "binMin", "binMax", "binContains"),
            "qualifyingTokenIndex": window.peak,
        }


def explanation_rows(latent: Latent, source: Source) -> Iterator[Json]:
    """Yield a row for each thing that is said of it; the site has no name for how that was made."""
    for rank, text in enumerate(latent.said):
        yield {
            "id": _id(source, latent, "explanation", rank),
            **_place(latent, source),
            "description": text,
            "authorId": CREATOR,
            "typeName": None,
            "explanationModelName": None,
        }


def _place(latent: Latent, source: Source) -> Json:
    return {"modelId": source.model, "layer": source.id, "index": str(latent.number)}


def _id(source: Source, latent: Latent, what: str, rank: int) -> str:
    """Return a row's name, the same each time: a second import adds nothing."""
    words = json.dumps([source.model, source.id, latent.number, what, rank])
    return f"w{hashlib.sha256(words.encode()).hexdigest()[:24]}"


def upload_body(batch: list[Latent], source: Source) -> Json:
    """Return the body of an upload."""
    return {
        "modelId": source.model,
        "source": source.id,
        "features": [_uploaded(latent) for latent in batch],
    }


def _uploaded(latent: Latent) -> Json:
    said = (text.encode("utf-16-le")[: 2 * MOST_TEXT] for text in latent.said)
    texts = [units.decode("utf-16-le", "ignore") for units in said]
    return {
        "index": latent.number,
        "density": latent.density,
        "activations": [
            {"tokens": window.tokens, "values": window.acts, **_quantile(window)}
            for window in latent.windows
        ],
        "explanations": [{"text": text, "methodName": None, "modelName": None} for text in texts],
        "topLogits": [logit._asdict() for logit in latent.up[:MOST_LOGITS]],
        "bottomLogits": [logit._asdict() for logit in latent.down[:MOST_LOGITS]],
    }


def _quantile(window: Window) -> Json:
    low, high, share = window.of or (None, None, None)
    return {"quantileMin": low, "quantileMax": high, "quantileFraction": share}


# The folder.


def batches(found: Iterable[Latent]) -> Iterator[list[Latent]]:
    """Yield latents in batches of one call's size."""
    batch: list[Latent] = []
    for latent in found:
        batch.append(latent)
        if len(batch) == PER_BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def write(
    out: Path, found: Iterable[Latent], member: Member, source: Source, sequences: int
) -> Written:
    """Write latents of a member as SAEDashboard's batches and Neuronpedia's rows to a folder.

    Raises UserError where the folder holds something else, or no latent has contexts.
    """
    free(out, KIND, force=True)
    export = f"export/{source.model}/{source.id}"
    written, missing = [], set(range(member.size))
    with replacing(out, KIND):
        for number, batch in enumerate(batches(found)):
            missing -= {latent.number for latent in batch}
            told: Json = {"model_id": source.model, "layer": source.layer, "sae_set": source.set}
            features = [dashboard(latent, source, sequences) for latent in batch]
            name = f"dashboard/batch-{number}.json"
            write_json(out / name, {**told, "sae_id_suffix": None, "features": features})
            written.append(name)
            for table, rows in _tables(batch, source).items():
                if rows:
                    written.append(f"{export}/{table}/batch-{number}.jsonl.gz")
                    with writing(out / written[-1]) as temporary:
                        temporary.write_bytes(gzip.compress(_lines(rows), mtime=0))
        if not written:
            raise UserError(f"{out}: no latent of {member.name} has contexts of text to publish")
        skipped = {"model_id": source.model, "layer": str(source.layer), "sae_set": source.set}
        write_json(
            out / "dashboard/skipped_indexes.json",
            {**skipped, "skipped_indexes": sorted(missing)},
        )
        written.append("dashboard/skipped_indexes.json")
        for name, row in _above(source, sequences).items():
            written.append(f"{export}/{name}.jsonl")
            with writing(out / written[-1]) as temporary:
                temporary.write_bytes(_lines([row]))
        config = {"model": source.model, "source": source.id}
        write_manifest(out, KIND, config, written)
    return Written(written, member.size - len(missing))


def _tables(batch: list[Latent], source: Source) -> dict[str, list[Json]]:
    return {
        "features": [feature_row(latent, source) for latent in batch],
        "activations": [row for latent in batch for row in activation_rows(latent, source)],
        "explanations": [row for latent in batch for row in explanation_rows(latent, source)],
    }


def _above(source: Source, sequences: int) -> dict[str, Json]:
    """Return the rows that latents hang on: release, model, set and source."""
    release, public = f"{source.model}-{source.set}", {"visibility": "PUBLIC"}
    by = {"creatorId": CREATOR}
    return {
        "release": {
            "name": release,
            "description": source.words,
            "creatorName": "wsae",
            **by,
            **public,
        },
        "model": {
            "id": source.model,
            "instruct": False,
            "displayNameShort": source.model,
            "displayName": source.model,
            "owner": "",
            "layers": 0,
            "neuronsPerLayer": 0,
            **by,
            **public,
        },
        "sourceset": {
            "modelId": source.model,
            "name": source.set,
            "description": source.words,
            "creatorName": "wsae",
            "releaseName": release,
            **by,
            **public,
        },
        "source": {
            "id": source.id,
            "modelId": source.model,
            "setName": source.set,
            "dataset": source.about.dataset or "",
            "num_prompts": sequences,
            "num_tokens_in_prompt": source.about.context,
            **by,
            **public,
        },
    }


def _lines(rows: list[Json]) -> bytes:
    lines = (json.dumps(row, ensure_ascii=False, allow_nan=False) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode()
