"""The form of what a run's files hold: everything that pages show of them is checked here, while it is read.

Whoever sends a run can seal whatever JSON they like. Keys that are not named here pass, and no page shows them but as
they are; a named one is of its form, or the file is refused in one line.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Annotated, Any

import numpy as np
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

from wsae.core.errors import UserError

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


class ShownForm(SaidForm):
    """What an index keeps of a latent beside its numbers."""

    contexts: list[ContextForm] = []


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


class ScoredHook(Form):
    """What was scored at a hook."""

    members: dict[Text, ScoredMember] = {}
    controls: dict[Text, ScoredMember] = {}
    comparisons: list[ComparisonForm] = []


class InterpretationForm(Form):
    """interpretation.json."""

    hooks: dict[Text, ScoredHook] = {}
    glossary: Glossary = {}
    judges: dict[Text, Any] = {}


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


Picture = Annotated[str, Field(pattern=r"^[A-Za-z0-9+/]+={0,2}$")]
RUN_CONFIG = TypeAdapter(RunConfigForm)
RUN_INFO = TypeAdapter(RunInfoForm)
METRICS_ROW = TypeAdapter(MetricsRow)
GAMMA = TypeAdapter(dict[Text, dict[Text, GammaForm | None]])
EVALUATION = TypeAdapter(EvaluationForm)
CONTEXTS = TypeAdapter(dict[Text, dict[Text, list[LatentForm]]])
INTERPRETATION = TypeAdapter(InterpretationForm)
CLASSES = TypeAdapter(ClassesForm)
THUMBNAILS = TypeAdapter(dict[Annotated[str, Field(pattern=r"^[0-9]{1,15}$")], Picture])
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


BY_LATENT = ("density", "variance", "match_index", "match_cosine", "decoder_max_cosine")
BY_DIMENSION = ("ev_per_dim", "gamma", "input_variance")
"""Arrays of the evaluation that are shown: those of one member, or hook, are equally long."""


def formed_arrays(
    arrays: Mapping[str, np.ndarray], where: PathLike[str] | str
) -> dict[str, np.ndarray]:
    """Return arrays by "hook|member|name"; raises UserError when one that is shown is not a row of its length.

    Densities are shares, no number is beyond `LARGEST`, a match is a whole number.
    """
    lengths: dict[str, int] = {}
    for key, array in arrays.items():
        hook_member, _, name = key.rpartition("|")
        if name not in BY_LATENT + BY_DIMENSION:
            continue
        unit = hook_member if name in BY_LATENT else hook_member.partition("|")[0]
        wanted = lengths.setdefault(f"{unit}|{name in BY_LATENT}", array.size)
        if array.ndim != 1 or not array.size or array.size != wanted or not _plausible(name, array):
            shape = list(array.shape)
            raise UserError(
                f"{where}: not of the form that this wsae writes (array {key!r}, shape {shape}, "
                "has another length or other values); make it again"
            )
    return dict(arrays)


def _plausible(name: str, array: np.ndarray) -> bool:
    if name == "density":
        return bool(((array >= 0) & (array <= 1)).all())
    if name == "match_index":
        return bool(((array >= -1) & (array < 1 << 31) & (array == np.floor(array))).all())
    if name in ("gamma", "input_variance") and not np.isfinite(array).all():
        return False
    return not bool((np.abs(array[np.isfinite(array)]) > LARGEST).any())
