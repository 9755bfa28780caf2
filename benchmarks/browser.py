"""How fast is the feature browser? Index time and size, latency of every kind of page, memory of the server.

    python benchmarks/browser.py                        # 50,000 latents of width 576, vocabulary 49,152
    python benchmarks/browser.py --latents 10000 --out browser.json

The run is synthetic: random decoders, one member and its plain twin, contexts for 2,000 latents of each. Latency is
measured from outside, over HTTP on the loopback interface, one request at a time; memory is the server's own.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import numpy as np
import torch

from wsae.core.artifact import write_manifest
from wsae.core.files import write_json, write_text
from wsae.core.tensors import save_tensors
from wsae.sae import SAE, SAEConfig, TopK
from wsae.serve import build
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.serve.model import Unembedding, promoted

HOOK, MEMBERS, STORED, VOCABULARY = "layers.9", ("plain", "variance-a1"), 2000, 49_152
WORDS = [f" w{i}" for i in range(3000)]


def write_run(path: Path, latents: int, width: int) -> Path:
    """Write an evaluated run of random members."""
    rng = np.random.default_rng(0)
    arrays: dict[str, torch.Tensor] = {}
    contexts: dict[str, list] = {}
    path.mkdir(parents=True)
    for seed, name in enumerate(MEMBERS):
        cfg = SAEConfig(d_in=width, d_sae=latents, activation=TopK(k=32))
        SAE(cfg, seed).save(path / "members" / HOOK / name)
        density = 10 ** rng.normal(-3, 0.8, latents).clip(-6, -0.1) * (rng.random(latents) > 0.02)
        found = {
            "density": density,
            "variance": density * 2,
            "decoder_max_cosine": rng.random(latents),
            "match_index": rng.integers(0, latents, latents),
            "match_cosine": rng.random(latents),
        }
        arrays |= {f"{HOOK}|{name}|{k}": torch.from_numpy(v) for k, v in found.items()}
        contexts[name] = [
            entry(rng, int(i)) for i in rng.choice(latents, min(STORED, latents), False)
        ]
    gamma = {
        HOOK: {n: {"rule": "none" if n == "plain" else "variance", "alpha": 1.0} for n in MEMBERS}
    }
    write_json(path / "config.json", {"source": {"hooks": [HOOK]}})
    write_json(path / "gamma.json", gamma)
    write_text(path / "metrics.jsonl", "")
    files = ["config.json", "gamma.json", "metrics.jsonl"]
    write_manifest(path, "run", {}, files, info={"members": {HOOK: list(MEMBERS)}})
    place = path / "evaluation"
    metrics = {
        name: {"metrics": {"fvu": {"value": 0.2, "low": 0.19, "high": 0.21}}} for name in MEMBERS
    }
    record = {
        "heldout_tokens": 65_536,
        "heldout_sequences": 256,
        "hooks": {HOOK: {"members": metrics}},
    }
    write_json(place / "evaluation.json", record)
    write_text(place / "contexts.json", json.dumps({HOOK: contexts}))
    save_tensors(place / "arrays.safetensors", arrays)
    write_manifest(
        place, "evaluation", {}, ["evaluation.json", "contexts.json", "arrays.safetensors"]
    )
    return path


def entry(rng: np.random.Generator, latent: int) -> dict:
    """Return a latent with eight contexts of 24 tokens."""
    contexts = [
        {
            "tokens": [WORDS[i] for i in rng.integers(0, len(WORDS), 24)],
            "acts": [round(float(a), 3) for a in rng.gamma(2, 2, 24) * (rng.random(24) < 0.2)],
            "peak": 12,
            "seq": int(rng.integers(0, 256)),
        }
        for _ in range(8)
    ]
    return {
        "latent": latent,
        "density": 0.001,
        "variance": 0.1,
        "max": 12.0,
        "match": None,
        "contexts": contexts,
    }


def pages(latents: int, rng: np.random.Generator) -> dict[str, list[str]]:
    """Return addresses by kind of page."""
    some = [int(i) for i in rng.integers(0, latents, 40)]
    words = [f"w{i}" for i in rng.integers(0, len(WORDS), 40)]
    return {
        "overview": ["/"] * 20,
        "latent": [f"/r/run/variance-a1/{i}" for i in some],
        "latent in a sorted list": [f"/r/run/variance-a1/{i}?sort=-density" for i in some],
        "list by number, any page": [f"/r/run/plain?page={1 + i // 50}" for i in some],
        "list sorted": [f"/r/run/plain?sort=-gamma&page={1 + i // 50}" for i in some],
        "list filtered and sorted": [
            f"/r/run/all?sort=-match&alive=yes&min.density=0.001&page={1 + i // 500}" for i in some
        ],
        "search": [f"/r/run/all?q={w}" for w in words],
        "search, sorted, common": [f"/r/run/all?q={w[:3]}&sort=-density" for w in words],
    }


def rss(pid: int) -> float:
    """Return a process's resident memory in MB."""
    (line,) = (
        x for x in Path(f"/proc/{pid}/status").read_text().splitlines() if x.startswith("VmRSS")
    )
    return int(line.split()[1]) / 1000


