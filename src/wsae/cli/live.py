"""Flags that name a model's text and hook points, and the source of activations they lead to."""

import itertools
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import tyro

from wsae.acts.config import (
    HarvestConfig,
    ImageHarvestConfig,
    ImagesConfig,
    LiveConfig,
    TextConfig,
    located,
)
from wsae.acts.hooknames import among, pairs, sides
from wsae.cli.common import (
    MaybeCount,
    MaybeName,
    MaybeNumber,
    MaybePlace,
    OneOrSeveral,
    Switch,
    config_flags,
    config_values,
    flag_name,
)
from wsae.core.artifact import TINY_MODEL, kind_of
from wsae.core.config import FLAGS, Config
from wsae.core.errors import UserError, understood
from wsae.run import CONFIG, Run
from wsae.sae.config import (
    KINDS,
    GammaConfig,
    Kind,
    PreconditionConfig,
    Provenance,
    Rule,
    SAEConfig,
    SingleConfig,
)
from wsae.train.config import MemberConfig, TrainConfig, family

if TYPE_CHECKING:
    import numpy as np

    from wsae.acts.images.harvest import Gallery
    from wsae.acts.language import LanguageModel
    from wsae.acts.source import ActivationSource, JoinedSource

# Flags that say which SAEs to train and for how long.

TOKENS = 250_000
"""Training tokens where neither --tokens nor the data say how many."""


MEMBER_GRID = ("d_sae", "expansion", "lr", "l1", "l0", "target_l0")
"""Settings of a member whose flags take several values."""
OF_KINDS: dict[str, tuple[Kind, ...]] = dict.fromkeys(
    ("l0", "l0_penalty", "target_l0", "pre_act"), ("jumprelu",)
)
"""Settings of a member that only some kinds have."""
OF_MEMBER = tuple(dict.fromkeys((*MEMBER_GRID, *OF_KINDS)))
OF_ACTIVATION = {
    name: field.default
    for made in KINDS.values()
    for name, field in made.model_fields.items()
    if name != "kind"
}
"""Settings of the activations, of all kinds together, with their defaults."""
SWEPT = (
    *MEMBER_GRID,
    *(name for name, value in OF_ACTIVATION.items() if type(value) in (int, float)),
)
"""Settings whose flags take several values."""


