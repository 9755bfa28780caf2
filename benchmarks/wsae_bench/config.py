"""What `wsae bench` measures, as values: sizes, variants, and the blocks of jobs that alternate. No torch here."""

from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from wsae.core.config import Config

Dtype = Literal["float32", "bfloat16"]
Kind = Literal["speed", "fit", "families", "kinds", "scaling"]
Axis = Literal["d_sae", "k", "batch", "members"]
PINS = {
    "eai-sparsify": "1.3.3",
    "dictionary-learning": "0.1.0",
    "sae-lens": "6.54.12",
    "overcomplete": "0.3.0",
}
"""PyPI names of the peers and the versions the drivers were written for."""
LIMITS = "floor"
"""Name of the job that times the machine's primitives."""
HELDOUT = 4096
"""Rows on which every FVU is taken."""


class Size(Config):
    """Shape of an SAE and of its batches, and how often a variant steps at it."""

    name: str
    d_in: PositiveInt
    d_sae: PositiveInt
    k: PositiveInt
    batch: PositiveInt
    warmup: PositiveInt = 2
    """Steps before the measured ones."""
    rounds: PositiveInt = 6
    turn: PositiveInt = 3
    """Steps of one variant in a round, while the others idle."""


SIZES = {
    "A": Size(name="A", d_in=768, d_sae=24576, k=32, batch=4096, warmup=1, rounds=3, turn=1),
    "B": Size(name="B", d_in=576, d_sae=4608, k=32, batch=2048),
}


class Variant(Config):
    """One way to train: a library and how it is driven."""

    name: str
    library: str
    """wsae, limits, or a peer's name on PyPI."""
    settings: dict[str, Any] = {}
    """What its driver reads."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    adam: bool = True
    """Whether it trains with Adam, so that a common learning rate compares like with like."""


class Job(Config):
    """A variant at one size, dtype and number of threads."""

    name: str
    variant: Variant
    size: Size
    dtype: Dtype = "float32"
    threads: PositiveInt = 1
    lr: PositiveFloat | None = None
    """None means the library's own default."""


class Block(Config):
    """Jobs that alternate, all as often as their sizes say; ratios are taken within it."""

    kind: Kind
    title: str
    jobs: tuple[Job, ...] = Field(min_length=1)

    @property
    def size(self) -> Size:
        """The first job's size: how often all of them step."""
        return self.jobs[0].size

    @property
    def steps(self) -> int:
        """Steps of every job."""
        return self.size.warmup + self.size.rounds * self.size.turn


PEERS = (
    Variant(
        name="sparsify-signum",
        library="eai-sparsify",
        settings={"optimizer": "signum"},
        adam=False,
    ),
    Variant(name="sparsify-adam", library="eai-sparsify", settings={"optimizer": "adam"}),
    Variant(
        name="sparsify-groupmax",
        library="eai-sparsify",
        settings={"optimizer": "signum", "activation": "groupmax"},
        adam=False,
    ),
    Variant(name="dl-topk", library="dictionary-learning", settings={"trainer": "top_k"}),
    Variant(
        name="dl-batchtopk", library="dictionary-learning", settings={"trainer": "batch_top_k"}
    ),
    Variant(name="saelens", library="sae-lens"),
    Variant(
        name="saelens-sparse",
        library="sae-lens",
        settings={"sparse": True},
        dtypes=("float32",),  # torch.sparse.mm knows no bf16 there
    ),
    Variant(name="overcomplete", library="overcomplete"),
)
OURS = (
    Variant(name="wsae", library="wsae", settings={"kernels": "native"}),
    Variant(name="wsae-eager", library="wsae", settings={"kernels": "eager"}),
)
FLOOR = Variant(name=LIMITS, library="limits")
_KINDS: dict[str, dict[str, Any]] = {
    "topk": {},
    "group_topk": {},
    "batch_topk": {},
    "relu": {"l1": 0.01},
    "jumprelu": {"l0": 0.01},
}
FAMILIES = (1, 2, 4)
FACTORS: dict[Axis, tuple[float, ...]] = {
    "d_sae": (0.5, 1, 2, 4),
    "k": (0.25, 0.5, 1, 2, 4),
    "batch": (0.25, 0.5, 1, 2, 4),
    "members": (1, 2, 4, 8),
}
"""One of these is varied at a time, to see how the trainer's time and memory grow."""


def kinds() -> list[Variant]:
    """Return every activation function, with and without compiled kernels."""
    return [
        Variant(
            name=f"{kind}{'' if kernels == 'native' else '-eager'}",
            library="wsae",
            settings={"kernels": kernels, "activation": kind, **penalty},
        )
        for kind, penalty in _KINDS.items()
        for kernels in ("native", "eager")
    ]


