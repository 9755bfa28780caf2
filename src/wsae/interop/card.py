"""A folder for the model hub: SAE directories of ours, an index, and a model card that says what they are."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from wsae.core import __version__
from wsae.core.artifact import MANIFEST, Manifest, free, read_manifest, replacing, unfinished
from wsae.core.errors import UserError
from wsae.core.files import write_json, write_text
from wsae.core.hub import key_from, quiet_hub, told
from wsae.interop.config import INDEX
from wsae.interop.saes import Chosen, takers
from wsae.sae.config import Provenance
from wsae.sae.model import SAE

_REPO = re.compile(r"[\w.-]+/[\w.-]+", flags=re.ASCII)


def check_repo(repo: str) -> str:
    """Return a repository's name; raises UserError unless it is owner/name."""
    if not _REPO.fullmatch(repo):
        raise UserError(f"'{repo}' is not a repository on the hub; give owner/name")
    return repo


def upload(folder: Path, files: list[str], repo: str, private: bool) -> str:
    """Send those files of a folder to a repository, made if need be, and return its address.

    The token comes from HF_TOKEN and is written nowhere. Raises UserError without a token, without the extra, or with
    the hub's own reason.
    """
    token = key_from("HF_TOKEN")
    if not token:
        raise UserError(
            "no token for the hub: put one with write access into HF_TOKEN, or add --dry-run to write the folder only"
        )
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise UserError("wsae push needs the extra hub (pip install 'wsae[hub]')") from error
    api = HfApi(token=token)
    try:
        with quiet_hub():
            api.create_repo(repo, private=private, exist_ok=True)
            if private and not api.repo_info(repo).private:
                raise UserError(
                    f"{repo}: is on the hub already, and public; make it private there, or leave out --private"
                )
            done = api.upload_folder(
                repo_id=repo,
                folder_path=folder,
                allow_patterns=files,
                commit_message="SAEs trained with wsae",
            )
    except UserError:
        raise
    except Exception as error:  # the library's own, httpx's, OSError; KeyError of a proxy's page
        raise UserError(f"{repo}: not sent to the hub ({told(error)})") from error
    return str(done.commit_url)


CARD = "README.md"
_TITLES = {
    "fvu": "FVU",
    "fvu_weighted": "FVU, weighted",
    "l0": "L0",
    "dead_frac": "dead latents",
    "ce_delta": "CE increase, nats",
    "ce_loss_recovered_zero": "CE loss recovered",
}
_SHAPE = ("SAE", "d_in", "d_sae", "activation", "k", "tied")
_GAMMA = ("SAE", "rule", "alpha", "normalisation", "outliers", "effective dimensions")
_PAGE = """\
---
library_name: wsae
tags:
- sparse-autoencoder
- interpretability
- wsae
{front}---

# {title}

{what} on activations of {model}{at}.

```python
import wsae
sae = wsae.SAE.load("{place}")
z = sae.encode(x)        # [batch, d_sae]
{out} = sae(x)           # [batch, {width}]
```

{formats}

## Configuration

{shapes}

## Scores on held-out data

{scores}

## Loss weights (gamma)

gamma acted on the loss of training only; nothing is to be folded in. It is stored with the weights.

{gammas}

## Provenance

{provenance}

{digests}
"""


def write_folder(chosen: list[Chosen], out: Path, repo: str) -> list[str]:
    """Write SAEs, index and card to `out`; returns every file's path in it. A lone SAE lies at the top.

    Raises UserError when `out` holds anything that is not such a folder.
    """
    if not (out / INDEX).is_file():
        free(out, "hub folder", force=False)
    elif (out / MANIFEST).is_file():
        free(out, "sae", force=True)  # a lone SAE of a former push; nothing else is written over
    manifests: dict[str, Manifest] = {}
    formats: list[str] = []
    abouts = {"" if len(chosen) == 1 else one.place: one.about for one in chosen}
    with replacing(out, "hub folder"):
        for one, (name, about) in zip(chosen, abouts.items(), strict=True):
            sae = SAE.load(one.path)
            formats = formats if manifests else takers(sae, one.about)
            if name:
                free(out / name, "sae", force=True)
            with unfinished(out / name, "sae"):
                sae.save(out / name, about)
            manifests[name] = read_manifest(out / name, "sae")
        write_text(out / CARD, card(repo, manifests, abouts, formats))
        digests = {name or ".": manifest.digest() for name, manifest in manifests.items()}
        named = [name for name in manifests if name]
        index = {"saes": named, "digests": digests, "wsae_version": __version__}
        write_json(out / INDEX, index)
    files = [INDEX, CARD]
    for name, manifest in manifests.items():
        files += [str(Path(name) / file) for file in (*manifest.files, MANIFEST)]
    return files


