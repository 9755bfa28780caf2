"""Published SAEs by name: SAELens' registry, from the installed package sae-lens, else from the table of ours.

The table has the same names. Its ids and paths are patterns: `{a,b}` and `{0..3}` in an id stand for each of these
values, `{1}` in a path for the value of the id's first braces, and any other braces in a path for one value an id.
No torch here.
"""

import functools
import importlib.metadata
import itertools
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from wsae.core.errors import UserError, nearest
from wsae.interop.config import SourceName

SAE_LENS = "sae-lens"
LOADERS: dict[str, SourceName] = {
    "sae_lens": "saelens",
    "gemma_2": "gemma_scope",
    "gemma_3": "gemma_scope",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope_r1",
    "dictionary_learning_1": "dictionary_learning",
    "sparsify": "sparsify",
    "qwen_scope": "torch",
    "goodfire": "torch",
    "deepseek_r1": "torch",
    "gemma_2_transcoder": "gemma_scope",
    "mwhanna_transcoder": "circuit_tracer",
    "connor_rob_hook_z": "torch",
}
"""SAELens' name of a loader -> our reader."""
_NO_EQUAL = {
    "mntss_clt_layer_transcoder": "a cross-layer transcoder has no equal here",
    "temporal": "a temporal SAE reads earlier tokens, which has no equal here",
}
_TARGET = re.compile(r"(?P<release>[\w.+-]+(?:/[\w.-]+)?):(?P<id>.+)", flags=re.ASCII)
_NAME = re.compile(r"^([^\s#][^\n]*?):[ \t]*$", flags=re.MULTILINE)
_BRACES = re.compile(r"\{([^{}]*)\}")


class Published(NamedTuple):
    """One SAE of a release: where its files lie on the hub, and what only the registry says."""

    release: str
    sae_id: str
    model: str
    repo: str
    path: str
    """Folder, or file, in the repository."""
    loader: str
    overrides: dict[str, Any]
    scale: float | None = None
    """What inputs are multiplied by before they are encoded."""

    @property
    def refusal(self) -> str | None:
        """Why it cannot be opened here, as far as the registry tells; None where it can."""
        if self.loader in LOADERS:
            across = re.search(r"(?:^|/)clt", self.path)
            return _NO_EQUAL["mntss_clt_layer_transcoder"] if across else None
        return _NO_EQUAL.get(self.loader, f"its loader {self.loader!r} is unknown here")


class Registry(NamedTuple):
    """The text of a registry by release, and whose it is."""

    whose: str
    texts: dict[str, str]

    def release(self, name: str) -> dict[str, Published]:
        """Return the SAEs of a release by id, in the registry's order; raises UserError for an unknown release."""
        if name not in self.texts:
            raise UserError(
                f"{name}: no release of {self.whose}'s registry has this name{nearest(name, self.texts)}; "
                "wsae releases lists them"
            )
        try:
            found = list(_published(name, _parsed(self.texts[name])[name]))
        except (KeyError, TypeError, AttributeError) as error:  # of a later version
            raise UserError(
                f"{name}: {self.whose}'s registry is of a form that this wsae does not know ({error!r}); use another "
                "version of sae-lens, or none"
            ) from error
        return {one.sae_id: one for one in found}


@functools.cache
def registry() -> Registry:
    """Return the registry in use."""
    try:
        package = importlib.metadata.distribution(SAE_LENS)
    except importlib.metadata.PackageNotFoundError:
        text = (files("wsae.interop") / "releases.yaml").read_text(encoding="utf-8")
        return Registry("wsae", _split(text))
    place = Path(str(package.locate_file("sae_lens/pretrained_saes.yaml")))
    try:
        text = place.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{place}: cannot be read ({error.strerror}); install sae-lens again"
        ) from error
    return Registry(f"{SAE_LENS} {package.version}", _split(text))


def _split(text: str) -> dict[str, str]:
    """Return the part of each release: all of them take seconds to parse."""
    begins = [(found[1], found.start()) for found in _NAME.finditer(text)]
    ends = [at for _, at in begins[1:]] + [len(text)]
    return {name: text[at:end] for (name, at), end in zip(begins, ends, strict=True)}


def _parsed(text: str) -> dict[str, Any]:
    import yaml

    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the first is written in C
    return loader(text).get_single_data()