class PlanFlags(
    config_flags(
        MemberConfig,
        GammaConfig,
        *KINDS.values(),
        PreconditionConfig,
        TrainConfig,
        omit=("label", "rule", "kind", "vector", "tokens", "alpha", "power", "members")
        + ("init_from", "hook_out", "crosscoder"),
        several=SWEPT,
    )
):
    """The SAEs: their shape, their loss weights and their training. Flags with several values make a grid of SAEs."""

    k: Annotated[
        tuple[int, ...], OneOrSeveral, tyro.conf.arg(metavar="N ...", help_behavior_hint="")
    ] = ()
    """Active latents per sample of the Top-k kinds. Several: an SAE for each. Default: 32."""
    activation: Annotated[tuple[Kind, ...], OneOrSeveral, tyro.conf.arg(help_behavior_hint="")] = ()
    """Which latents may be active. Several: SAEs of each kind, with those of the other flags that it has. Default:
    topk."""
    gamma: Annotated[tuple[Rule, ...], OneOrSeveral, tyro.conf.arg(help_behavior_hint="")] = ()
    """What the loss weights follow; "vector" reads --gamma-file. Several: an SAE for each. Default: none, the plain
    SAE, or with --alpha or --robust variance, the paper's."""
    alpha: Annotated[
        tuple[float, ...], OneOrSeveral, tyro.conf.arg(metavar="A ...", help_behavior_hint="")
    ] = ()
    """Exponents of the weights; each gives one SAE on the same batches. Default: 1."""
    gamma_file: MaybePlace = None
    """A .npy vector of width d_in for --gamma vector."""
    precondition: Literal["none", "standardise", "whiten", "residual"] = "none"
    """The map of the activations in which the SAEs are trained, folded into them when they are saved: standardise
    divides each dimension by its standard deviation, whiten uses the whole covariance, residual that of what a plain
    SAE, trained on a quarter of the rows before, leaves."""
    power: Annotated[tuple[float, ...], OneOrSeveral, tyro.conf.arg(metavar="P ...")] = (1.0,)
    """How far --precondition goes, from 0 (not at all) to 1 (variances all 1); each gives one SAE per alpha."""
    skip: Switch = False
    """With --hook-out: add a linear map of the input to each transcoder."""
    twin: bool = True
    """Train the plain SAE beside them, for comparison."""
    tokens: MaybeCount = None
    """Training rows; default: once through the data, or 250,000 from a live model."""
    members: Annotated[tuple[MemberConfig, ...], tyro.conf.Fixed, tyro.conf.Suppress] = ()
    """In a file alone: the SAEs one by one, in place of the flags that make them; empty means that the flags do."""

    def config(self, rows: int | None, seed: int, like: SAEConfig | None = None) -> TrainConfig:
        """Return the run these flags describe over `rows` rows of data; raises UserError in one line.

        What is not given of the SAEs' shape is that of `like`, where there is one.
        """
        if self.members:
            ours = "the SAEs of --config are taken as they are; leave the flag out, or give all by flags"
            refuse(self, ours, TrainConfig.model_fields)
        shaped = self if like is None else self._shaped(like)
        alike = config_values(shaped, MemberConfig) | {"skip": shaped.skip or None}
        made = [
            MemberConfig.parse(alike | shape | {"gamma": g, "precondition": p}, where=FLAGS)
            for shape in shaped._shapes()
            for g in self._gammas()
            for p in self._preconditioners()
        ]
        members = self.members or family(made, self.twin)
        tokens = self.tokens if self.tokens is not None else (rows or TOKENS)
        own = {"members": members, "tokens": tokens, "seed": seed}
        return TrainConfig.parse(config_values(self, TrainConfig) | own, where=FLAGS)

    def _gammas(self) -> list[dict[str, object]]:
        weighted = self.alpha or self.robust != "none" or self.gamma_file is not None
        rules: tuple[Rule, ...] = self.gamma or ("variance" if weighted else "none",)
        if rules == ("none",) and self.robust != "none":
            raise UserError(
                f"--robust {self.robust}: the plain loss has no proxy to tame; for the plain loss without outlier "
                "dimensions use --gamma variance --alpha 0 --robust drop"
            )
        return [gamma for rule in rules for gamma in self._of_rule(rule)]

    def _of_rule(self, rule: Rule) -> list[dict[str, object]]:
        """Return a rule with each exponent."""
        if rule == "none":
            return [{}]
        vector = None
        if self.gamma_file is not None and (rule == "vector" or "vector" not in self.gamma):
            needed = "one number per input dimension"
            vector = read_vector("--gamma-file", self.gamma_file, "fiu", needed).tolist()
        base = config_values(self, GammaConfig) | {"rule": rule, "vector": vector}
        return [{**base, "alpha": alpha} for alpha in self.alpha or (1.0,)]

    def _preconditioners(self) -> list[dict[str, object] | None]:
        base = config_values(self, PreconditionConfig)
        if self.precondition == "none":
            for name in ("power", "shrinkage"):
                value = getattr(self, name)
                if value != type(self).model_fields[name].default:
                    raise UserError(
                        f"--{name} {_shown(value)}: is of a preconditioner; add --precondition, whiten say"
                    )
            return [None]
        if not self.power:
            raise UserError("--power: give at least one number")
        return [{**base, "kind": self.precondition, "power": power} for power in self.power]

    def _shaped(self, like: SAEConfig) -> "PlanFlags":
        """Return the flags with the shape of an SAE where they do not say another."""
        kind, tied = like.activation.kind, self.tied or like.tied
        own = like.activation.to_dict() if self.activation in ((), (kind,)) else {}
        known = {**own, "activation": (kind,)}
        known |= {} if self.expansion else {"d_sae": like.d_sae}
        left = {
            name: (value,) if name in SWEPT else value
            for name, value in known.items()
            if name != "kind" and getattr(self, name) == type(self).model_fields[name].default
        }
        return self.model_copy(update={**left, "tied": tied, "skip": bool(self.skip or like.skip)})

    def _shapes(self) -> list[dict[str, object]]:
        """Return what each SAE without weights is: every kind, with every combination of what is asked of it."""
        kinds: tuple[Kind, ...] = self.activation or ("topk",)
        for name in (*OF_ACTIVATION, *OF_KINDS):
            able = [kind for kind in KINDS if self._has(kind, name)]
            asked = getattr(self, name)
            if asked != type(self).model_fields[name].default and not {*kinds} & {*able}:
                none = f"{' and '.join(kinds)} {'has' if len(kinds) == 1 else 'have'} no {name}"
                raise UserError(
                    f"--{flag_name(name)} {_shown(asked)}: {none}; leave it out, or use --activation {able[0]}"
                )
        return [shape for kind in kinds for shape in self._of_kind(kind)]

    def _of_kind(self, kind: Kind) -> list[dict[str, object]]:
        activations = self._grid([name for name in OF_ACTIVATION if self._has(kind, name)])
        settings = self._grid([name for name in OF_MEMBER if self._has(kind, name)])
        return [
            {name: MemberConfig.model_fields[name].default for name in OF_MEMBER}
            | {"activation": {"kind": kind, **activation}, **own}
            for activation in activations
            for own in settings
        ]

    def _grid(self, names: Collection[str]) -> list[dict[str, object]]:
        """Return every combination of the values given for these fields; one not given is not in it."""
        asked: dict[str, tuple[object, ...]] = {}
        for name in names:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                asked[name] = value if name in SWEPT else (value,)
        return [
            dict(zip(asked, values, strict=True)) for values in itertools.product(*asked.values())
        ]

    def _has(self, kind: str, name: str) -> bool:
        """Return whether a kind of SAE has a setting."""
        if name in OF_KINDS:
            for_all = self.l0_penalty == "tanh" and name in ("l0", "l0_penalty")
            return for_all or kind in OF_KINDS[name]
        return name in KINDS[kind].model_fields or name in MEMBER_GRID


