"""circuit-tracer: config.yaml + layer_{i}.safetensors, a transcoder of every layer from 0 on in one folder.

    z = act(x @ W_enc^T + b_enc)        y_hat = z @ W_dec + b_dec + x @ W_skip^T

W_enc is [d_sae, d_in] there. A file with `activation_function.threshold` is a JumpReLU, one whose config says
`activation: topk` and `k` keeps the k largest (below 0 too, which ours do not: a ReLU follows), any other a ReLU. One
file is one transcoder: it is named in place of its folder, except where it is alone.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wsae.acts.hooknames import hook_name, lens_name
from wsae.core.artifact import free, replacing, write_manifest
from wsae.core.config import read_config
from wsae.core.errors import UserError
from wsae.core.files import write_text
from wsae.core.tensors import load_tensors, save_tensors
from wsae.interop.format import (
    Foreign,
    Format,
    Meaning,
    NamedTensors,
    NoEqual,
    as_known,
    check_shapes,
    named,
    provenance,
    take,
    whole,
)
from wsae.sae.config import Provenance, TopK
from wsae.sae.model import SAE

CONFIG, LAYER = "config.yaml", re.compile(r"layer_(\d+)\.safetensors")
_NAMES = {"W_enc": "W_enc", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec"}
_THRESHOLD = "activation_function.threshold"
_ACTIVATIONS = {"relu": None, "batch_topk": "jumprelu", "jumprelu": "jumprelu", "topk": "topk"}
"""Ours -> theirs, in the config where it is not in the weights."""


def layers(folder: Path) -> dict[int, Path]:
    """Return the files of a folder's transcoders by layer."""
    inside = folder.iterdir() if folder.is_dir() else ()
    found = {int(m[1]): path for path in inside if (m := LAYER.fullmatch(path.name))}
    return dict(sorted(found.items()))


def _read(path: Path) -> Foreign:
    if path.is_dir():
        files = layers(path)
        if len(files) != 1:
            raise UserError(
                f"{path}: holds {len(files)} transcoders; name the file of one, for example "
                f"{path / f'layer_{next(iter(files))}.safetensors'}"
            )
        ((layer, path),) = files.items()
    else:
        found = LAYER.fullmatch(path.name)
        assert found is not None
        layer = int(found[1])
    place = path.parent / CONFIG
    config = dict(read_config(place).data) if place.is_file() else {}
    if config.get("model_kind", "transcoder_set") != "transcoder_set":
        raise UserError(
            f"{place}: model_kind = {config['model_kind']!r}: a cross-layer transcoder has no equal here"
        )
    hooks = {
        ours: f"blocks.{layer}.{config[key]}"
        for ours, key in (("hook", "feature_input_hook"), ("hook_out", "feature_output_hook"))
        if isinstance(config.get(key), str)
    }
    return Foreign({**config, **hooks, "layer": layer}, load_tensors(path))


def _rename(foreign: Foreign, where: str) -> NamedTensors:
    names = dict(_NAMES)
    tensors = {key: value for key, value in foreign.tensors.items() if key != "k"}
    names |= {"W_skip": "W_skip"} if "W_skip" in tensors else {}
    names |= {"threshold": _THRESHOLD} if _THRESHOLD in tensors else {}
    parts = dict(zip(names, take(tensors, names.values(), where), strict=True))
    if parts["W_enc"].ndim != 2:
        raise UserError(f"{where}: W_enc is {tuple(parts['W_enc'].shape)}, not a matrix")
    parts["W_enc"] = parts["W_enc"].T
    return check_shapes(NamedTensors(**parts), where, transcoder=True)


def _understand(foreign: Foreign, weights: NamedTensors, where: str) -> Meaning:
    said = foreign.config.get("activation")
    if said == "topk":
        k = whole(foreign.config, "k", where)
        return Meaning(weights, {"kind": "topk", "k": k}, transcoder=True)
    if said not in (None, "relu", "jumprelu", "jump_relu"):
        raise UserError(
            f"{where}: activation {said!r} has no equal here; relu, jumprelu, topk have"
        )
    kind = "relu" if weights.threshold is None else "jumprelu"
    return Meaning(weights, {"kind": kind}, transcoder=True)