def _published(name: str, data: dict[str, Any]) -> Iterator[Published]:
    common = (str(data["model"]), str(data["repo_id"]))
    loader = data.get("conversion_func") or "sae_lens"
    overrides = data.get("config_overrides") or {}
    for entry in data["saes"]:
        sae = entry if isinstance(entry, dict) else {"id": entry}
        ids = expanded(str(sae["id"]))
        paths = along(str(sae["path"]), str(sae["id"])) if "path" in sae else ids
        factor = sae.get("norm_scaling_factor")
        factors = [None] * len(ids) if factor is None else along(str(factor), str(sae["id"]))
        for one, path, scale in zip(ids, paths, factors, strict=True):
            known = None if scale is None else float(scale)
            yield Published(name, one, *common, path, loader, overrides, known)


def expanded(pattern: str) -> list[str]:
    """Return every text that a pattern stands for: `{a,b}` is a or b, `{0..2,5}` one of 0, 1, 2 and 5."""
    return ["".join(chosen) for chosen in itertools.product(*_choices(pattern))]


def _choices(pattern: str) -> list[list[str]]:
    """Return what each part of a pattern may be: text and braces in turn."""
    return [_values(part) if at % 2 else [part] for at, part in enumerate(_BRACES.split(pattern))]


def _values(inside: str) -> list[str]:
    out: list[str] = []
    for part in inside.split(","):
        span = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        out += [part] if span is None else map(str, range(int(span[1]), int(span[2]) + 1))
    return out


def along(pattern: str, ids: str) -> list[str]:
    """Return one text for each text of the pattern `ids`: `{1}` is what its first braces are there, a list in turn."""
    chosen = [pick[1::2] for pick in itertools.product(*_choices(ids))]
    out = [""] * len(chosen)
    if "{" not in ids:
        return [text for text in expanded(pattern)]
    for at, part in enumerate(_BRACES.split(pattern)):
        if at % 2 == 0:
            column = [part] * len(chosen)
        elif part.isdecimal():
            column = [pick[int(part) - 1] for pick in chosen]
        else:
            column = _values(part)
        out = [done + more for done, more in zip(out, column, strict=True)]
    return out


def published(release: str, sae_id: str) -> Published:
    """Return an SAE of a release, or of a repository that releases are of.

    Raises UserError naming the nearest names, or what has no equal here.
    """
    if "/" in release and (there := of_repository(release, sae_id)) is not None:
        release, sae_id = there.release, there.sae_id
    saes = registry().release(release)
    if sae_id not in saes:
        raise UserError(
            f"{release}:{sae_id}: the release has no SAE of this id{nearest(sae_id, saes)}; "
            f"wsae releases {release} lists {len(saes):,}"
        )
    found = saes[sae_id]
    if found.refusal is not None:
        raise UserError(f"{release}:{sae_id}: {found.refusal}")
    return found


def of_repository(repo: str, path: str) -> Published | None:
    """Return the first published SAE that lies, by its path or its id, in a repository of the hub."""
    known = registry()
    line = re.compile(rf"^  repo_id: {re.escape(repo)}[ \t]*$", flags=re.MULTILINE)
    names = [name for name, text in known.texts.items() if line.search(text)]
    there = (one for name in names for one in known.release(name).values())
    return next((one for one in there if path in (one.path, one.sae_id)), None)


def named(target: Path | str) -> Published | None:
    """Return the published SAE that `RELEASE:ID` names; None for a path and a `hub:` address."""
    text = str(target)
    found = _TARGET.fullmatch(text)
    if text.startswith("hub:") or found is None or Path(text).exists():
        return None
    return published(found["release"], found["id"])


_MODELS = (
    (r"gpt2-small", "openai-community/gpt2"),
    (r"(gpt2(?:-medium|-large|-xl)?)", r"openai-community/\1"),
    (r"(gemma-.+)", r"google/\1"),
    (r"(pythia-.+)", r"EleutherAI/\1"),
    (r"mistral-7b", "mistralai/Mistral-7B-v0.1"),
)
"""Names that TransformerLens and the registries use -> those of the hub."""


def hub_model(name: str) -> str:
    """Return the hub's name of a model that TransformerLens or a registry names; any other name as it is."""
    for theirs, ours in _MODELS:
        if found := re.fullmatch(theirs, name):
            return found.expand(ours)
    return name
