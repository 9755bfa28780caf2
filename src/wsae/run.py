"""`Run`: a run's directory, the names of its files, and what they hold, read when first asked for and checked.

Whoever sends a run can seal whatever JSON they like. Keys that are not named in a form here pass, and no page shows
them but as they are; a named one is of its form, or the file is refused in one line.
"""

from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    InstanceOf,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from wsae.core.artifact import (
    ARRAYS,
    CLASSES,
    CLASSES_PART,
    CONFIG,
    CONTEXTS_FILE,
    EVALUATION,
    EVALUATION_PART,
    GAMMA_FILE,
    INTERPRETATION,
    INTERPRETATION_PART,
    MANIFEST,
    MEMBERS,
    METRICS_FILE,
    NAMES_FILE,
    PARTS,
    PROBING,
    PROBING_PART,
    PROVENANCE,
    THUMBNAILS_FILE,
    Manifest,
    check_file,
    contained,
    free,
    read_manifest,
    replacing,
)
from wsae.core.errors import UserError, understood
from wsae.core.files import (
    Json,
    digest,
    locked_file,
    parse_json,
    read_json,
    read_lines,
    write_json,
)
from wsae.sae.config import SINGLE, Provenance, SAEConfig, SingleConfig
from wsae.train.config import TrainConfig

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from wsae.sae import SAE

LARGEST = 1e100
"""No measured number comes near this; the arithmetic of axes overflows beyond."""


def _drawable(value: float | None) -> float | None:
    if value is not None and LARGEST < abs(value) < float("inf"):
        raise ValueError("is too large a number")
    return value


Text = InstanceOf[str]
"""Half of a surrogate pair included, which JSON can carry and pydantic's own text cannot."""
Number = Annotated[float | None, AfterValidator(_drawable)]
"""A number, NaN and infinities included, or nothing."""
Finite = Annotated[float, Field(ge=-LARGEST, le=LARGEST, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=1 << 53)]
Glossary = dict[Text, dict[Text, Any]]


class Form(BaseModel):
    """A JSON object: named keys of the right type, others of any."""

    model_config = ConfigDict(extra="allow", strict=True)


class GammaForm(Form):
    """A member's record in gamma.json."""

    rule: Text | None = None
    alpha: Number = None
    heaviest: list[Annotated[list[Number], Field(min_length=2)]] = []
    without_mask: dict[Text, Any] | None = None


class MetricForm(Form):
    """A value with its interval."""

    value: Number = None
    low: Number = None
    high: Number = None


class AnsweredForm(MetricForm):
    """A score with the counts of what was asked."""

    requested: Count | None = None
    parsed: Count = 0
    failed: Count = 0
    not_asked: Count = 0


class ComparisonForm(Form):
    """A member against its twin."""

    a: Text = ""
    b: Text = ""
    metric: Text = ""
    over: Text = ""
    unit: Text = "sample"
    difference: Number = None
    low: Number = None
    high: Number = None
    effect_size: Number = None
    n: Count | None = None
    paired: bool = True


class EvaluatedMember(Form):
    """A member's metrics."""

    metrics: dict[Text, MetricForm] = {}
    gamma: GammaForm | None = None
    sources: dict[Text, dict[Text, Count]] | None = None
    """Whose a crosscoder's live latents are (`wsae.evals.latents.whose`)."""


class EvaluatedHook(Form):
    """What was measured at a hook."""

    members: dict[Text, EvaluatedMember] = {}
    comparisons: list[ComparisonForm] = []
    matching: dict[Text, dict[Text, Any]] = {}


class EvaluationForm(Form):
    """evaluation.json."""

    hooks: dict[Text, EvaluatedHook] = {}
    glossary: Glossary = {}
    heldout_tokens: Number = None
    heldout_sequences: Number = None


class ContextForm(Form):
    """A window of tokens with one latent's activations."""

    tokens: list[Text]
    acts: list[Finite]
    peak: Count | None = None
    seq: Count | None = None

    @model_validator(mode="after")
    def _fits(self) -> "ContextForm":
        if len(self.tokens) != len(self.acts):
            raise ValueError("has not one activation a token")
        if self.peak is not None and self.peak >= len(self.tokens):
            raise ValueError("has its peak beyond its tokens")
        return self