def _about(foreign: Foreign) -> Provenance:
    keys = {"model": "model_name", "hook": "hook", "hook_out": "hook_out"}
    notes = [] if "model_name" in foreign.config else [f"no {CONFIG} beside the file"]
    return provenance("circuit_tracer", foreign.config, keys, notes)


def _pack(sae: SAE, about: Provenance) -> Foreign:
    kind = sae.cfg.activation.kind
    if not sae.cfg.transcoder or sae.cfg.d_out != sae.cfg.d_in:
        what = "an SAE" if not sae.cfg.transcoder else "a transcoder between other widths"
        raise NoEqual(
            f"{what} has no equal in circuit-tracer, which takes transcoders of one width (wsae train --hook-out)"
        )
    if kind not in _ACTIVATIONS:
        raise NoEqual(f"activation {kind} has no equal in circuit-tracer")
    layer = hook_name(about.hook or "").layer
    if layer is None:
        raise UserError(
            f"circuit-tracer names files by layer, and the hook {about.hook!r} is of none; give --hook"
        )
    config: dict[str, Any] = {"model_name": about.model, "model_kind": "transcoder_set"}
    for key, hook in (("feature_input_hook", about.hook), ("feature_output_hook", about.hook_out)):
        config[key] = None if hook is None else lens_name(hook).removeprefix(f"blocks.{layer}.")
    if isinstance(sae.cfg.activation, TopK):
        config |= {"activation": "topk", "k": sae.cfg.activation.k}
    weights = named(sae)
    tensors = {name: getattr(weights, name) for name in _NAMES}
    tensors["W_enc"] = weights.W_enc.T.contiguous()
    if weights.W_skip is not None:
        tensors["W_skip"] = weights.W_skip
    if weights.threshold is not None:
        tensors[_THRESHOLD] = weights.threshold.expand(sae.cfg.d_sae).clone()
    return Foreign({**config, "layer": layer}, tensors)


class _CircuitTracer(Format):
    """Its files have the layer in their names."""

    def detect(self, path: Path) -> bool:
        """Return whether a folder holds transcoders, one a layer."""
        return bool(layers(path)) and (path / CONFIG).is_file()

    def write(self, foreign: Foreign, path: Path) -> list[str]:
        """Write one layer and its config; return the files' names."""
        return _write(path, {foreign.config["layer"]: foreign})


def _write(path: Path, packed: Mapping[int, Foreign]) -> list[str]:
    import yaml

    files = [CONFIG]
    config = {k: v for k, v in next(iter(packed.values())).config.items() if k != "layer"}
    for layer, foreign in packed.items():
        files.append(f"layer_{layer}.safetensors")
        save_tensors(path / files[-1], foreign.tensors)
    write_text(path / CONFIG, yaml.safe_dump(config, sort_keys=False))
    return files


def save_set(
    saes: Mapping[str, SAE], about: Mapping[str, Provenance], path: Path, force: bool = False
) -> list[int]:
    """Write the transcoders of a model's layers, by hook, as one folder; returns the layers.

    Raises UserError, before anything is written, for two of one layer, other activations or widths, or what has no
    equal there.
    """
    packed: dict[int, Foreign] = {}
    for hook, sae in saes.items():
        one = _pack(as_known(sae), about[hook])
        layer = one.config["layer"]
        first = next(iter(packed.values()), one)
        if layer in packed:
            raise UserError(f"{hook}: a second transcoder of layer {layer}; choose with --hook")
        if {**one.config, "layer": 0} != {**first.config, "layer": 0} or [
            t.shape for t in one.tensors.values()
        ] != [t.shape for t in first.tensors.values()]:
            raise UserError(
                f"{hook}: another kind, width or place than {next(iter(saes))}; circuit-tracer takes all alike"
            )
        packed[layer] = one
    free(path, "export", force)
    with replacing(path, "export"):
        files = _write(path, dict(sorted(packed.items())))
        write_manifest(
            path, "export", {"format": "circuit_tracer", "layers": sorted(packed)}, files
        )
    return sorted(packed)


CIRCUIT_TRACER = _CircuitTracer(
    "circuit_tracer",
    (CONFIG, "layer_0.safetensors"),
    *(_read, _rename, _understand, _about, _pack),
    "from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder; "
    "load_transcoder({path!r} + '/layer_N.safetensors', layer=N); its sets have every layer from 0 on",
)