def family(n: int, name: str) -> Variant:
    """Return the training of n members over the same batches."""
    return Variant(name=name, library="wsae", settings={"kernels": "auto", "members": n})


class BenchConfig(Config):
    """One run of `wsae bench`."""

    sizes: tuple[Size, ...] = (SIZES["A"], SIZES["B"])
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16")
    threads: tuple[PositiveInt, ...] = (1,)
    """Threads of every worker; each number is measured in turn."""
    only: tuple[str, ...] = ()
    """Measure these variants only (wsae, wsae-eager, sparsify-signum, dl-topk, saelens ...)."""
    lr: PositiveFloat | None = 2e-3
    """Learning rate of every Adam in the blocks that compare fits; None leaves these out."""
    fit_steps: PositiveInt = 60
    """Steps after which fits are compared."""
    families: bool = True
    """Measure what 2 and 4 members cost beside one."""
    kinds: bool = False
    """Measure every activation function too."""
    scaling: bool = False
    """Instead measure how our time and memory grow with d_sae, k, batch and members."""
    acts: Path | None = None
    """Train on these activations, a .npy matrix rows x d_in; default: synthetic mixtures."""
    peers_python: Path | None = None
    """Interpreter of the environment that holds the peers; default: this one."""
    timeout_s: PositiveFloat = 600.0
    """A worker that is silent for longer is ended."""
    seconds: PositiveFloat | None = None
    """Begin no round after this long."""
    seed: int = Field(default=0, ge=0)


def blocks(cfg: BenchConfig, installed: set[str], native: bool = True) -> list[Block]:
    """Return what to measure, in order, with the peers that are installed; compiled kernels only if `native`."""
    peers = [peer for peer in PEERS if peer.library in installed]
    ours = [v for v in OURS if native or v.settings["kernels"] != "native"]
    main = [v for v in (*ours, *peers) if not cfg.only or v.name in cfg.only]
    found: list[Block] = []
    for size in cfg.sizes:
        for threads in cfg.threads:
            for dtype in cfg.dtypes:
                found.append(_block("speed", size, [FLOOR, *main], dtype, threads))
        if cfg.families:
            every = [family(n, f"members-{n}") for n in FAMILIES]
            found.append(_block("families", size, [FLOOR, *every], cfg.dtypes[0], cfg.threads[0]))
        if cfg.kinds:
            possible = [v for v in kinds() if native or v.settings["kernels"] != "native"]
            everything = [FLOOR, *possible]
            found += [
                _block("kinds", size, everything, dtype, cfg.threads[0]) for dtype in cfg.dtypes
            ]
    if cfg.lr is not None:
        found.append(_fit(cfg, main))
    return found


def _block(
    kind: Kind,
    size: Size,
    variants: list[Variant],
    dtype: Dtype,
    threads: int = 1,
    lr: float | None = None,
) -> Block:
    jobs = tuple(
        Job(name=v.name, variant=v, size=size, dtype=dtype, threads=threads, lr=lr)
        for v in variants
        if dtype in v.dtypes
    )
    words = {"fit": f", lr {lr:g} for every Adam" if lr else ""}.get(kind, "")
    title = (
        f"{kind}, size {size.name}: d_in {size.d_in}, d_sae {size.d_sae:,}, k {size.k}, batch {size.batch:,}; "
        f"{dtype}, {threads} thread{'s' if threads > 1 else ''}{words}"
    )
    return Block(kind=kind, title=title, jobs=jobs)


def _fit(cfg: BenchConfig, variants: list[Variant]) -> Block:
    """Return the comparison of fits: every Adam at one learning rate, at the size that takes the least time."""
    size = min(cfg.sizes, key=lambda s: s.d_in * s.d_sae * s.batch)
    rounds = -(-max(1, cfg.fit_steps - size.warmup) // size.turn)
    longer = size.model_copy(update={"rounds": rounds})
    adams = [v for v in variants if v.adam]
    return _block("fit", longer, [FLOOR, *adams], cfg.dtypes[0], cfg.threads[0], cfg.lr)


def scaling_blocks(cfg: BenchConfig) -> list[Block]:
    """Return one block for each axis, around the last size."""
    size, rest = cfg.sizes[-1], {"dtype": cfg.dtypes[0], "threads": cfg.threads[0]}
    found = []
    for axis, factors in FACTORS.items():
        jobs = []
        for factor in factors:
            members = int(factor) if axis == "members" else 1
            changed = {} if axis == "members" else {axis: max(1, int(getattr(size, axis) * factor))}
            variant = family(members, f"{axis}={changed.get(axis, members)}")
            at = size.model_copy(update=changed)
            jobs.append(Job(name=variant.name, variant=variant, size=at, **rest))
        title = f"scaling with {axis}, around size {size.name}; {cfg.dtypes[0]}"
        found.append(Block(kind="scaling", title=title, jobs=tuple(jobs)))
    return found