def _shown(value: object) -> str:
    """Return a flag's value or values as they were given."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def read_vector(flag: str, path: Path, kinds: str, needed: str) -> "np.ndarray":
    """Return the one-dimensional .npy array at `path` with a dtype among `kinds`; raises UserError else."""
    from wsae.core.tensors import mapped_npy

    values = mapped_npy(path, f"{flag} {path}")
    if values.ndim != 1 or values.dtype.kind not in kinds:
        raise UserError(
            f"{flag} {path}: shape {values.shape} of {values.dtype}; {needed} is needed"
        )
    return values.copy()


class RoleFlags(Config):
    """Whose words of a conversation count."""

    roles: Annotated[tuple[str, ...], tyro.conf.arg(metavar="ROLE ...", help_behavior_hint="")] = ()
    """Keep what these say in conversations alone (assistant); the model reads all of it. Default: everybody's words."""


class TextFlags(config_flags(TextConfig, omit=("path",)), RoleFlags):
    """A text as people have it."""

    text: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """For one SAE alone: a text for its model, as in `wsae harvest`, or "builtin"."""

    def given(self) -> "GivenText":
        """Return the text, if any; raises UserError for flags that go with one where there is none."""
        if self.text is None:
            refuse(self, "goes with --text")
            return NO_TEXT
        data = config_values(self, TextConfig) | {"path": self.text}
        return GivenText(TextConfig.parse(data, where=FLAGS), roles=self.roles or None)


