"""`wsae bench`: the trainer against every installed peer and against the machine's floor."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from wsae.cli.flags import Common, CommonFlags, MaybeCount, MaybePlace, Number, Switch
from wsae.cli.ui import UI
from wsae.core.config import Config
from wsae.core.errors import UserError

if TYPE_CHECKING:
    from wsae.experiments.bench.config import BenchConfig, Size

# Cells of the tables of `wsae bench`.

Table = tuple[list[str], list[list[str]]]


def speed(block: dict[str, Any]) -> Table:
    """Return a block's variants: time, speed and its ratios, memory, fit and what else the machine did."""
    families = block["kind"] in ("families", "kinds", "scaling")
    header = ["variant", "ms/step", "min-max", "tokens/s"]
    header += ["x first" if families else "x fastest peer", "share of floor"]
    header += ["extra MiB", "peak MiB", "lr", _fvu_title(block), "L0", "other load"]
    ratio = "cost_of_first" if families else "of_fastest_peer"
    return header, [_speed_row(row, ratio, len(header)) for row in block["rows"]]


def primitives(block: dict[str, Any]) -> Table:
    """Return the machine's primitives in the order of a step."""
    from wsae.experiments.bench.table import PRIMITIVES

    rows = [
        [
            words,
            f"{found['ms']:,.1f}",
            f"{found['min_ms']:,.1f}",
            _cell(found.get("gflops"), ",.0f"),
        ]
        for name, words in PRIMITIVES.items()
        if (found := block["primitives"].get(name))
    ]
    floor = ["floor: faster encoder product + fused Adam", f"{block['floor_ms']:,.1f}", "", ""]
    return ["primitive", "ms (median)", "min", "GFLOP/s"], [*rows, floor]


def scaling(fits: Sequence[dict[str, Any]]) -> Table:
    """Return the fitted exponents with their intervals."""
    header = ["cost", "against", "exponent", "95 % interval", "points"]
    rows = [
        [
            fit["quantity"],
            fit["axis"],
            f"{fit['exponent']:.2f}",
            f"{fit['low']:.2f} to {fit['high']:.2f}",
            ", ".join(f"{x:g}: {y:,.0f}" for x, y in fit["points"]),
        ]
        for fit in fits
    ]
    return header, rows


def _speed_row(row: dict[str, Any], ratio: str, width: int) -> list[str]:
    if "ms" not in row:
        return [row["variant"], "failed", *[""] * (width - 2)]
    return [
        row["variant"],
        f"{row['ms']:,.1f}",
        f"{row['ms_min']:,.1f}-{row['ms_max']:,.1f}",
        f"{row['tokens_per_s']:,.0f}",
        _cell(row[ratio], ".2f"),
        _cell(row["floor_share"], ".0%"),
        f"{row['extra_mib']:,.0f}",
        f"{row['peak_mib']:,.0f}",
        _cell(row["lr"], ".2e"),
        _cell(row["fvu"], ".4f"),
        _cell(row["l0"], ".1f"),
        f"{row['other_load']:.2f}",
    ]


def _fvu_title(block: dict[str, Any]) -> str:
    tokens = [row["fvu_tokens"] for row in block["rows"] if "ms" in row]
    return f"FVU at {max(tokens):,} tokens" if tokens else "FVU"


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


ABOUT = """\
Train at the same sizes with wsae, with every peer that is installed (sparsify, dictionary_learning, SAELens,
overcomplete) and with the machine's bare primitives, in turn within one run; print tokens/s, ratios, the share of
the floor (encoder product and fused Adam alone), memory and FVU on held-out rows. CPU only.
The peers want an environment of their own; wsae/experiments/bench/__init__.py says how to make it.
The whole run takes about 25 minutes on two cores, --quick under two. With --out finished blocks are kept."""

QUICK_PEERS = ("sparsify-adam", "dl-topk")
QUICK_S = 75.0
QUICK_ROUNDS = {"warmup": 1, "rounds": 5, "turn": 2}
"""No round begins later, so that a quick run ends in two minutes."""


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


