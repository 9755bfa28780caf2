"""A harvested store: checked when opened, memory-mapped, rows gathered from any shards in any order."""

from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from wsae.acts.names import among
from wsae.acts.tally import SourceStats, Tally
from wsae.acts.tokens import Texts, TokenTable, likely_ends, texts_of
from wsae.core.artifact import MANIFEST, read_manifest
from wsae.core.errors import UserError, nearest, understood
from wsae.core.files import read_json
from wsae.core.tensors import MappedTensor, load_tensors

IMAGES = "images.safetensors"
STATS = "stats.safetensors"
TOKENS = "tokens.json"
SPLITS = ("train", "heldout")


class Store:
    """A finished harvest on disk.

    `hooks` {name: d_in}, `n_rows` {split: rows}, `info` (what the manifest says). Raises UserError when a file is
    missing, cut, altered or foreign; `verify=False` checks sizes but not checksums (stores of hundreds of gigabytes).
    """

    def __init__(
        self, path: Path | str, hooks: tuple[str, ...] | None = None, verify: bool = True
    ) -> None:
        self.path = Path(path)
        self.manifest = read_manifest(self.path, "store", verify)
        self.info = self.manifest.info
        with understood(self.path / MANIFEST):
            self.hooks: dict[str, int] = _chosen(self.info["hooks"], hooks, self.path)
            self.n_rows: dict[str, int] = {split: int(self.info["rows"][split]) for split in SPLITS}
            self._shards: dict[str, list[int]] = {
                split: [int(n) for n in self.info["shard_rows"][split]] for split in SPLITS
            }
            self._check_sums()
        self._maps = {
            (split, hook): self._open(split, hook) for split in SPLITS for hook in self.hooks
        }

    def _check_sums(self) -> None:
        """Raise ValueError unless there are hooks, and shards that add up to the rows."""
        if not self.hooks:
            raise ValueError("no hooks")
        for split, sizes in self._shards.items():
            if sum(sizes) != self.n_rows[split] or min(sizes, default=0) < 0:
                raise ValueError(f"shards of {sizes} rows for {self.n_rows[split]}")

    def rows(
        self, split: str, index: Int[np.ndarray, " rows"]
    ) -> dict[str, Float[Tensor, "rows _"]]:
        """Return the rows of a split at any positions, in that order, as float32 for every hook."""
        order = np.argsort(index, kind="stable")
        ordered = index[order]
        bounds = np.concatenate([[0], np.cumsum(self._shards[split], dtype=np.int64)])
        cuts = np.searchsorted(ordered, bounds)
        out = {hook: np.empty((len(index), d_in), np.float32) for hook, d_in in self.hooks.items()}
        for shard, (first, lo, hi) in enumerate(zip(bounds, cuts, cuts[1:], strict=False)):
            if hi > lo:
                for hook, rows in out.items():
                    rows[order[lo:hi]] = self._maps[split, hook][shard].take(ordered[lo:hi] - first)
        return {hook: torch.from_numpy(rows) for hook, rows in out.items()}

    def places(self, split: str) -> tuple[Int[Tensor, " rows"], Int[Tensor, " rows"]]:
        """Return sequence number and position of every row of a split (int64)."""
        hook = next(iter(self.hooks))
        shards = [
            load_columns(self._shard(split, hook, k), ("seq", "pos"))
            for k in range(len(self._shards[split]))
        ]
        empty = torch.empty(0, dtype=torch.long)
        return (
            torch.cat([empty, *(s["seq"].long() for s in shards)]),
            torch.cat([empty, *(s["pos"].long() for s in shards)]),
        )

    @property
    def of_images(self) -> bool:
        """Whether rows come from images, so that a sequence's number is an image's."""
        return self.info.get("kind") == "images"

    def labels(self, split: str) -> Int[Tensor, " rows"] | None:
        """Return the class of every row of a split (int64), or none where rows have none."""
        if not self.of_images or not self.info.get("labelled"):
            return None
        found = load_tensors(self.path / split / IMAGES)
        place = torch.searchsorted(found["images"], self.places(split)[0])
        return found["labels"][place]

    def tokens(self, split: str = "heldout") -> TokenTable | None:
        """Return the token ids of a split's sequences and their strings; none for images."""
        if self.of_images:
            return None
        paths = [
            self.path / f"{split}/tokens-{k:05d}.safetensors"
            for k in range(len(self._shards[split]))
        ]
        parts, read = [load_tensors(path) for path in paths], read_json(self.path / TOKENS)
        with understood(self.path / MANIFEST):
            first = torch.empty(0, int(self.info["seq_len"]), dtype=torch.int32)
            ids = torch.cat([first, *(p["ids"] for p in parts)])
            lengths = torch.cat([torch.empty(0, dtype=torch.int32), *(p["lengths"] for p in parts)])
            strings = texts_of(read)
            return TokenTable(ids, lengths, strings, self._document_ends(strings))

    def _document_ends(self, strings: Texts) -> tuple[int, ...] | None:
        """Return the ids that end a document as noted, or in older stores as they read."""
        if "document_ends" in self.info:
            noted = self.info["document_ends"]
            return None if noted is None else tuple(int(i) for i in noted)
        return likely_ends(strings) if self.manifest.config.get("pack", True) else ()

    def stats(self) -> dict[str, SourceStats]:
        """Return the exact statistics of the training rows, taken while harvesting."""
        tensors = load_tensors(self.path / STATS)
        with understood(self.path / MANIFEST):
            counts = {**self.info["skipped"]["train"], "kept": self.n_rows["train"]}
            return Tally.restore(self.hooks, tensors, counts).result()

    def _shard(self, split: str, hook: str, number: int) -> Path:
        return self.path / f"{split}/{hook}/acts-{number:05d}.safetensors"

    def _open(self, split: str, hook: str) -> list[MappedTensor]:
        maps = []
        for number, rows in enumerate(self._shards[split]):
            path = self._shard(split, hook, number)
            if str(path.relative_to(self.path)) not in self.manifest.files:
                raise UserError(f"{path}: not listed in the manifest; harvest the store again")
            mapped = MappedTensor(path, "acts")
            if mapped.shape != (rows, self.hooks[hook]):
                raise UserError(
                    f"{path}: shape {mapped.shape} where the manifest says {(rows, self.hooks[hook])}"
                )
            maps.append(mapped)
        return maps


def load_columns(path: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    """Return a shard's small tensors without reading its rows."""
    return {name: MappedTensor(path, name).rows(slice(None)) for name in names}


def _chosen(available: dict[str, int], names: tuple[str, ...] | None, path: Path) -> dict[str, int]:
    chosen = []
    for name in names or tuple(available):
        hook = among(name, available)
        if hook is None:
            raise UserError(f"{path}: no hook {name!r} in this store{nearest(name, available)}")
        chosen.append(hook)
    return {hook: int(available[hook]) for hook in chosen}
