"""How much augmentation costs: pretraining steps with it, against the same steps on views made beforehand.

    python benchmarks/pretrain.py [--preset small] [--images digits] [--steps 3] [--rounds 7] [--threads 2]

Short rounds of the two take turns, so that whatever else the machine does meets both alike. Prints medians, and the
speed with augmentation as a share of the speed without (wanted: 0.85 or more), as JSON.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from wsae.acts.config import ImagesConfig
from wsae.acts.images.sets import ArrayImages, ImageSet, open_images
from wsae.vision.config import PRESETS, preset
from wsae.vision.data import make_data
from wsae.vision.pretrain import Pretrainer


def noise(size: int, grey: bool, n: int = 2048) -> ArrayImages:
    """Images in memory with nothing on them: time does not depend on what they show."""
    shape = (n, size, size) if grey else (n, size, size, 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return ArrayImages(pixels, np.arange(n) % 10, tuple("0123456789"), "noise")


def timed(work: Callable[[], None]) -> float:
    """Seconds that a call takes, what it started on a GPU included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    begin = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(job: Pretrainer, steps: int, rounds: int) -> dict[str, float | list[float]]:
    """Alternate rounds of steps with fresh views and with ready ones."""
    fresh = iter(job.batches(0))
    ready = itertools.cycle([next(fresh) for _ in range(2)])
    numbers = itertools.count()

    def take(source: "itertools.cycle | object") -> None:
        for _ in range(steps):
            index, views = next(source)  # type: ignore[call-overload]
            job.step(views, job.labels(index), next(numbers))

    take(ready)  # memory and kernels are chosen in the first steps
    times: dict[str, list[float]] = {"augmented": [], "ready": []}
    for _ in range(rounds):
        times["augmented"].append(timed(lambda: take(fresh)))
        times["ready"].append(timed(lambda: take(ready)))
    images = steps * job.per_step
    shares = [b / a for a, b in zip(times["augmented"], times["ready"], strict=True)]
    return {
        "images_per_s": images / statistics.median(times["augmented"]),
        "images_per_s_ready": images / statistics.median(times["ready"]),
        "share": statistics.median(shares),
        "shares": [round(s, 3) for s in shares],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="small", choices=list(PRESETS))
    parser.add_argument(
        "--images", help="any IMAGES of `wsae pretrain`; by default noise in memory"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    for name, default in (("batch", 0), ("steps", 3), ("rounds", 7), ("threads", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    size = PRESETS[args.preset].get("size", 32)
    where = ImagesConfig(path=args.images or "noise", size=size, workers=args.workers)
    changes = {"batch_size": args.batch} if args.batch else {}
    cfg = preset(args.preset, images=where, epochs=10_000, warmup_epochs=1, **changes)
    grey = args.preset in ("small", "tiny")
    images: ImageSet = open_images(where) if args.images else noise(size, grey)
    found = measure(Pretrainer(cfg, make_data(cfg, images), args.device), args.steps, args.rounds)
    print(json.dumps({**vars(args), **found}))


if __name__ == "__main__":
    main()