class LiveFlags(
    config_flags(
        HarvestConfig,
        omit=("model", "tokens", "dtype", "store_dtype", "shard_tokens", "roles"),
    ),
    TextFlags,
):
    """A model's text, and the rows to keep."""

    text: Annotated[str | None, tyro.conf.arg(metavar="FILE", help_behavior_hint="")] = None
    """Text for the model: .jsonl, .json, .csv, .tsv, .txt, .parquet or .arrow, also packed (.gz, .zst, .xz, .bz2), a
    directory of these or of save_to_disk, a hub dataset's name, or "builtin"."""
    hook: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="PATTERN ...", help_behavior_hint="")
    ] = ()
    """Modules to read: "layers.9", "layers.*", "layers.9.mlp"; several are read in one pass. It names an array's."""
    heldout_fraction: MaybeNumber = None
    """Share of the documents or images kept for evaluation; default: 0.1 of documents, 0.2 of images."""

    def config(self, model: str, /, **rest: object) -> HarvestConfig:
        """Return the harvest these flags describe; raises UserError in one line."""
        if not self.hook:
            raise UserError('no --hook: name the modules to read, for example --hook "layers.9"')
        if self.text is None:
            raise UserError("no --text: give a file of text, or --text builtin for the shipped one")
        data = config_values(self, HarvestConfig) | {
            "model": located(model),
            "text": config_values(self, TextConfig) | {"path": located(self.text)},
            "sink_norm_ratio": self.sink_norm_ratio or None,
            "roles": self.roles or None,
        }
        return HarvestConfig.parse(_given(data, "heldout_fraction") | rest, where=FLAGS)


class MixingFlags(config_flags(LiveConfig)):
    """How a live model's rows are mixed on their way to training."""


class ImageFlags(
    config_flags(
        ImageHarvestConfig,
        ImagesConfig,
        omit=("path", "split", "subset", "model", "hooks", "heldout_fraction")
        + ("dtype", "store_dtype", "shard_rows"),
    )
):
    """Images for a vision model, and the rows to keep."""

    images: Annotated[str | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="")] = None
    """Images for the model, in place of --text: a folder of class folders, .npz, a folder of IDX files, .parquet, a hub
    dataset's name, or "digits"."""

    def config(self, model: str, live: LiveFlags, **rest: object) -> ImageHarvestConfig:
        """Return the harvest these flags describe; raises UserError in one line, also for flags of text."""
        if live.text is not None:
            raise UserError(f"--images {self.images} and --text {live.text}: give one of them")
        shared = ("hook", "split", "subset", "heldout_fraction")
        refuse(live, "is for --text, not for --images", shared)
        if self.size is None:
            others = set(ImageFlags.model_fields) - {"resize", "resample"}
            refuse(self, "goes with --size; without it the model's own way is taken", others)
        data = config_values(self, ImageHarvestConfig) | config_values(live, ImageHarvestConfig)
        images = config_values(self, ImagesConfig) | config_values(live, ImagesConfig)
        data |= {"model": model, "images": images | {"path": self.images}}
        return ImageHarvestConfig.parse(
            _given(data, "hooks", "heldout_fraction") | rest, where=FLAGS
        )


def refuse(flags: Config, why: str, but: Collection[str] = ()) -> None:
    """Raise UserError where one of these flags but some is given."""
    for name, field in type(flags).model_fields.items():
        if name not in but and getattr(flags, name) != field.default:
            raise UserError(f"--{flag_name(name)}: {why}")


def _given(data: dict[str, object], *names: str) -> dict[str, object]:
    """Return the values without those of these names that are not given, so that the config's defaults stand."""
    absent = (None, ())
    return {name: value for name, value in data.items() if name not in names or value not in absent}


def is_data(source: str) -> bool:
    """Return whether `source` is a store or an array file that exists, rather than a model."""
    path = Path(source)
    if path.is_dir():
        of_model = ("config.json", "adapter_config.json", "model_index.json", "modules.json")
        known = any((path / name).exists() for name in of_model) or any(path.glob("*.gguf"))
        return not known or kind_of(path) not in (None, TINY_MODEL)
    return path.exists() and path.suffix != ".gguf"


