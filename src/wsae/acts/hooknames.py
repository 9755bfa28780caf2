"""Names of places in a model: patterns, short names, and TransformerLens' words for them. No torch here.

A place is a module's output, or with ".input" behind the name its first input. Names are Hugging Face module paths or
the ends of such paths; TransformerLens' names (`blocks.9.hook_resid_post`) are translated where a place has the very
same values, weights taken as they are in the file. nnsight's `.output[0]` and `.input[0]` are read too.
"""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Literal, NamedTuple

from wsae.core.errors import UserError, nearest

Side = Literal["output", "input"]
_SIDE = re.compile(r"\.(?P<side>output|input)(?:\[0\])?$")
_STACK = r"(?:layers|h|blocks|layer|block)"
_BLOCK = re.compile(rf"(?:^|\.){_STACK}\.(?P<layer>\d+)(?P<rest>\.[\w.]+)?$", flags=re.ASCII)
_LENS = re.compile(
    r"(?:blocks\.(?P<layer>\d+|\*)\.)?(?P<rest>(?:\w+\.)*hook_\w+)|embed|unembed|ln_final"
    r"|blocks\.(?P<plain>\d+|\*)(?:\.(?P<module>attn|mlp))?"
)


class HookPlace(NamedTuple):
    """A module's full path, and which side of it is read."""

    path: str
    side: Side = "output"


class HookName(NamedTuple):
    """A hook point for TransformerLens: its name (ours where it has no equal there) and its block."""

    name: str
    layer: int | None


def canonical_names(paths: Iterable[str]) -> dict[str, str]:
    """Map each module path to its short name.

    The short name starts at the component before the first number ("model.layers.9.mlp" -> "layers.9.mlp"), or is the
    last component where there is none ("model.norm" -> "norm"). Paths whose short names collide keep the full path.
    """
    short = {path: short_name(path) for path in paths if path}
    count = Counter(short.values())
    return {path: name if count[name] == 1 else path for path, name in short.items()}


def short_name(path: str) -> str:
    """Return a path from the component before its first number on, or its last component."""
    parts = path.split(".")
    first_number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return ".".join(parts[max(first_number - 1, 0) :]) if first_number is not None else parts[-1]