def card(
    repo: str,
    manifests: dict[str, Manifest],
    abouts: dict[str, Provenance],
    formats: Sequence[str] = (),
) -> str:
    """Return the model card: front matter, how to load, config, scores, loss weights and provenance of every SAE.

    `formats`: those of other tools that have an equal of the first.
    """
    first, names = next(iter(abouts.values())), list(manifests)
    front = ""  # JSON strings are YAML strings
    if first.model and first.model.count("/") == 1:
        front += f"base_model: {json.dumps(first.model)}\n"
    if first.dataset and first.dataset.count("/") == 1:
        front += f"datasets:\n- {json.dumps(first.dataset)}\n"
    shape = next(iter(manifests.values())).config
    noun = "transcoder" if shape.get("d_out") else "sparse autoencoder"
    noun = "crosscoder" if shape.get("sources") else noun
    what = f"A {noun}" if len(names) == 1 else f"{len(names)} {noun}s"
    given = f", which gives those of {_text(first.hook_out)}" if first.hook_out else ""
    other = first.origin.get("format")
    if first.wsae_version:
        what += f" trained with wsae {first.wsae_version}"
    else:
        what += f", converted from {other} by wsae {__version__}," if other else " trained"
    digests = [(name or ".", manifest.digest()) for name, manifest in manifests.items()]
    place = f"hub:{repo}/{names[0]}" if names[0] else f"hub:{repo}"
    export = "No other tool has its equal."
    if formats:
        others = f" (or {', '.join(formats[1:])})" if formats[1:] else ""
        export = f"For other tools: `wsae export {place} --format {formats[0]} --out DIR`{others}."
    return _PAGE.format(
        front=front,
        title=_text(repo.split("/")[-1]),
        what=what,
        model=_text(first.model or "a model not recorded"),
        at=f" at {_text(first.hook)}{given}" if first.hook and len(names) == 1 else "",
        out="y_hat" if noun == "transcoder" else "x_hat",
        width="d_out" if noun == "transcoder" else "d_in",
        formats=export,
        place=place,
        shapes=_table(_SHAPE, [_shape(name, m.config) for name, m in manifests.items()]),
        scores=_scores(abouts),
        gammas=_table(_GAMMA, [_gamma(name, about) for name, about in abouts.items()]),
        provenance=_table(("", ""), _provenance(first)),
        digests=_table(("SAE", "SHA-256 of its manifest"), digests),
    )


def _shape(name: str, cfg: dict[str, Any]) -> tuple[object, ...]:
    kind = cfg["activation"]
    return (name or ".", cfg["d_in"], cfg["d_sae"], kind["kind"], kind.get("k", "-"), cfg["tied"])


def _scores(abouts: dict[str, Provenance]) -> str:
    keys = [key for key in _TITLES if any(key in about.metrics for about in abouts.values())]
    if not keys:
        return "Not measured (`wsae evaluate` before `wsae push` puts them here)."
    rows = [
        (name or ".", *(_interval(about.metrics.get(key)) for key in keys))
        for name, about in abouts.items()
    ]
    return (
        f"{_table(('SAE', *(_TITLES[key] for key in keys)), rows)}\n\n"
        "FVU: fraction of variance unexplained. Brackets: 95 % bootstrap intervals over sequences."
    )


def _interval(score: Any) -> str:
    if not isinstance(score, dict) or score.get("value") is None:
        return "-"
    if score.get("low") is None or score["low"] == score.get("high"):
        return f"{score['value']:.4g}"
    return f"{score['value']:.4g} [{score['low']:.4g}, {score['high']:.4g}]"


def _gamma(name: str, about: Provenance) -> tuple[object, ...]:
    gamma = about.gamma
    weighted = gamma and gamma.get("rule") != "none"
    shown = (gamma.get(key, "-") if weighted else "-" for key in ("alpha", "normalise", "robust"))
    dimensions = gamma.get("effective_dimensions")
    rule = gamma.get("rule") if gamma else "not recorded"
    return (name or ".", rule, *shown, "-" if dimensions is None else f"{dimensions:.4g}")


def _provenance(about: Provenance) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = [
        ("model", about.model),
        ("hook", about.hook),
        ("hook of the output", about.hook_out),
        ("text or images", about.dataset),
        ("tokens per sequence", about.context),
        ("training tokens", about.tokens),
        ("begin-of-text token", about.prepend_bos),
        ("wsae", about.wsae_version),
        ("written by", about.origin.get("format")),
        *((f"digest of {name}", value) for name, value in about.inputs.items()),
    ]
    return [row for row in rows if row[1] is not None]


def _table(head: tuple[str, ...], rows: Sequence[tuple[object, ...]]) -> str:
    lines = [f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
    lines += [f"| {' | '.join(_text(str(cell)) for cell in row)} |" for row in rows]
    return "\n".join(lines)


def _text(value: str) -> str:
    """Return words that cannot leave their table cell or become markup."""
    flat = " ".join(value.split())
    for mark in "\\`|<>[]*":
        flat = flat.replace(mark, f"\\{mark}") if mark != "<" else flat.replace("<", "&lt;")
    return flat