class MatchForm(Form):
    """The most similar latent of another member."""

    member: Text
    latent: Count
    cosine: Number = None


class SaidForm(Form):
    """What is said of a latent beside its numbers and contexts."""

    match: MatchForm | None = None
    scores: dict[Text, Number] = {}
    explanation: Text | None = None
    tokens: list[Text] = []


class LabelForm(Form):
    """A class that probes tell by a latent: the kind of labels, the class, the latent's place among those chosen."""

    kind: Text
    task: Text
    rank: Count


class ShownForm(SaidForm):
    """What an index keeps of a latent beside its numbers."""

    contexts: list[ContextForm] = []
    labels: list[LabelForm] = []


class LatentForm(SaidForm):
    """A latent of contexts.json."""

    latent: Count
    contexts: list[ContextForm]
    density: Number = None
    variance: Number = None
    max: Number = None


class ScoredLatent(Form):
    """A latent among those that were scored."""

    latent: Count
    density: Share | None = None


class CountsForm(Form):
    """How many latents were scored, and why others were not."""

    sampled: Count = 0
    scored: Count = 0
    skipped: dict[Text, Count] = {}


class ScoredMember(Form):
    """A member's or a control's mean scores."""

    summary: dict[Text, AnsweredForm] = {}
    density: dict[Text, Number] = {}
    counts: CountsForm = CountsForm()
    latents: list[ScoredLatent] = []
    chosen: list[list[Count]] = []
    """Of probes: each task's latents."""


class ScoredHook(Form):
    """What was scored at a hook."""

    members: dict[Text, ScoredMember] = {}
    controls: dict[Text, ScoredMember] = {}
    comparisons: list[ComparisonForm] = []
    tasks: list[Text] = []


class InterpretationForm(Form):
    """interpretation.json, and each kind of labels in probing.json."""

    hooks: dict[Text, ScoredHook] = {}
    glossary: Glossary = {}
    judges: dict[Text, Any] = {}
    counts: dict[Text, Count] = {}
    skipped: dict[Text, Text] = {}


class CoverageForm(Form):
    """How many latents a class score covers."""

    latents: Count
    alive: Share
    supported: Share


class ClassMember(Form):
    """A member's or a control's mean class scores."""

    scores: dict[Text, AnsweredForm]
    coverage: CoverageForm
    density: dict[Text, Number]


class ClassConfig(Form):
    """The settings that the page words."""

    min_support: Count


class ClassHook(Form):
    """Class scores at a hook."""

    config: ClassConfig
    members: dict[Text, ClassMember]
    controls: dict[Text, ClassMember]
    comparisons: list[ComparisonForm]


class ClassesForm(Form):
    """classes.json."""

    hooks: dict[Text, ClassHook]
    glossary: Glossary = {}


class SourceForm(Form):
    """Where a run's activations came from."""

    harvest: dict[Text, Any] | None = None


class RunConfigForm(Form):
    """config.json of a run."""

    source: SourceForm | None = None


class RunInfoForm(Form):
    """What a run's manifest tells of it."""

    members: dict[Text, list[Text]] = {}


class MetricsRow(Form):
    """A line of metrics.jsonl."""

    hook: Text
    member: Text
    step: Number = None
    tokens: Number = None
    fvu: Number = None
    fvu_weighted: Number = None
    l0: Number = None
    dead_frac: Number = None


NAME_CHARS = 200
"""Characters of a latent's name."""


class NamedLatent(Form):
    """What a user calls a latent, and whether it is starred."""

    name: Annotated[str, Field(max_length=NAME_CHARS)] = ""
    star: bool = False