def match(pattern: str, paths: Iterable[str], model_type: str = "") -> list[HookPlace]:
    """Return the places that a pattern names, in natural order; `*` stands for characters other than a dot.

    A pattern matches paths that end in it at a dot; a full path names that module alone. A module called "output" or
    "input" comes before the suffix. `model_type` is the kind of architecture that TransformerLens' names are read for.
    Raises UserError naming the nearest names when nothing matches, or what is like a TransformerLens place without an
    equal here.
    """
    paths = [path for path in paths if path]
    wanted = pattern.strip()
    if found := _ending(wanted, paths):
        return [HookPlace(path) for path in found]
    side: Side = "output"
    bare = wanted
    if suffix := _SIDE.search(wanted):
        side, bare = ("input" if suffix["side"] == "input" else "output"), wanted[: suffix.start()]
        if found := _ending(bare, paths):
            return [HookPlace(path, side) for path in found]
    if _LENS.fullmatch(bare):
        return _translated(bare, paths, model_type)
    names = canonical_names(paths).values()
    raise UserError(
        f"hook {pattern!r}: the model has no such module{nearest(bare, names, least=0.4)}"
    )


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts "layers.9" before "layers.10"."""
    parts = re.split(r"(\d+)", name)
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part]


def _ending(pattern: str, paths: list[str]) -> list[str]:
    if pattern in paths:
        return [pattern]
    body = "".join("[^.]*" if char == "*" else re.escape(char) for char in pattern)
    regex = re.compile(rf"(?:.*\.)?{body}")
    return sorted((p for p in paths if regex.fullmatch(p)), key=natural_key) if body else []


def _projections(attention: str) -> dict[str, str]:
    return {f"attn.hook_{x}": f"{attention}.{x}_proj" for x in "qkv"}


_GATED = {
    "hook_resid_mid": "post_attention_layernorm.input",
    "hook_attn_out": "self_attn",
    "hook_mlp_out": "mlp",
    "attn.hook_z": "self_attn.o_proj.input",
    **_projections("self_attn"),
    "mlp.hook_in": "mlp.input",
    "mlp.hook_pre": "mlp.gate_proj",
    "mlp.hook_pre_linear": "mlp.up_proj",
    "mlp.hook_post": "mlp.down_proj.input",
}
_NORMED_HEADS = {k: v for k, v in _GATED.items() if k not in ("attn.hook_q", "attn.hook_k")}
"""Queries and keys are normalised after their projection."""
_POST_NORMS = {
    "hook_resid_mid": "pre_feedforward_layernorm.input",
    "hook_attn_out": "post_attention_layernorm",
    "hook_mlp_out": "post_feedforward_layernorm",
}
_GPT2 = {
    "hook_resid_mid": "ln_2.input",
    "hook_attn_out": "attn",
    "hook_mlp_out": "mlp",
    "attn.hook_z": "attn.c_proj.input",
    "mlp.hook_in": "mlp.input",
    "mlp.hook_pre": "mlp.c_fc",
    "mlp.hook_post": "mlp.c_proj.input",
}
_NEOX = {
    "hook_attn_out": "attention",
    "hook_mlp_out": "mlp",
    "attn.hook_z": "attention.dense.input",
    "mlp.hook_in": "mlp.input",
    "mlp.hook_pre": "mlp.dense_h_to_4h",
    "mlp.hook_post": "mlp.dense_4h_to_h.input",
}
_BERT = {
    "hook_resid_post": "output.LayerNorm.input",
    "hook_normalized_resid_post": "",
    "hook_resid_mid": "attention.output.LayerNorm.input",
    "hook_attn_out": "attention.output.dense",
    "hook_mlp_out": "output.dense",
    "attn.hook_z": "attention.output.dense.input",
    "attn.hook_q": "attention.self.query",
    "attn.hook_k": "attention.self.key",
    "attn.hook_v": "attention.self.value",
    "mlp.hook_pre": "intermediate.dense",
    "mlp.hook_post": "output.dense.input",
}
_FAMILIES: dict[str, dict[str, str]] = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "gemma", "smollm3"), _GATED),
    **dict.fromkeys(("mixtral", "qwen2_moe"), {k: v for k, v in _GATED.items() if "mlp." not in k}),
    "qwen3": _NORMED_HEADS,
    "qwen3_moe": {k: v for k, v in _NORMED_HEADS.items() if "mlp." not in k},
    "phi3": {k: v for k, v in _NORMED_HEADS.items() if k not in ("attn.hook_v", "mlp.hook_pre")},
    "gemma2": _GATED | _POST_NORMS,
    **dict.fromkeys(("gemma3", "gemma3_text"), _NORMED_HEADS | _POST_NORMS),
    "gpt2": _GPT2,
    "gpt_neo": _GPT2
    | {"attn.hook_z": "attn.attention.out_proj.input"}
    | _projections("attn.attention"),
    "gptj": {
        "hook_attn_out": "attn",
        "hook_mlp_out": "mlp",
        "attn.hook_z": "attn.out_proj.input",
        **_projections("attn"),
        "mlp.hook_pre": "mlp.fc_in",
        "mlp.hook_post": "mlp.fc_out.input",
    },
    "gpt_neox": _NEOX,
    "bloom": _NEOX  # there the modules of attention and MLP add the residual stream themselves
    | {
        "hook_resid_mid": "post_attention_layernorm.input",
        "hook_attn_out": "self_attention.dense",
        "hook_mlp_out": "mlp.dense_4h_to_h",
        "attn.hook_z": "self_attention.dense.input",
    },
    "opt": {
        "hook_resid_mid": "final_layer_norm.input",
        "hook_attn_out": "self_attn",
        "hook_mlp_out": "fc2",
        "attn.hook_z": "self_attn.out_proj.input",
        "attn.hook_v": "self_attn.v_proj",
        "attn.hook_k": "self_attn.k_proj",
        "mlp.hook_pre": "fc1",
        "mlp.hook_post": "fc2.input",
    },
    "phi": {
        "hook_attn_out": "self_attn",
        "hook_mlp_out": "mlp",
        "attn.hook_z": "self_attn.dense.input",
        **_projections("self_attn"),
        "mlp.hook_pre": "mlp.fc1",
        "mlp.hook_post": "mlp.fc2.input",
    },
    **dict.fromkeys(("bert", "roberta"), _BERT),
}
"""model_type -> what TransformerLens calls a place in a block -> the place, below the block's path."""
_EVERYWHERE = {"hook_resid_post": "", "hook_resid_pre": ".input"}
_NEARBY = {
    "ln1.hook_normalized": ("input_layernorm", "ln_1", "self_attn_layer_norm"),
    "ln2.hook_normalized": ("post_attention_layernorm", "ln_2", "final_layer_norm"),
    "hook_resid_mid": ("post_attention_layernorm.input", "mlp.input"),
    **{
        name: (place, "attn.c_attn", "attention.query_key_value")
        for name, place in _projections("self_attn").items()
    },
    "attn.hook_z": ("self_attn.o_proj.input", "self_attn.out_proj.input"),
    "hook_attn_out": ("self_attn", "attn", "attention", "self_attention"),
    "hook_mlp_out": ("mlp", "ffn", "feed_forward"),
    "mlp.hook_post": ("mlp.down_proj.input", "mlp.c_proj.input"),
}
"""Places like one of TransformerLens without being it."""
_TOP: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(
        ("hook_embed", "embed"), ("embed_tokens", "wte", "embed_in", "word_embeddings_layernorm")
    ),
    "hook_pos_embed": ("wpe", "embed_positions", "position_embeddings"),
    "unembed": ("lm_head", "embed_out"),
    "ln_final": ("norm", "ln_f", "final_layer_norm"),
    "ln_final.hook_normalized": (),
}
_SCALED = ("gemma", "gemma2", "gemma3", "gemma3_text")
"""The embedding is scaled, in some versions behind its module: read where the first block takes it."""