def open_data(
    source: str, live: LiveFlags, mixing: MixingFlags, seed: int, device: str, **rest: object
) -> "ActivationSource":
    """Return the activations of a store or an array, or of a live model on --text."""
    if is_data(source):
        ours = f"{source} holds activations already; leave the flag out"
        refuse(live, ours, ("hook",))
        refuse(mixing, ours)
        return _opened(source, live.hook)
    if live.text is None:
        raise UserError(
            f"{source}: no such store or array; if it is a model, add --text FILE --hook PATTERN"
        )
    cfg = live.config(source, seed=seed, device=device, **rest)
    from wsae.acts.live import LiveSource

    return LiveSource(cfg, LiveConfig.parse(config_values(mixing, LiveConfig), where=FLAGS))


class SidesData(NamedTuple):
    """Activations of transcoders: a source with what they read and what they are to give, and the hooks of each."""

    source: "ActivationSource"
    hook_out: dict[str, str]


def open_sides(
    source: str,
    hook_out: tuple[str, ...],
    live: LiveFlags,
    mixing: MixingFlags,
    seed: int,
    device: str,
    **rest: object,
) -> SidesData:
    """Return the activations of both sides of modules: of a store or a live model, or of two stores or arrays."""
    read = live.hook
    if not is_data(source):
        asked = live.model_copy(update={"hook": (*read, *hook_out)})
        both = open_data(source, asked, mixing, seed, device, **rest)
        return SidesData(both, pairs(both.hooks, read, hook_out))
    both = open_data(source, live.model_copy(update={"hook": ()}), mixing, seed, device)
    elsewhere = Path(hook_out[0])
    from wsae.acts.source import READERS, AlignedSource

    if len(hook_out) == 1 and elsewhere.exists():
        other = _opened(str(elsewhere), ())
        one, given = _named_alone(source, both, read), _named_alone(str(elsewhere), other, ())
        if next(iter(one.hooks)) in given.hooks and one.digest() == given.digest():
            raise UserError(f"--hook-out {elsewhere}: is what is read; name another for the output")
        return SidesData(
            AlignedSource(one, given), {next(iter(one.hooks)): next(iter(given.hooks))}
        )
    if len(hook_out) == 1 and elsewhere.suffix in READERS:
        raise UserError(f"--hook-out {elsewhere}: no such file")
    read = read or tuple(hook for hook in both.hooks if among(hook, hook_out) is None)
    found = pairs(both.hooks, read, hook_out)
    named = dict.fromkeys([*found, *found.values()])
    return SidesData(
        both if len(named) == len(both.hooks) else _opened(source, tuple(named)), found
    )


def open_joined(
    source: str,
    others: tuple[str, ...],
    live: LiveFlags,
    mixing: MixingFlags,
    seed: int,
    device: str,
    **rest: object,
) -> "JoinedSource":
    """Return what a crosscoder reads: hooks of a store or a live model, or the hooks of several stores or arrays."""
    from wsae.acts.source import READERS, side_by_side

    data = [name for name in others if is_data(source) and is_data(name)]
    wrong = [name for name in others if name not in data]
    if wrong and (data or Path(wrong[0]).suffix in READERS):
        raise UserError(
            f"--crosscoder {wrong[0]}: is no store or array; name hooks of {source}, or other data"
        )
    if data:
        first = open_data(source, live, mixing, seed, device)
        return side_by_side(first, *(_opened(name, live.hook) for name in data))
    if live.hook:
        raise UserError(f"--hook {' '.join(live.hook)}: --crosscoder names the hooks; leave it out")
    asked = live.model_copy(update={"hook": others})
    found = open_data(source, asked, mixing, seed, device, **rest)
    if len({*others}) < len(others) or 1 < len(found.hooks) < len(others):
        raise UserError(f"--crosscoder {' '.join(others)}: names a hook twice")
    return side_by_side(found)