Picture = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
_RUN_CONFIG = TypeAdapter(RunConfigForm)
_RUN_INFO = TypeAdapter(RunInfoForm)
_METRICS_ROW = TypeAdapter(MetricsRow)
_GAMMA = TypeAdapter(dict[Text, dict[Text, GammaForm | None]])
_EVALUATION = TypeAdapter(EvaluationForm)
_CONTEXTS = TypeAdapter(dict[Text, dict[Text, list[LatentForm]]])
_INTERPRETATION = TypeAdapter(InterpretationForm)
_CLASSES = TypeAdapter(ClassesForm)
_PROBING = TypeAdapter(dict[Text, InterpretationForm])
_NAMES = TypeAdapter(
    dict[Text, dict[Text, dict[Annotated[str, Field(pattern=r"^[0-9]{1,10}$")], NamedLatent]]]
)
_THUMBNAILS = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[0-9]{1,15}$")], Picture])
"""Image number -> PNG in base64; nothing else may reach an address on the page."""


def formed(form: TypeAdapter, value: object, where: PathLike[str] | str) -> Any:
    """Return a parsed JSON value as it is; raises UserError naming `where` when it is not of a form."""
    try:
        form.validate_python(value, strict=True)
    except (ValidationError, RecursionError) as error:
        raise UserError(
            f"{where}: not of the form that this wsae writes ({reason(error)}); make it again"
        ) from error
    return value


def reason(error: Exception) -> str:
    """Return where and why a value is not of its form, in a few words."""
    if not isinstance(error, ValidationError):
        return "nested too deep"
    first = error.errors(include_url=False, include_input=False, include_context=False)[0]
    place = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
    return f"{place[-100:]} {message[:120]}".strip()


BY_LATENT = (
    *("density", "variance", "match_index", "match_cosine", "decoder_max_cosine"),
    *("consistency_top", "consistency_corrected", "selectivity", "information"),
    "relative_norm",
)
BY_DIMENSION = ("ev_per_dim", "gamma", "input_variance")
"""Arrays that are shown: those of one member, or hook, are equally long."""


def _plausible(name: str, array: "np.ndarray") -> bool:
    import numpy as np

    if name in ("density", "relative_norm"):
        return bool(((array >= 0) & (array <= 1)).all())
    if name == "match_index":
        return bool(((array >= -1) & (array < 1 << 31) & (array == np.floor(array))).all())
    if name in ("gamma", "input_variance") and not np.isfinite(array).all():
        return False
    return not bool((np.abs(array[np.isfinite(array)]) > LARGEST).any())


Trained = dict[str, dict[str, Any]]
"""hook -> member -> what is known of it."""


