"""Images per second of a harvest beside the bare model on ready tensors, and peak memory for more and more images.

    python benchmarks/images.py                                   # ResNet-18, 32 x 32, an array in memory
    python benchmarks/images.py --files --size 224 --workers 2    # JPEG files, decoded by two processes

The bare side is the model, stopped at the hook, on tensors that are prepared already: no decoding, no disk. Sides
alternate; the ratio is the median of the rounds'. Peak memory is that of a fresh process, its children left out.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from wsae.acts.config import ImageHarvestConfig, ImagesConfig
from wsae.acts.hookpoints import probe
from wsae.acts.images.harvest import harvest_images
from wsae.acts.images.model import EncoderConfig, ImageEncoder, VisionModel, load_vision


class Stop(Exception):  # noqa: N818
    """Ends the bare model's pass at the hook, as a harvest does."""


class Clock:
    """A progress that notes when each batch was done."""

    def __init__(self) -> None:
        self.times: list[tuple[float, int]] = []

    def __call__(self, *_: object, **__: object):
        from contextlib import nullcontext

        return nullcontext(lambda n, **_: self.times.append((time.perf_counter(), n)))


def make_images(folder: Path, n: int, size: int, files: bool) -> Path:
    """Write n smooth random images, as JPEG files in class folders or as one uncompressed .npz."""
    rng = np.random.default_rng(0)
    if not files:
        path = folder / f"{n}.npz"
        images = rng.integers(0, 256, (n, size, size, 3), dtype=np.uint8)
        np.savez(path, images=images, labels=np.arange(n) % 10)
        return path
    root = folder / f"files-{n}"
    for i in range(n):
        place = root / f"class{i % 10}"
        place.mkdir(parents=True, exist_ok=True)
        small = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        small.resize((500, 375), Image.Resampling.BICUBIC).save(place / f"{i:06d}.jpg", quality=90)
    return root


def make_encoder(folder: Path, args: argparse.Namespace) -> Path:
    """Save an untrained ResNet-18 as `wsae pretrain` would."""
    torch.manual_seed(0)
    (folder / "encoder").mkdir()
    ImageEncoder(EncoderConfig(stem=args.stem, size=args.size)).save(folder / "encoder")
    return folder


def bare(vision: VisionModel, hook: str, batches: list[torch.Tensor]) -> float:
    """Return images per second of the model alone."""

    def stop(*_: object) -> None:
        raise Stop

    (point,) = probe(vision.model, [hook], vision.manner(*batches[0].shape[-2:])).hooks
    handle = vision.model.get_submodule(point.path).register_forward_hook(stop)
    start = time.perf_counter()
    with torch.inference_mode():
        for x in batches:
            with suppress(Stop):
                vision.model(pixel_values=x)
    seconds = time.perf_counter() - start
    handle.remove()
    return sum(len(x) for x in batches) / seconds


def harvested(vision: VisionModel | None, cfg: ImageHarvestConfig) -> float:
    """Return images per second of a harvest after its first batch."""
    clock = Clock()
    with tempfile.TemporaryDirectory() as folder:
        harvest_images(cfg, Path(folder) / "store", clock, vision)
    (first, _), *rest = clock.times
    return sum(n for _, n in rest) / (rest[-1][0] - first)


def peak_mebibytes(words: list[str], n: int, args: argparse.Namespace) -> float:
    """Return the peak resident memory of a fresh process that harvests n images."""
    with tempfile.TemporaryDirectory() as folder:
        path = make_images(Path(folder), n, args.size, args.files)
        command = [sys.executable, __file__, *words, "--peak", str(path)]
        return measured(command)


def measured(command: list[str]) -> float:
    """Return the number that a command prints."""
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    """Run the comparison the arguments ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--images", type=int, default=2_048)
    parser.add_argument("--size", type=int, default=32)
    parser.add_argument("--stem", default="small", choices=["imagenet", "small", "smallest"])
    parser.add_argument("--files", action="store_true", help="JPEG files of 500 x 375 pixels")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--peak", metavar="PATH", help="harvest these and print the peak in MiB")
    parser.add_argument("--memory", type=int, nargs="*", default=[1_024, 4_096])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        path = args.peak or make_images(place, args.images, args.size, args.files)
        cfg = ImageHarvestConfig(
            model=str(make_encoder(place, args)),
            images=ImagesConfig(path=str(path), workers=args.workers),
            heldout_fraction=0,
            batch_size=args.batch_size,
            shard_rows=512,
        )
        if args.peak:
            harvested(None, cfg)
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)
            return
        vision = load_vision(cfg.model)
        raw = torch.randint(0, 256, (args.images, 3, args.size, args.size), dtype=torch.uint8)
        batches = [vision.prepare(part) for part in raw.split(args.batch_size)]
        bare(vision, "pooler", batches[:2])  # warm-up
        pairs = [
            (bare(vision, "pooler", batches), harvested(vision, cfg)) for _ in range(args.rounds)
        ]
    words = ["--size", str(args.size), "--stem", args.stem, "--workers", str(args.workers)]
    words += ["--threads", str(args.threads)] + ["--files"] * args.files
    base, rate = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(
        json.dumps(
            {
                **{k: v for k, v in vars(args).items() if k not in ("peak", "memory")},
                "bare_images_per_s": round(base, 1),
                "harvest_images_per_s": round(rate, 1),
                "ratio": round(statistics.median(r / b for b, r in pairs), 4),
                "per_round": [[round(b, 1), round(r, 1)] for b, r in pairs],
                "peak_mib": {n: round(peak_mebibytes(words, n, args), 1) for n in args.memory},
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