def _named_alone(
    place: str, data: "ActivationSource", names: tuple[str, ...]
) -> "ActivationSource":
    """Return the data at one hook, that of `names` where there are several; raises UserError where it is not said."""
    if names or len(data.hooks) == 1:
        return _opened(place, names or tuple(data.hooks))
    raise UserError(f"{place}: has hooks {', '.join(data.hooks)}; harvest one of them alone")


def _opened(source: str, hooks: tuple[str, ...]) -> "ActivationSource":
    """Return a store's hooks (none given: all), or an array, which has none of its own and takes a single name."""
    from wsae.acts.source import ArraySource, is_folder_of_arrays, open_source

    path = Path(source)
    array = is_folder_of_arrays(path) if path.is_dir() else path.exists()
    if array and len(hooks) == 1:
        return ArraySource(path, name=hooks[0])
    return open_source(path, hooks=hooks or None)


class HookFlags(Config):
    """Where one SAE's activations are read."""

    hook: MaybeName = None
    """The module whose activations the SAE takes, in Hugging Face's or TransformerLens' words; default: the one that
    its files name."""
    hook_out: MaybeName = None
    """Of a transcoder: the module whose activations it is to give; default: the one that its files name."""
    seq_len: MaybeCount = None
    """Tokens per sequence of --text; default: as in the SAE's training, at most 256."""


class ReadingFlags(HookFlags, TextFlags):
    """A text for the model of one SAE alone."""

    model: MaybeName = None
    """The model that reads --text; default: the one that the SAE's files name."""

    def asked(self) -> "GivenText":
        """Return the text and how it is read; raises UserError as `given` does."""
        own = {"model": self.model, "hook": self.hook, "seq_len": self.seq_len}
        return self.given()._replace(**own, hook_out=self.hook_out)


class GivenText(NamedTuple):
    """A text, or none, for the model of one SAE alone, and what is said in place of the SAE's files."""

    text: TextConfig | None = None
    model: str | None = None
    hook: str | None = None
    seq_len: int | None = None
    model_flag: str = "model"
    hook_out: str | None = None
    roles: tuple[str, ...] | None = None


NO_TEXT = GivenText()


def data_of(
    opened: Run, device: str, source: str | None = None, asked: GivenText = NO_TEXT, seed: int = 0
) -> "ActivationSource":
    """Return a run's data: those it was trained or measured on, `source`, or for one SAE alone a text for its model.

    Raises UserError where they are not known, not those of training any more, or of another width than the SAE.
    """
    if asked.text is None:
        data = reopen(opened.path, device, source)
    else:
        name = asked.text.path
        if source is not None:
            raise UserError(f"--source {source} and --text {name}: give one of them")
        if not opened.single:
            raise UserError(
                f"--text {name}: is for one SAE alone, {opened.path}/members/HOOK/NAME; a run is measured on its own "
                "data, or on --source"
            )
        data = on_text(opened, asked, seed=seed, device=device)
    return _fitting(opened, data, source) if opened.single else data


def _fitting(opened: Run, data: "ActivationSource", source: str | None) -> "ActivationSource":
    """Return the data of one SAE alone; raises UserError where their width is not the SAE's."""
    assert isinstance(opened.config, SingleConfig)
    about, sae = _about(opened), opened.config.sae
    if sae.transcoder:
        read, given = sides(data.hooks, about.hook, about.hook_out)
    else:
        (read,) = (given,) = data.hooks
    for hook, does, width in ((read, "takes", sae.d_in), (given, "gives", sae.width_out)):
        found = data.hooks[hook]
        if found != width:
            trained = f" (trained at {about.hook})" if about.hook else ""
            raise UserError(
                f"{opened.path}: {does} activations of width {width}{trained}, and {source or 'the data'} has {found} "
                f"at {hook}; give activations of the SAE's model and hook (--model, --hook)"
            )
    return data


def _about(opened: Run) -> Provenance:
    from wsae.interop.saes import about_sae

    return about_sae(opened.path)


