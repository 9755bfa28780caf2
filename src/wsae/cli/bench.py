"""`wsae bench`: the trainer against every installed peer and against the machine's floor.

A door to `wsae_bench`, a package of its own, which nothing else here imports.
"""

from typing import Any, Literal

import tyro

from wsae.cli.common import (
    UI,
    Common,
    CommonFlags,
    MaybeCount,
    MaybePlace,
    Number,
    Switch,
    config_flags,
    config_values,
)
from wsae.core.config import Config
from wsae.core.errors import UserError
from wsae_bench.config import OURS, PEERS, PEERS_OF_KINDS, SIZES, BenchConfig, Dtype, Size

ABOUT = """\
Train at the same sizes with wsae, with every peer that is installed (sparsify, dictionary_learning, SAELens,
overcomplete) and with the machine's bare primitives, in turn within one run; print tokens/s, ratios, the share of
the floor (encoder product and fused Adam alone), memory and FVU on held-out rows. CPU only.
The peers want an environment of their own; wsae_bench/__init__.py says how to make it.
The whole run takes about 25 minutes on two cores, --quick under two. With --out finished blocks are kept."""

QUICK_PEERS = ("sparsify-adam", "dl-topk")
QUICK_S = 75.0
"""No round begins later, so that a quick run ends in two minutes."""
QUICK_ROUNDS = {"warmup": 1, "rounds": 5, "turn": 2}


class ShapeFlags(Config):
    """A size of its own; what is not given is that of size B."""

    d_in: MaybeCount = None
    """Width of the activations."""
    d_sae: MaybeCount = None
    """Latents."""
    k: MaybeCount = None
    """Active latents per row."""
    batch: MaybeCount = None
    """Rows per step."""


class Flags(config_flags(BenchConfig, omit=("dtypes", "lr", "timeout_s", "seconds"))):
    """Flags of `wsae bench`."""

    size: tuple[Literal["A", "B"], ...] = ("A", "B")
    """A: d_in 768, d_sae 24,576, k 32, batch 4,096; B: d_in 576, d_sae 4,608, k 32, batch 2,048."""
    shape: tyro.conf.OmitArgPrefixes[ShapeFlags] = ShapeFlags()
    """A size of its own."""
    dtype: tuple[Dtype, ...] = ()
    """Precision of the dense products; default: float32, and bfloat16 where the processor has instructions for it."""
    rounds: MaybeCount = None
    """Rounds of measured steps; default: 3 at A, 6 of 3 steps at B."""
    lr: Number = 2e-3
    """Learning rate of every Adam where fits are compared; 0 leaves that out. Elsewhere each has its own default."""
    quick: Switch = False
    """Size B, float32, ours, two peers and the floor, in two minutes."""
    timeout: Number = 600.0
    """Seconds after which a silent worker is ended."""
    out: MaybePlace = None
    """Directory for results.csv, steps.csv, bench.json and pictures; default: they are only printed."""
    common: CommonFlags = Common()


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Run the benchmark and return its tables."""
    cfg = config(flags)
    from wsae_bench.run import run_bench

    if not flags.dtype and "bfloat16" not in cfg.dtypes and not flags.quick:
        ui.note("bfloat16 is left out: this processor emulates it; --dtype bfloat16 measures it")
    return run_bench(cfg, flags.out, ui.progress, ui.note)


def config(flags: Flags) -> BenchConfig:
    """Return the run these flags describe; raises UserError in one line."""
    _check(flags)
    shape = flags.shape.model_dump(exclude_none=True)
    changed = shape | ({"name": "custom"} if shape else {})
    changed |= QUICK_ROUNDS if flags.quick else {}
    changed |= {} if flags.rounds is None else {"rounds": flags.rounds}
    names = ["B"] if flags.quick or shape else dict.fromkeys(flags.size)
    data = config_values(flags, BenchConfig) | {
        "sizes": tuple(
            Size.parse({**SIZES[name].to_dict(), **changed}, where="size") for name in names
        ),
        "threads": tuple(dict.fromkeys(flags.threads)),
        "lr": flags.lr or None,
        "families": flags.families and not flags.only,
        "timeout_s": flags.timeout,
        "seed": flags.common.seed,
    }
    if flags.quick:
        data |= {
            "dtypes": ("float32",),
            "only": flags.only or ("wsae", "wsae-eager", *QUICK_PEERS),
            "lr": None,
            "families": False,
            "seconds": QUICK_S,
        }
    else:
        from wsae_bench.run import native_dtypes

        data["dtypes"] = tuple(dict.fromkeys(flags.dtype)) or native_dtypes()
    return BenchConfig.parse(data, where="flags")


def _check(flags: Flags) -> None:
    device = flags.common.device
    if device not in ("auto", "cpu"):
        raise UserError(f"--device {device}: wsae bench measures CPUs; use --device cpu")
    if flags.acts is not None and not flags.acts.is_file():
        raise UserError(f"--acts {flags.acts}: no such file")
    known = [variant.name for variant in (*OURS, *PEERS, *PEERS_OF_KINDS)]
    for name in flags.only:
        if name not in known:
            raise UserError(f"--only {name}: no such variant; there are {', '.join(known)}")
    for flag in ("size", "threads"):
        if not getattr(flags, flag):
            raise UserError(f"--{flag}: give at least one")


def show(result: dict[str, Any], ui: UI) -> None:
    """Print a table per block, the machine's primitives, exponents, and where the files are."""
    from wsae_bench.table import shown

    for title, header, rows, after in shown(result):
        ui.table(title, header, rows)
        for line in after:
            ui.say(line)
    for line in [*result["skipped"], *result["warnings"]]:
        ui.say(line)
    machine = result["machine"]
    ui.say(
        f"{machine['cpu']} ({machine['flags']}), {machine['cores']} cores, commit {machine['commit'][:12]}"
    )
    ui.say(f"{result['errors']} variants failed")
    if result["files"]:
        ui.say("files: " + ", ".join(result["files"]))


def interrupted(flags: Flags, words: list[str], error: KeyboardInterrupt) -> str:  # noqa: ARG001
    """Return what is kept."""
    return f"{flags.out} keeps the finished blocks" if flags.out else "give --out to keep results"
