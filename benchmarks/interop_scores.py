"""The same SAE scored by wsae and by the library at the other end, on the same held-out rows, both ways.

    pip install -e '.[interop]'      (in an environment of its own: they pin older libraries)
    python benchmarks/interop_scores.py RUN STORE --hook layers.9 --members plain variance-a1 plain-group --out DIR

First SAEs of a run are exported and opened with `SAE.load_from_disk`, `SparseCoder.load_from_disk` and
`load_dictionary`. Then a Top-k and a batch Top-k SAE are trained by SAELens' own training classes on the store's rows,
saved as it saves them, and imported here. Each line: FVU and L0 from the library's encode and decode, from ours, and
the largest difference of a latent. Exit code 1 when FVU differs by more than 1e-5 or L0 by more than 1e-3.
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from wsae import SAE, UserError
from wsae.acts.store import Store
from wsae.interop import load, save
from wsae.interop.saes import about_member

Pair = tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


@torch.no_grad()
def scores(
    x: Tensor, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor]
) -> tuple[float, float]:
    """Return FVU about the mean and L0, in fp64 sums."""
    mean = x.double().mean(0)
    error = total = active = 0.0
    for part in x.split(2048):
        z = encode(part)
        error += float((part - decode(z)).double().square().sum())
        total += float((part - mean).double().square().sum())
        active += float((z != 0).sum())
    return error / total, active / len(x)


@torch.no_grad()
def largest(x: Tensor, a: Callable[[Tensor], Tensor], b: Callable[[Tensor], Tensor]) -> float:
    return max(float((a(part) - b(part)).abs().max()) for part in x.split(2048))


def upstream(name: str, folder: Path) -> Pair:
    """Open a folder with the library itself."""
    if name == "saelens":
        from sae_lens import SAE

        sae = SAE.load_from_disk(folder)
        return sae.encode, sae.decode
    if name == "sparsify":
        from sparsify import SparseCoder

        coder = SparseCoder.load_from_disk(folder)

        def encode(x: Tensor) -> Tensor:
            found = coder.encode(x)
            return torch.zeros(len(x), coder.num_latents).scatter(
                1, found.top_indices, found.top_acts
            )

        return encode, lambda z: coder.decode(*z.topk(coder.cfg.k, dim=1))
    from dictionary_learning.utils import load_dictionary

    loaded, _ = load_dictionary(str(folder), "cpu")
    return loaded.encode, loaded.decode


def line(what: str, x: Tensor, theirs: Pair, ours: SAE) -> bool:
    """Print both scores; returns whether they agree."""
    there, here = scores(x, *theirs), scores(x, ours.encode, ours.decode)
    gap = largest(x[:8192], theirs[0], ours.encode)
    print(
        f"{what:44} {there[0]:.6f} {here[0]:.6f}   {there[1]:8.3f} {here[1]:8.3f}   {gap:.1e}",
        flush=True,
    )
    return abs(there[0] - here[0]) <= 1e-5 and abs(there[1] - here[1]) <= 1e-3


def train_in_saelens(kind: str, store: Store, hook: str, steps: int, out: Path) -> Path:
    """Train with SAELens' own class on the store's rows and save as its runner does."""
    from sae_lens.registry import get_sae_training_class
    from sae_lens.saes.sae import TrainStepInput

    torch.manual_seed(0)
    width = store.hooks[hook]
    cls, config = get_sae_training_class(kind)
    sae = cls(
        config(
            d_in=width,
            d_sae=4 * width,
            k=32,
            dtype="float32",
            device="cpu",
            normalize_activations="none",
        )
    )
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-3, betas=(0.9, 0.999))
    rows = np.random.default_rng(0)
    sae.b_dec.data = store.rows("train", np.arange(8192))[hook].mean(0)
    for step in range(steps):
        x = store.rows("train", rows.integers(0, store.n_rows["train"], 1024))[hook]
        loss = sae.training_forward_pass(TrainStepInput(x, {}, None, step, False)).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(sae.parameters(), 1.0)
        optimizer.step()
    sae.save_inference_model(out)
    return out


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("--hook", default="layers.9")
    parser.add_argument("--members", nargs="+", default=["plain"])
    parser.add_argument("--rows", type=int, default=32_768)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    store = Store(args.store, (args.hook,), verify=False)
    x = store.rows("heldout", np.arange(min(args.rows, store.n_rows["heldout"])))[args.hook]
    print(f"{len(x):,} held-out rows\n{'':44} FVU there, here       L0 there, here     latents")
    agree = []
    for member in args.members:
        sae = SAE.load(args.run / "members" / args.hook / member)
        for name in ("saelens", "sparsify", "dictionary_learning"):
            folder = args.out / name / member
            shutil.rmtree(folder, ignore_errors=True)
            try:
                save(sae, folder, name, about_member(args.run, args.hook, member))
            except UserError as error:
                print(f"{member + ' -> ' + name:44} refused: {error}")
                continue
            agree.append(line(f"{member} -> {name}", x, upstream(name, folder), sae))
    for kind in ("topk", "batchtopk"):
        folder = train_in_saelens(kind, store, args.hook, args.steps, args.out / f"trained-{kind}")
        agree.append(
            line(
                f"{kind} of SAELens, {args.steps} steps -> wsae",
                x,
                upstream("saelens", folder),
                load(folder).sae,
            )
        )
    return 0 if all(agree) else 1


if __name__ == "__main__":
    sys.exit(main())