class Run:
    """A run's directory; each part is read, and checked, when it is first asked for.

    A run may be unfinished, or not evaluated or interpreted: `has` tells which parts are there. A part that was cut or
    altered, or is not of its form, is refused with a `UserError` of one line. The directory of one SAE, imported or
    saved by itself, is a run of one member, "sae" (`single`), whose `config` says only what its files say.
    """

    def __init__(self, path: Path | str) -> None:
        """Raise UserError when there is no such directory, or it is none of a run."""
        self.path = Path(path)
        if not self.path.is_dir():
            raise UserError(
                f"{path}: no such run directory; give the --out of a `wsae train` or `wsae demo`, or an SAE"
            )
        if not (self.path / CONFIG).is_file():
            raise UserError(
                f"{path}: has no {CONFIG}, so it is not a wsae run directory "
                "(an SAE of another tool is read by wsae import)"
            )

    @classmethod
    def of_sae(
        cls,
        sae: "SAE",
        path: Path | str,
        about: Provenance = Provenance(),  # noqa: B008  (frozen)
        force: bool = False,
    ) -> "Run":
        """Write an SAE to a directory as a run of one member; `wsae.interop.load` gives other tools' sae and about.

        Raises UserError where the directory holds something else (with `force` another SAE gives way).
        """
        from wsae.sae.model import an_sae

        path, sae = Path(path), an_sae(sae, "of_sae")
        free(path, "sae", force)
        with replacing(path, "sae"):
            sae.save(path, about)
        return cls(path)

    @cached_property
    def single(self) -> bool:
        """Whether this is the directory of one SAE alone."""
        manifest = read_json(self.path / MANIFEST) if self.finished else None
        return isinstance(manifest, dict) and manifest.get("kind") == "sae"

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r})"

    def has(self, part: str) -> bool:
        """Return whether an evaluation, interpretation or classes are there (see `PARTS`).

        What was measured of another SAE that lay here before is not.
        """
        there = (self.path / part / MANIFEST).is_file()
        return there and (
            not self.single or self._part(part).inputs.get("run") == self.manifest.digest()
        )

    def _part(self, part: str) -> Manifest:
        """Return the manifest of a part, names and sizes compared."""
        return read_manifest(self.path / part, part, verify=False)

    @property
    def finished(self) -> bool:
        """Whether training has finished: the manifest is written last."""
        return (self.path / MANIFEST).is_file()

    @cached_property
    def manifest(self) -> Manifest:
        """The manifest; the records are compared with their digests, the weights when they are loaded."""
        manifest = read_manifest(self.path, "sae" if self.single else "run", verify=False)
        for name in (CONFIG, GAMMA_FILE, METRICS_FILE, PROVENANCE):
            if name in manifest.files:
                check_file(self.path, name, manifest.files[name])
        formed(_RUN_INFO, manifest.info, self.path / MANIFEST)
        return manifest

    @property
    def members(self) -> dict[str, list[str]]:
        """Hook -> the names of a finished run's SAEs."""
        return {self._hook: [SINGLE]} if self.single else self.manifest.info.get("members", {})

    def place(self, hook: str, member: str) -> Path:
        """Return the directory of a finished run's SAE; raises UserError where it was altered, or lies outside."""
        if self.single:
            return self.path
        inside = f"{MEMBERS}/{hook}/{member}/{MANIFEST}"
        if inside not in self.manifest.files:
            raise UserError(
                f"{self.path / MANIFEST}: does not list {inside} (altered); make it again"
            )
        check_file(self.path, inside, self.manifest.files[inside])
        return contained(self.path, f"{MEMBERS}/{hook}/{member}")

    def weights(self, hook: str, member: str) -> Path | None:
        """Return the folder of a member's weights; None where the run keeps none."""
        if self.single:
            return self.path
        listed = self.manifest.info.get("members", {}).get(hook, [])
        return contained(self.path, f"{MEMBERS}/{hook}/{member}") if member in listed else None

    def digest(self) -> str:
        """Return what names the content of a run with the parts added to it."""
        if not self.has(EVALUATION_PART):
            raise self._not_yet(EVALUATION_PART)
        parts = {part: self._part(part).digest() for part in PARTS if self.has(part)}
        return digest({"run": self.manifest.digest(), **parts})

    @cached_property
    def record(self) -> Json:
        """config.json as it is written: `train`, `data`, `source`; of one SAE alone, what its files say."""
        if self.single:
            about = {"sae": self.config.to_dict()["sae"], "provenance": self.provenance.to_dict()}
            return about | {key: self._measured.get(key) for key in ("source", "data")}
        return _read(self.path / CONFIG, _RUN_CONFIG)

    @cached_property
    def config(self) -> TrainConfig | SingleConfig:
        """How the members were trained."""
        if self.single:
            shape = SAEConfig.load(self.path / CONFIG)
            return SingleConfig(sae=shape, tokens=self.provenance.tokens)
        with understood(self.path / CONFIG):
            return TrainConfig.parse(self.record["train"], where=str(self.path / CONFIG))

    @property
    def source(self) -> Json:
        """Where the activations came from, as config.json says it; empty where it says nothing.

        Of one SAE alone, where those came from on which it was evaluated.
        """
        return self.record.get("source") or {}

    @cached_property
    def provenance(self) -> Provenance:
        """What one SAE alone says of itself; empty for the members of a training run."""
        return Provenance.of(self.path)

    @property
    def _measured(self) -> Json:
        """On what one SAE alone was evaluated: hook and source."""
        return self._part(EVALUATION_PART).info if self.has(EVALUATION_PART) else {}

    @property
    def _hook(self) -> str:
        """The hook of one SAE alone: where it was evaluated, else where it says it was trained."""
        return str(self._measured.get("hook") or self.provenance.hook or "activations")

    @cached_property
    def gamma_record(self) -> Trained:
        """gamma.json as it is written; empty where there is none yet."""
        if self.single:
            other_tool = {"rule": "none"} if self.provenance.origin else {}
            return {self._hook: {SINGLE: self.provenance.gamma or other_tool}}
        path = self.path / GAMMA_FILE
        return _read(path, _GAMMA) if path.is_file() else {}

    @cached_property
    def gamma(self) -> dict[str, dict[str, "GammaForm | None"]]:
        """Hook -> member -> its loss weights: the rule, alpha, and the heaviest dimensions."""
        return _GAMMA.validate_python(self.gamma_record)

    @cached_property
    def saes(self) -> "dict[str, dict[str, SAE]]":
        """Hook -> member -> its SAE, every file compared with the manifest."""
        if self.single:
            from wsae.sae import SAE

            return {self._hook: {SINGLE: SAE.load(self.path)}}
        from wsae.train.run import load_run

        return load_run(self.path).saes

    @cached_property
    def _metrics(self) -> tuple[dict[str, dict[str, list[Json]]], bool]:
        """The rows, and whether the last one is cut off."""
        path = self.path / METRICS_FILE
        lines = list(read_lines(path)) if path.is_file() else []
        out: dict[str, dict[str, list[Json]]] = {}
        for number, line in enumerate(lines, 1):
            try:
                row = parse_json(line)
            except (ValueError, RecursionError) as error:
                if number < len(lines):
                    raise UserError(
                        f"{path}: line {number} is not a metrics row ({error!r})"
                    ) from error
                return out, True
            formed(_METRICS_ROW, row, f"{path}: line {number}")
            out.setdefault(row["hook"], {}).setdefault(row["member"], []).append(row)
        return out, False

    @property
    def metrics(self) -> dict[str, dict[str, list[Json]]]:
        """Hook -> member -> the rows of metrics.jsonl in order of step; empty where there are none yet."""
        return self._metrics[0]

    @property
    def metrics_cut(self) -> bool:
        """Whether the last row is cut off, as in a run that was stopped while writing it."""
        return self._metrics[1]

    @cached_property
    def evaluation_record(self) -> Json:
        """evaluation.json as it is written."""
        return _read(self._whole(EVALUATION_PART) / EVALUATION, _EVALUATION)

    @cached_property
    def evaluation(self) -> "EvaluationForm":
        """The evaluation: `evaluation.hooks[hook].members[name].metrics["fvu"].value`."""
        return _EVALUATION.validate_python(self.evaluation_record)

    @cached_property
    def arrays(self) -> "dict[str, Tensor]":
        """The evaluation's arrays by "hook|member|name"; empty where it has none."""
        return self.tensors(EVALUATION_PART)

    def tensors(self, part: str) -> "dict[str, Tensor]":
        """Return the arrays of a part, by name; empty where it has none."""
        from wsae.core.tensors import load_tensors

        place, listed = self._whole(part), ARRAYS in self._part(part).files
        return load_tensors(place / ARRAYS) if listed else {}

    def numbers(self, part: str) -> "dict[str, np.ndarray]":
        """Return the arrays of a part by "hook|member|name" in fp64.

        Raises UserError when one that is shown is not a row of its length: densities are shares, no number is beyond
        `LARGEST`, a match is a whole number.
        """
        out: dict[str, np.ndarray] = {}
        lengths: dict[str, int] = {}
        for key, tensor in self.tensors(part).items():
            if tensor.is_complex():
                raise UserError(
                    f"{self.path / part / ARRAYS}: {key!r} holds complex numbers; make it again"
                )
            array = out[key] = tensor.double().numpy()
            hook_member, _, name = key.rpartition("|")
            name = name.partition("[")[0]
            if name not in BY_LATENT + BY_DIMENSION:
                continue
            unit = hook_member if name in BY_LATENT else hook_member.partition("|")[0]
            wanted = lengths.setdefault(f"{unit}|{name in BY_LATENT}", array.size)
            if array.shape != (wanted,) or not wanted or not _plausible(name, array):
                raise UserError(
                    f"{self.path / part / ARRAYS}: not of the form that this wsae writes (array {key!r}, "
                    f"shape {[*array.shape]}, has another length or other values); make it again"
                )
        return out

    @cached_property
    def context_record(self) -> dict[str, dict[str, list[Json]]]:
        """contexts.json of the evaluation as it is written; empty where it has none."""
        place = self._whole(EVALUATION_PART)
        listed = CONTEXTS_FILE in self._part(EVALUATION_PART).files
        return _read(place / CONTEXTS_FILE, _CONTEXTS) if listed else {}

    @cached_property
    def contexts(self) -> "dict[str, dict[str, list[LatentForm]]]":
        """Hook -> member -> the sampled latents, with the windows of the data that move each most."""
        return _CONTEXTS.validate_python(self.context_record)

    @cached_property
    def thumbnails(self) -> dict[str, str]:
        """Image number -> PNG in base64, of the images among the contexts."""
        if not self.has(EVALUATION_PART):
            return {}
        listed = THUMBNAILS_FILE in self._part(EVALUATION_PART).files
        place = self.path / EVALUATION_PART / THUMBNAILS_FILE
        return _read(place, _THUMBNAILS) if listed else {}

    @cached_property
    def interpretation_record(self) -> Json:
        """interpretation.json as it is written."""
        return _read(self._whole(INTERPRETATION_PART) / INTERPRETATION, _INTERPRETATION)

    @cached_property
    def interpretation(self) -> "InterpretationForm":
        """The scores of interpretability: `interpretation.hooks[hook].members[name].summary["detection"].value`."""
        return _INTERPRETATION.validate_python(self.interpretation_record)

    @cached_property
    def interpreted_contexts(self) -> dict[str, dict[str, list[Json]]]:
        """contexts.json of the interpretation: the scored latents, with explanation and scores."""
        return _read(self._whole(INTERPRETATION_PART) / CONTEXTS_FILE, _CONTEXTS)

    @cached_property
    def class_record(self) -> Json:
        """classes.json as it is written: latents against class labels."""
        return _read(self._whole(CLASSES_PART) / CLASSES, _CLASSES)

    @cached_property
    def probing_record(self) -> Json:
        """probing.json: what a few latents tell apart, labelled "tokens" by rule and labelled "documents"."""
        return _read(self._whole(PROBING_PART) / PROBING, _PROBING)

    @property
    def names(self) -> dict[str, dict[str, dict[str, Json]]]:
        """names.json as it is now: hook -> member -> latent -> {"name": ..., "star": ...}, as users typed them."""
        path = self.path / NAMES_FILE
        return _read(path, _NAMES) if path.is_file() else {}

    def name_latent(self, hook: str, member: str, latent: int, named: NamedLatent) -> None:
        """Keep a latent's name and star; neither: forget it. Another process waits for its turn.

        Raises UserError where names.json is not of its form or cannot be written.
        """
        path = self.path / NAMES_FILE
        with locked_file(path.with_name(f".{NAMES_FILE}.lock"), wait=True):
            names = self.names
            latents = names.setdefault(hook, {}).setdefault(member, {})
            latents.pop(str(latent), None)
            if named.name or named.star:
                latents[str(latent)] = {"name": named.name, "star": named.star}
            write_json(path, names)

    def _whole(self, part: str) -> Path:
        """Return the folder of a part whose files are all as they were written."""
        if part not in self._checked:
            if not (self.has(part) if self.single else (self.path / part).is_dir()):
                raise self._not_yet(part)
            read_manifest(self.path / part, part)
            self._checked.add(part)
        return self.path / part

    @cached_property
    def _checked(self) -> set[str]:
        return set()

    def _not_yet(self, part: str) -> UserError:
        command, done = _MADE_BY[part]
        data = " --source DATA" if self.single else ""
        return UserError(f"{self.path}: has not been {done}; run: wsae {command} {self.path}{data}")


_MADE_BY = {
    EVALUATION_PART: ("evaluate", "evaluated"),
    INTERPRETATION_PART: ("interpret", "interpreted"),
    CLASSES_PART: ("evaluate --labels FILE", "scored against classes"),
    PROBING_PART: ("probe", "probed"),
}
"""Part -> the command that makes it, and the word for what it does."""


def _read(path: Path, form: TypeAdapter) -> Any:
    """Read a JSON file; raises UserError when it is not of the form."""
    return formed(form, read_json(path), path)
