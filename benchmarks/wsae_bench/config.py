"""What `wsae bench` measures, as values: sizes, variants, and the blocks of jobs that alternate. No torch here."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from wsae.core.config import Config
from wsae.sae.config import KINDS

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

    @model_validator(mode="after")
    def _k_fits(self) -> "Size":
        if self.k > self.d_sae:
            raise ValueError(f"k = {self.k} active latents of only d_sae = {self.d_sae}")
        return self


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
    kind: str = "topk"
    """The kind of SAE that it trains."""
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
        kind="group_topk",
        adam=False,
    ),
    Variant(name="dl-topk", library="dictionary-learning", settings={"trainer": "top_k"}),
    Variant(
        name="dl-batchtopk",
        library="dictionary-learning",
        settings={"trainer": "batch_top_k"},
        kind="batch_topk",
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
_PENALTIES: dict[str, dict[str, Any]] = {
    "relu": {"l1": 0.01},
    "gated": {"l1": 0.01},
    "jumprelu": {"l0": 0.01},
}
"""What a kind is sparse by, where it is not by its k."""


def _other(name: str, library: str, kind: str, **settings: object) -> Variant:
    return Variant(name=name, library=library, kind=kind, settings=settings)


_DL, _LENS = "dictionary-learning", "sae-lens"
PEERS_OF_KINDS = (
    _other("sparsify-multi", "eai-sparsify", "multi_topk", optimizer="signum", multi_topk=True),
    _other("dl-matryoshka", _DL, "matryoshka", trainer="matryoshka"),
    _other("dl-standard", _DL, "relu", trainer="standard"),
    _other("dl-gated", _DL, "gated", trainer="gated"),
    _other("dl-jumprelu", _DL, "jumprelu", trainer="jumprelu"),
    _other("saelens-batchtopk", _LENS, "batch_topk", sae="batchtopk"),
    _other("saelens-matryoshka", _LENS, "matryoshka", sae="matryoshka_batchtopk"),
    _other("saelens-standard", _LENS, "relu", sae="standard"),
    _other("saelens-gated", _LENS, "gated", sae="gated"),
    _other("saelens-jumprelu", _LENS, "jumprelu", sae="jumprelu"),
)
"""Peers' trainers of the other kinds, for the comparison by kind alone."""
FAMILIES = (1, 2, 4)
FACTORS: dict[Axis, tuple[float, ...]] = {
    "d_sae": (0.5, 1, 2, 4),
    "k": (0.25, 0.5, 1, 2, 4),
    "batch": (0.25, 0.5, 1, 2, 4),
    "members": (1, 2, 4, 8),
}
"""One of these is varied at a time, to see how the trainer's time and memory grow."""


def of_kind(kind: str) -> list[Variant]:
    """Return what trains a kind of SAE: wsae, with compiled kernels and without, and every peer that has it."""
    settings = {"activation": kind, **_PENALTIES.get(kind, {})}
    ours = [v.model_copy(update={"settings": v.settings | settings, "kind": kind}) for v in OURS]
    return [*ours, *(peer for peer in (*PEERS, *PEERS_OF_KINDS) if peer.kind == kind)]


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
    """Measure every kind of SAE too, beside the peers that have it."""
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

    def here(variants: Iterable[Variant]) -> list[Variant]:
        able = {v.name for v in OURS if native or v.settings["kernels"] != "native"}
        found = [v for v in variants if v.library in installed or v.name in able]
        return [v for v in found if not cfg.only or v.name in cfg.only]

    main = here([*OURS, *PEERS])
    found: list[Block] = []
    for size in cfg.sizes:
        for threads in cfg.threads:
            for dtype in cfg.dtypes:
                found.append(_block("speed", size, [FLOOR, *main], dtype, threads))
        if cfg.families:
            every = [family(n, f"members-{n}") for n in FAMILIES]
            found.append(_block("families", size, [FLOOR, *every], cfg.dtypes[0], cfg.threads[0]))
        for kind in KINDS if cfg.kinds else ():
            if of := here(of_kind(kind)):
                found.append(_block("kinds", size, of, cfg.dtypes[0], cfg.threads[0]))
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
    of = f" {variants[-1].kind}" if kind == "kinds" else ""
    title = (
        f"{kind}{of}, size {size.name}: d_in {size.d_in}, d_sae {size.d_sae:,}, k {size.k}, batch {size.batch:,}; "
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