def reopen(run: Path, device: str, elsewhere: str | None = None) -> "ActivationSource":
    """Return the source that a run was trained on, as its config.json describes it, or `elsewhere` in its place."""
    from wsae.acts.source import as_described

    opened = Run(run)
    if opened.single and (elsewhere is not None or not opened.source):
        return of_single(opened, elsewhere)
    with understood(opened.manifest and run / CONFIG):
        data = _recorded(run, opened.source, device, elsewhere)
        own = elsewhere is None and not opened.single
        if own and not as_described(data, opened.source, opened.record.get("data")):
            raise UserError(
                f"{run}: its array, store, text or model is not as it was in training (files differ); put it back, or "
                "name other data with --source"
            )
        return data


def _recorded(
    run: Path, record: dict[str, Any], device: str, elsewhere: str | None = None
) -> "ActivationSource":
    """Return the source that a run's config.json describes; raises UserError where the data are not there."""
    from wsae.acts.source import AlignedSource, JoinedSource

    kind, path, hooks = record.get("kind"), record.get("path"), tuple(record.get("hooks", ()))
    if not all(isinstance(hook, str) for hook in hooks):
        raise UserError(f"{run}: the hooks in its config.json are not all names (altered)")
    if kind == "joined":
        return JoinedSource(_recorded(run, record["of"], device, elsewhere))
    apart = record.get("apart", ())
    if elsewhere is not None and not (kind == "aligned" and (apart or "+" in elsewhere)):
        return _opened(elsewhere, hooks)
    if kind == "live":
        from wsae.acts.language import language_for
        from wsae.acts.live import LiveSource

        cfg = HarvestConfig.parse(record["harvest"], where=str(run))
        mixing = LiveConfig.parse(record.get("mixing", {}), where=str(run))
        return LiveSource(cfg, mixing, language_for(cfg, device))
    if kind == "aligned":
        sources = record["sources"]
        places = _places(elsewhere, len(sources)) if elsewhere else [None] * len(sources)
        both = zip(sources, places, strict=True)
        parts = (_recorded(run, part, device, place) for part, place in both)
        return AlignedSource(*parts, apart=apart)
    if path is None:
        raise UserError(f"{run}: was trained on an array in memory; name the data with --source")
    if not Path(path).exists():
        raise UserError(f"{path}: the run's data are no longer there; name them with --source")
    return _opened(path, hooks)


def _places(source: str, wanted: int) -> list[str]:
    """Return the data that A+B names, of several sources one by one; raises UserError for another number of them."""
    places = source.split("+")
    if len(places) != wanted:
        raise UserError(
            f"--source {source}: {len(places)} where {wanted} are read side by side; name them in order, A+B"
        )
    return places


def of_single(opened: Run, source: str | None) -> "ActivationSource":
    """Return a store or an array at one SAE's hook; raises UserError without one, or where it has other hooks alone.

    Of a transcoder it is a store with both sides of its module.
    """
    from wsae.acts.source import open_source, side_by_side

    path, about = opened.path, _about(opened)
    if source is None:
        open_ends = [
            f" --{name} {name.upper()}" for name in ("model", "hook") if not getattr(about, name)
        ]
        raise UserError(
            f"{path}: a single SAE knows no data; name a store or an array with --source, or a text for its model: "
            f"wsae evaluate {path} --text FILE{''.join(open_ends)}"
        )
    assert isinstance(opened.config, SingleConfig)
    if (parts := opened.config.sae.sources) is not None and "+" in source:
        names = (part.name.partition("@")[0] for part in parts)
        own = zip(_places(source, len(parts)), names, strict=True)
        return side_by_side(*(_at(open_source(place), place, name) for place, name in own))
    data, hook = open_source(source), about.hook
    if parts is not None and len(data.hooks) > 1:
        return side_by_side(open_source(source, hooks=tuple(part.name for part in parts)))
    if opened.config.sae.transcoder:
        both = sides(data.hooks, hook, about.hook_out)
        return open_source(source, hooks=(both.read, both.given))
    return _at(data, source, hook)