def _translated(name: str, paths: list[str], model_type: str) -> list[HookPlace]:
    """Return the places of TransformerLens' name; raises UserError where there is no exact equal."""
    found = _LENS.fullmatch(name)
    assert found is not None
    layer = found["layer"] or found["plain"]
    if layer is None:
        return _top(name, paths, model_type)
    rest = found["rest"] or {"attn": "hook_attn_out", "mlp": "hook_mlp_out"}.get(
        found["module"] or "", "hook_resid_post"
    )
    blocks = _blocks(layer, paths)
    if not blocks:
        names = canonical_names(paths).values()
        raise UserError(
            f"hook {name!r}: the model has no block {layer}{nearest(f'layers.{layer}', names)}"
        )
    family = _FAMILIES.get(model_type, {})
    tail = family.get(rest, _EVERYWHERE.get(rest))
    known = set(paths)
    places = []
    if tail is not None:  # "" is a block's output, ".input" its input
        side: Side = "input" if tail.endswith(".input") else "output"
        inner = tail.removesuffix("input").strip(".") if side == "input" else tail
        paths = [f"{block}.{inner}" if inner else block for block in blocks]
        places = [HookPlace(path, side) for path in paths if path in known]
    if not places:
        raise UserError(_no_equal(name, rest, blocks[0], known))
    return places


def _blocks(layer: str, paths: list[str]) -> list[str]:
    """Return the blocks of that number, not those inside other numbered modules ("*": all)."""
    number = r"\d+" if layer == "*" else layer
    regex = re.compile(rf"(?:[^\d.]\w*\.)*{_STACK}\.{number}", flags=re.ASCII)
    return sorted((path for path in paths if regex.fullmatch(path)), key=natural_key)


def _top(name: str, paths: list[str], model_type: str) -> list[HookPlace]:
    """Return a place outside the blocks."""
    if name in ("hook_embed", "embed") and model_type in _SCALED:
        return [HookPlace(block, "input") for block in _blocks("0", paths)]
    ends = _TOP.get(name, ())
    found = [p for p in paths if p.rsplit(".", 1)[-1] in ends and not re.search(r"\.\d+\.", p)]
    if not found:
        near = next((p for p in paths if p.rsplit(".", 1)[-1] in _TOP["ln_final"]), None)
        hint = f"; {short_name(near)} is like it, with the norm's weights" if near else ""
        raise UserError(
            f"hook {name!r}: no module has exactly these values{hint if 'ln_' in name else ''}; "
            "blocks.N.hook_resid_post, blocks.N.hook_resid_pre and the model's own module names are understood"
        )
    return [HookPlace(path) for path in found]


def _no_equal(name: str, rest: str, block: str, known: set[str]) -> str:
    there = [
        short_name(block) + "." + tail
        for tail in _NEARBY.get(rest, ())
        if f"{block}.{tail.removesuffix('.input')}" in known
    ]
    short = short_name(block)
    hint = f"the nearest is {there[0]}" if there else f"the block itself is {short}"
    inside = sorted(
        {p.removeprefix(f"{block}.").split(".")[0] for p in known if p.startswith(f"{block}.")}
    )
    return (
        f"hook {name!r}: no module of this model has exactly these values; {hint} "
        f"(in {short}: {', '.join(inside)}; .input reads what a module takes)"
    )


_BACK: dict[str, str] = {
    f".{tail}": name
    for places in _FAMILIES.values()
    for name, tail in places.items()
    if name in ("attn.hook_z", "mlp.hook_in", "mlp.hook_post")
} | {
    "": "hook_resid_post",
    ".input": "hook_resid_pre",
    ".post_feedforward_layernorm": "hook_mlp_out",
    ".pre_feedforward_layernorm.input": "hook_resid_mid",
    ".ln_2.input": "hook_resid_mid",
}
"""What is below a block, where the name alone says which place of TransformerLens it is."""