def measure(root: str, latents: int) -> list[dict]:
    """Ask every page, one at a time, and return quantiles in milliseconds."""
    rows = []
    for kind, addresses in pages(latents, np.random.default_rng(1)).items():
        took = []
        for address in addresses:
            begin = time.perf_counter()
            with urllib.request.urlopen(root + address, timeout=120) as reply:
                reply.read()
            took.append(1000 * (time.perf_counter() - begin))
        p50, p95 = statistics.median(took), float(np.quantile(took, 0.95))
        rows.append(
            {"page": kind, "requests": len(took), "p50_ms": round(p50, 1), "p95_ms": round(p95, 1)}
        )
        print(rows[-1], flush=True)
    return rows


def logits_seconds(run: Path, width: int, latents: int) -> float:
    """Return what the promoted tokens of one member take, measured on 4,096 of its latents."""
    W = SAE.load(run / "members" / HOOK / "plain").W_dec[:4096]
    out = Unembedding(torch.randn(VOCABULARY, width), "random")
    begin = time.perf_counter()
    for _ in promoted(W, out, 10):
        pass
    return (time.perf_counter() - begin) * latents / len(W)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--latents", type=int, default=50_000)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = write_run(Path(folder) / "run", args.latents, args.width)
        result: dict = {"latents": args.latents, "members": len(MEMBERS), "width": args.width}
        result["logits_s_per_member"] = round(logits_seconds(run, args.width, args.latents), 1)
        cfg = IndexConfig()
        assert build.identity(run, cfg)
        begin = time.perf_counter()
        index, _ = ensure_index(run, None, cfg)
        result["index_s"] = round(time.perf_counter() - begin, 1)
        result["index_mb"] = round(index.stat().st_size / 1e6, 1)
        begin = time.perf_counter()
        ensure_index(run, None, cfg)
        result["found_again_s"] = round(time.perf_counter() - begin, 3)
        print(result, flush=True)
        start = "from wsae.cli.main import main; raise SystemExit(main())"
        command = [sys.executable, "-c", start, "serve", str(run), "--port", "0"]
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        try:
            assert process.stderr is not None
            line = next(line for line in process.stderr if "serving" in line)
            threading.Thread(target=process.stderr.read, daemon=True).start()
            root = line.split(" on ")[1].split(" ")[0].rstrip("/")
            with urllib.request.urlopen(root, timeout=120) as reply:
                reply.read()
            result["rss_first_mb"] = round(rss(process.pid))
            result["pages"] = measure(root, args.latents)
            result["rss_after_mb"] = round(rss(process.pid))
        finally:
            process.terminate()
            process.wait(60)
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