class Flags(Config):
    """Flags of `wsae bench`."""

    size: tuple[Literal["A", "B"], ...] = ("A", "B")
    """A: d_in 768, d_sae 24,576, k 32, batch 4,096; B: d_in 576, d_sae 4,608, k 32, batch 2,048."""
    shape: tyro.conf.OmitArgPrefixes[ShapeFlags] = ShapeFlags()
    """A size of its own."""
    dtype: tuple[Literal["float32", "bfloat16"], ...] = ()
    """Precision of the dense products; none means float32, and bfloat16 where the processor has instructions for it."""
    threads: Annotated[tuple[int, ...], tyro.conf.arg(metavar="N ...")] = (1,)
    """Threads of every worker; each number is measured in turn."""
    rounds: MaybeCount = None
    """Rounds of measured steps; none means 3 at A, 6 of 3 steps at B."""
    only: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME ...")] = ()
    """Measure these variants only (wsae, wsae-eager, sparsify-signum, dl-topk, saelens ...)."""
    lr: Number = 2e-3
    """Learning rate of every Adam where fits are compared; 0 leaves that out. Elsewhere each has its own default."""
    fit_steps: Annotated[int, tyro.conf.arg(metavar="N")] = 60
    """Steps after which fits are compared."""
    families: bool = True
    """Measure what 2 and 4 members cost beside one."""
    kinds: Switch = False
    """Measure every activation function too."""
    scaling: Switch = False
    """Instead measure how our time and memory grow with d_sae, k, batch and members."""
    quick: Switch = False
    """Size B, float32, ours, two peers and the floor, in two minutes."""
    acts: MaybePlace = None
    """Train on these activations, a .npy matrix rows x d_in; none means synthetic mixtures."""
    peers_python: MaybePlace = None
    """Interpreter of the environment that holds the peers; none means this one."""
    timeout: Number = 600.0
    """Seconds after which a silent worker is ended."""
    out: MaybePlace = None
    """Directory for results.csv, steps.csv, bench.json and pictures; none means only to print."""
    common: CommonFlags = Common()
    """Flags of every command."""


def run(flags: Flags, ui: UI) -> dict[str, Any]:
    """Run the benchmark and return its tables."""
    cfg = config(flags)
    from wsae.experiments.bench.run import run_bench

    if not flags.dtype and "bfloat16" not in cfg.dtypes and not flags.quick:
        ui.note("bfloat16 is left out: this processor emulates it; --dtype bfloat16 measures it")
    return run_bench(cfg, flags.out, ui.progress, ui.note)


def config(flags: Flags) -> "BenchConfig":
    """Return the run these flags describe; raises UserError in one line."""
    from wsae.experiments.bench.config import BenchConfig

    _check(flags)
    data: dict[str, Any] = {
        "sizes": sizes(flags),
        "dtypes": tuple(dict.fromkeys(flags.dtype)) or native_dtypes(),
        "threads": tuple(dict.fromkeys(flags.threads)),
        "only": flags.only,
        "lr": flags.lr or None,
        "fit_steps": flags.fit_steps,
        "families": flags.families and not flags.only,
        "kinds": flags.kinds,
        "scaling": flags.scaling,
        "acts": None if flags.acts is None else str(flags.acts),
        "peers_python": None if flags.peers_python is None else str(flags.peers_python),
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
    return BenchConfig.parse(data, where="flags")


def native_dtypes() -> tuple[str, ...]:
    """Return the number formats this processor multiplies without emulation."""
    from wsae.experiments.bench.run import BF16, processor

    return ("float32", "bfloat16") if processor()[1] & BF16 else ("float32",)


def sizes(flags: Flags) -> "list[Size]":
    """Return the named sizes, or the one of the flags' own."""
    from wsae.experiments.bench.config import SIZES, Size

    shape = {key: value for key, value in flags.shape.to_dict().items() if value is not None}
    names = ["B"] if flags.quick or shape else list(dict.fromkeys(flags.size))
    changed = {**shape, **({"name": "custom"} if shape else {})}
    changed |= QUICK_ROUNDS if flags.quick else {}
    changed |= {} if flags.rounds is None else {"rounds": flags.rounds}
    return [Size.parse({**SIZES[name].to_dict(), **changed}, where="size") for name in names]


def show(result: dict[str, Any], ui: UI) -> None:
    """Print a table per block, the machine's primitives, exponents, and where the files are."""
    for block in result["blocks"]:
        ui.table(block["title"], *speed(block))
        for line in block["failed"]:
            ui.say(f"failed: {line}")
        ui.say("")
    for title, block in _measured_limits(result).items():
        ui.table(title, *primitives(block))
        ui.say("")
    if result["scaling"]:
        ui.table("how cost grows", *scaling(result["scaling"]))
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


def _measured_limits(result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return, for each size and number of threads, the first block that timed the primitives."""
    found: dict[str, dict[str, Any]] = {}
    for block in result["blocks"]:
        if block["primitives"] and block["rows"]:
            row = block["rows"][0]
            title = f"primitives, size {row['size']}, threads {row['threads']}"
            found.setdefault(title, block)
    return found


def _check(flags: Flags) -> None:
    from wsae.experiments.bench.config import OURS, PEERS

    device = flags.common.device
    if device not in ("auto", "cpu"):
        raise UserError(f"--device {device}: wsae bench measures CPUs; use --device cpu")
    if flags.acts is not None and not Path(flags.acts).is_file():
        raise UserError(f"--acts {flags.acts}: no such file")
    known = [variant.name for variant in (*OURS, *PEERS)]
    for name in flags.only:
        if name not in known:
            raise UserError(f"--only {name}: no such variant; there are {', '.join(known)}")
    for flag in ("size", "threads"):
        if not getattr(flags, flag):
            raise UserError(f"--{flag}: give at least one")