def hook_name(hook: str) -> HookName:
    """Return TransformerLens' name of a place.

    A block's output ("layers.9", "h.9", "gpt_neox.layers.9") is `blocks.9.hook_resid_post`, its input
    `blocks.9.hook_resid_pre`, what an attention's or MLP's last matrix takes `attn.hook_z` or `mlp.hook_post`, what an
    MLP takes `mlp.hook_in` (circuit-tracer's name). Other
    modules inside a block keep their name: where norms and biases are applied differs between models. TransformerLens'
    own names stay as they are.
    """
    found = _BLOCK.search(hook)
    if not found:
        lens = re.match(r"blocks\.(\d+)\.", hook) if _LENS.fullmatch(hook) else None
        return HookName(hook, int(lens[1]) if lens else None)
    layer, rest = int(found["layer"]), found["rest"] or ""
    if _LENS.fullmatch(hook) and "hook_" in hook:
        return HookName(hook, layer)
    back = _BACK.get(rest)
    return HookName(f"blocks.{layer}.{back}" if back else hook, layer)


_MAY_BE: dict[str, set[str]] = {}
"""What is below a block -> what TransformerLens calls it in some kinds of models."""
for _places in _FAMILIES.values():
    for _name, _tail in _places.items():
        _MAY_BE.setdefault(f".{_tail}", set()).add(_name)


def among(name: str, hooks: Iterable[str], sure: bool = False) -> str | None:
    """Return the recorded hook that a name means: itself, another spelling of its path, or TransformerLens' name.

    A module that has TransformerLens' name in some kinds of models alone (`hook_mlp_out` is "mlp" unless a norm follows
    it) is taken for it where no other hook is, unless `sure`.
    """
    hooks, wanted = list(hooks), name.strip()
    bare = _bare(wanted)
    if wanted in hooks:
        return wanted
    for same in (
        lambda hook: hook == bare,
        lambda hook: bare.endswith(f".{hook}") or hook.endswith(f".{bare}"),
        lambda hook: hook_name(_bare(hook)).name == hook_name(bare).name,
        lambda hook: not sure and not _lens_names(_bare(hook)).isdisjoint(_lens_names(bare)),
    ):
        if len(found := [hook for hook in hooks if same(hook)]) == 1:
            return found[0]
    return None


class Sides(NamedTuple):
    """The hook that a transcoder reads, and the one whose activations it is to give."""

    read: str
    given: str


def sides(hooks: Iterable[str], read: str | None, given: str | None) -> Sides:
    """Return both sides among recorded hooks; what is not named is the other of two. Raises UserError without one."""
    hooks = list(hooks)
    there = [None if name is None else among(name, hooks) for name in (read, given)]
    if len(hooks) == 2 and (there[0] is None) != (there[1] is None):
        rest = next(hook for hook in hooks if hook not in there)
        there = [hook or rest for hook in there]
    if there[0] is None or there[1] is None:
        names = [name or side for name, side in ((read, "its input"), (given, "its output"))]
        raise UserError(
            f"a transcoder needs both sides of its module ({' and '.join(names)}); the data have {', '.join(hooks)}"
        )
    return Sides(there[0], there[1])


def pairs(hooks: Iterable[str], read: Iterable[str], given: Iterable[str]) -> dict[str, str]:
    """Return each hook that transcoders read with the one that they are to give, of patterns in the same order.

    `*` stands for characters other than a dot. Raises UserError for a pattern without a recorded hook, and where there
    are more of one side.
    """
    hooks = list(hooks)

    def found(patterns: Iterable[str]) -> list[str]:
        named: list[str] = []
        for pattern in patterns:
            one = among(pattern, hooks)
            several = [one] if one is not None else _ending(pattern, hooks)
            if not several:
                raise UserError(f"hook {pattern!r}: is not in the data{nearest(pattern, hooks)}")
            named += [hook for hook in several if hook not in named]
        return named

    ins, outs = found(read), found(given)
    if len(ins) != len(outs):
        raise UserError(
            f"transcoders read {len(ins)} hooks ({', '.join(ins[:3])}) and are to give {len(outs)} "
            f"({', '.join(outs[:3])}); name as many of each"
        )
    return dict(zip(ins, outs, strict=True))


def lens_name(hook: str) -> str:
    """Return TransformerLens' name of a place as `hook_name` does, or the one that it has in some kinds of models."""
    may = _lens_names(_bare(hook))
    return next(iter(may)) if len(may) == 1 else hook_name(hook).name


def _lens_names(hook: str) -> set[str]:
    """Return what TransformerLens may call a place, by the kind of model; its own name of one is itself."""
    known = hook_name(hook).name
    found = _BLOCK.search(hook)
    if found is None or "hook_" in known:
        return {known}
    return {f"blocks.{found['layer']}.{name}" for name in _MAY_BE.get(found["rest"] or "", ())}


def _bare(name: str) -> str:
    """Return a name without nnsight's `.output` and `[0]`; of an input, `.input` stays."""
    return _SIDE.sub(lambda side: ".input" if side["side"] == "input" else "", name)