def _at(data: "ActivationSource", place: str, hook: str | None) -> "ActivationSource":
    """Return data at one hook, the only one or that of this name; raises UserError where it is not there."""
    if len(data.hooks) == 1:
        return data
    mine = among(hook, data.hooks) if hook else None
    if mine is None:
        raise UserError(
            f"{place}: has hooks {', '.join(data.hooks)}, and the SAE is of {hook or 'a hook it does not name'}; "
            "harvest that hook alone, or give an array"
        )
    return _opened(place, (mine,))


def on_text(opened: Run, asked: GivenText, **rest: object) -> "ActivationSource":
    """Return what an SAE's model gives at its hook on a text; raises UserError where model or hook is not known."""
    assert isinstance(opened.config, SingleConfig)
    about, transcoder = _about(opened), opened.config.sae.transcoder
    text = asked.text
    assert text is not None, "data_of asks for a text"
    from wsae.interop.saes import model_behind

    model, hook = asked.model or model_behind(opened.path), asked.hook or about.hook
    names = tuple(part.name for part in opened.config.sae.sources or ())
    if any("@" in name for name in names):
        raise UserError(
            f"--text {text.path}: the SAE reads two models; give their data, --source A+B"
        )
    out = (asked.hook_out or about.hook_out) if transcoder else hook
    known = [("model", asked.model_flag, model), ("hook", "hook", hook)]
    for name, flag, value in (*known, ("output", "hook-out", out)):
        if not value:
            raise UserError(
                f"--text {text.path}: the SAE's files do not say its {name}; add --{flag} {name.upper()}"
            )
    most = HarvestConfig.model_fields["seq_len"].default
    seq_len = asked.seq_len or min(about.context or most, most)
    hooks = names or tuple(dict.fromkeys((hook, out)))
    data = {"model": model, "text": text.to_dict(), "roles": asked.roles, "seq_len": seq_len}
    cfg = HarvestConfig.parse(data | {"hooks": hooks} | rest, where=FLAGS)
    from wsae.acts.live import LiveSource
    from wsae.acts.source import JoinedSource

    source = LiveSource(cfg.located())
    if len(source.hooks) > len(hooks):
        first = next(iter(source.hooks))
        raise UserError(
            f"--hook {hook}: means {len(source.hooks)} modules; name one, for example {first}"
        )
    return JoinedSource(source, names) if names else source


def language_of(source: "ActivationSource", device: str) -> "LanguageModel | None":
    """Return the model behind a source: the live one, that of the store's manifest, or None for arrays and images."""
    live = getattr(source, "language", None)
    store = getattr(source, "store", None)
    if live is not None or store is None or store.of_images:
        return live
    from wsae.acts.language import language_for

    cfg = HarvestConfig.parse(store.manifest.config, where="store")
    language = language_for(cfg, device)
    store.check_model(language.digest)
    return language


def labelled(source: "ActivationSource", labels: Path | None) -> "ActivationSource":
    """Return the source with the classes in a .npy file, one a row, where one is given; UserError for a store."""
    from wsae.acts.source import ArraySource

    if labels is None:
        return source
    if not isinstance(source, ArraySource):
        raise UserError(f"--labels {labels}: goes with an array file, one class per row")
    classes = read_vector("--labels", labels, "iu", "one whole number per row")
    return source.with_labels(classes.astype("int64"))


def behind(
    source: "ActivationSource", device: str, language: bool = True
) -> "LanguageModel | Gallery | None":
    """Return what evaluation shows or splices: a source's language model, or the images of its store; None for arrays.

    `language`: whether the model is wanted.

    Images that have moved or changed are left out: scores do not need them.
    """
    from wsae.acts.source import StoreSource

    if not isinstance(source, StoreSource) or not source.store.of_images:
        return language_of(source, device) if language else None
    from wsae.acts.images.harvest import Gallery, store_images

    try:
        return Gallery(store_images(source.store))
    except UserError:
        return None
