"""Tokens per second from text to a trained SAE, against sparsify and SAELens on the same model. Prints JSON.

    python benchmarks/end_to_end.py --peers-python /path/to/peers/bin/python        (about ten minutes on two cores)
    python benchmarks/end_to_end.py --sides wsae-float32 wsae-bfloat16              (no peer needed)

Everyone reads the same text with SmolLM2-135M up to block 9 and trains a Top-k SAE on the same number of rows in the
same batches with Adam at the same peak learning rate. One process at a time, sides in turn, medians over the rounds.
`startup_s` is imports, loading model and data; `train_s` all the rest until the SAE is there (wsae: tokenising,
statistics and the files of the run included); `process_s` the whole process but the final measurement. `fvu` is taken
on the same held-out activations (float32 model) by one formula, from each library's own reconstruction.
Without --sides the bfloat16 ones are left out where the CPU has no bfloat16 arithmetic (there they are slower).
sparsify runs every layer of the model it gets; "sparsify-cut" is given a model of the needed layers only.
"stored" is wsae in two stages: harvest to disk, then train from it.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

from end_to_end_peer import SIDES as PEERS
from end_to_end_peer import fvu, peak_mebibytes

WSAE = ("wsae", "wsae-stored")
PREPARE = "prepare"
KINDS = (*WSAE, *PEERS)
ALL = [f"{kind}-{dtype}" for dtype in ("float32", "bfloat16") for kind in KINDS]
SHOWN = ("startup_s", "train_s", "process_s", "tokens_per_s", "peak_mib", "fvu")


def harvest_config(job: dict[str, Any]):
    from wsae.acts.config import HarvestConfig

    return HarvestConfig(
        model=job["model"],
        hooks=(f"layers.{job['layer']}",),
        seq_len=job["seq_len"],
        dtype=job.get("dtype", "float32"),
        tokens=job["tokens"],
        heldout_tokens=job["heldout_tokens"],
    )


def prepare(job: dict[str, Any]) -> dict[str, Any]:
    """Return the job with what all sides share: the model as a directory, token ids, held-out activations."""
    folder = Path(job["folder"])
    import numpy as np
    import torch

    from wsae.acts.language import dequantised, load_language, locate
    from wsae.acts.live import LiveSource
    from wsae.acts.text import Packer

    path = locate(job["model"])
    if isinstance(path, Path) and path.suffix == ".gguf":
        path = dequantised(path)
    job = {**job, "model": str(path)}
    cfg = harvest_config(job)
    language = load_language(cfg.model)
    source = LiveSource(cfg, language=language)
    (hook,) = source.hooks
    heldout = torch.cat([chunk.x[hook] for chunk in source.heldout(4096)])
    np.save(folder / "heldout.npy", heldout.numpy())
    steps = -(-job["tokens"] // job["batch"])
    count = steps * (job["batch"] // job["seq_len"])
    spare = 64  # SAELens fills a buffer before its first batch
    sequences = Packer(cfg, language.tokenizer, heldout=False).sequences()
    ids = np.stack([s.ids for s in islice(sequences, count + spare)])
    ids[:, 0] = language.tokenizer.eos_token_id
    np.save(folder / "ids.npy", ids[:count])
    np.save(folder / "ids-more.npy", ids)
    special = sorted(set(language.tokenizer.all_special_ids))
    return job | {
        "d_in": source.hooks[hook],
        "special": special,
        "heldout": str(folder / "heldout.npy"),
    }


def ours(job: dict[str, Any], stored: bool) -> dict[str, Any]:
    """Do what `wsae train MODEL --text builtin` does (or `wsae harvest`, then `wsae train`), and measure the SAE."""
    import numpy as np
    import torch

    from wsae.acts.harvest import harvest
    from wsae.acts.language import load_language
    from wsae.acts.live import LiveSource
    from wsae.acts.source import StoreSource
    from wsae.sae.config import TopK
    from wsae.train.config import MemberConfig, TrainConfig
    from wsae.train.run import train_run

    member = MemberConfig(d_sae=job["d_sae"], activation=TopK(k=job["k"]), lr=job["lr"])
    cfg = TrainConfig(
        members=(member,),
        tokens=job["tokens"],
        batch_size=job["batch"],
        dtype=job["dtype"],
        warmup=0.0,
    )
    acts = harvest_config(job).model_copy(update={"heldout_tokens": 0} if stored else {})
    language = load_language(acts.model, acts.dtype)
    ready = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        if stored:
            place = harvest(acts, Path(scratch) / "store", language=language).path
            source = StoreSource(place, verify=False)
        else:
            source = LiveSource(acts, language=language)
        result = train_run(cfg, source, Path(scratch) / "run")
    done = time.time()
    peak = peak_mebibytes()
    (sae,) = next(iter(result.saes.values())).values()
    x = torch.from_numpy(np.load(job["heldout"]))
    with torch.no_grad():
        x_hat = torch.cat([sae(part) for part in x.split(1024)])
    return {
        "startup_s": ready - job["started"],
        "train_s": done - ready,
        "tokens": cfg.steps * cfg.batch_size,
        "peak_mib": peak,
        "fvu": fvu(x, x_hat),
        "torch": torch.__version__,
    }


def measured(side: str, job: dict[str, Any], peers_python: str | None, folder: Path) -> dict:
    """Run one side in a process of its own; returns its numbers, or the last line of its error."""
    kind, _, dtype = side.rpartition("-")
    ids = "ids-more.npy" if kind == "saelens" else "ids.npy"
    job = job | {"dtype": dtype, "ids": str(folder / ids)}
    python = sys.executable if kind in WSAE else (peers_python or sys.executable)
    found = worker(kind, job, python, folder)
    if "error" in found:
        return found
    process = found["startup_s"] + found["train_s"]
    return found | {"process_s": process, "tokens_per_s": found["tokens"] / found["train_s"]}


def worker(kind: str, job: dict[str, Any], python: str, folder: Path) -> dict:
    """Run one process to its end and return its answer."""
    file, here = folder / "job.json", Path(__file__)
    own = [python, str(here), "--worker", kind, "--job", str(file)]
    peer = [python, str(here.with_name("end_to_end_peer.py")), kind, str(file)]
    command = peer if kind in PEERS else own
    threads = str(job["threads"])
    quiet = {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    env = os.environ | quiet | {"OMP_NUM_THREADS": threads, "WANDB_MODE": "disabled"}
    file.write_text(json.dumps(job | {"started": time.time(), "folder": str(folder)}))
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        return {"error": lines[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def summary(rounds: dict[str, list[dict]]) -> dict[str, dict]:
    """Return each side's medians, or its error."""
    result = {}
    for side, runs in rounds.items():
        good = [run for run in runs if "error" not in run]
        if not good:
            result[side] = {"error": runs[-1]["error"]} if runs else {"error": "not run"}
            continue
        middle = {key: statistics.median(run[key] for run in good) for key in SHOWN}
        spread = [
            round(min(r["train_s"] for r in good), 2),
            round(max(r["train_s"] for r in good), 2),
        ]
        rest = {key: good[-1][key] for key in ("tokens", "version", "torch") if key in good[-1]}
        failed = len(runs) - len(good)
        result[side] = {
            **{key: float(f"{value:.5g}") for key, value in middle.items()},
            "train_s_range": spread,
            **rest,
            **({"failed_rounds": failed} if failed else {}),
        }
    return result


def default_sides(peers: bool) -> list[str]:
    """Return the sides that make sense on this CPU."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else "avx512_bf16"
    low = "avx512_bf16" in flags or "amx_bf16" in flags
    sides = [s for s in ALL if peers or s.startswith("wsae")]
    return [s for s in sides if low or not s.endswith("bfloat16")]


def ratios(table: dict[str, dict]) -> dict[str, float]:
    """Return wsae's rate over the fastest peer's, by dtype and over all."""
    rate = {side: row["tokens_per_s"] for side, row in table.items() if "tokens_per_s" in row}
    found = {}
    for dtype in ("float32", "bfloat16", ""):
        mine = [r for s, r in rate.items() if s.startswith("wsae") and s.endswith(dtype)]
        theirs = [r for s, r in rate.items() if not s.startswith("wsae") and s.endswith(dtype)]
        if mine and theirs:
            found[dtype or "any"] = round(max(mine) / max(theirs), 3)
    return found


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--peers-python", help="interpreter that has the peers installed")
    parser.add_argument("--model", default="builtin")
    parser.add_argument("--layer", type=int, default=9)
    parser.add_argument("--d-sae", type=int, default=4608)
    parser.add_argument("--k", type=int, default=32)
    parser.add_argument("--batch", type=int, default=2048)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=32_768)
    parser.add_argument("--heldout-tokens", type=int, default=8_192)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--sides", nargs="+", choices=ALL, default=None, metavar="SIDE")
    parser.add_argument("--worker", choices=(*WSAE, PREPARE), help=argparse.SUPPRESS)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.worker:
        job = json.loads(Path(args.job).read_text(encoding="utf-8"))
        ready = args.worker == PREPARE
        print(json.dumps(prepare(job) if ready else ours(job, args.worker == "wsae-stored")))
        return
    keys = ("model", "layer", "d_sae", "k", "batch", "seq_len", "tokens", "heldout_tokens", "lr")
    job = {key: getattr(args, key) for key in (*keys, "threads")}
    sides = args.sides or default_sides(peers=args.peers_python is not None)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        job = worker(PREPARE, job, sys.executable, folder)
        if "error" in job:
            sys.exit(job["error"])
        rounds: dict[str, list[dict]] = {side: [] for side in sides}
        for number in range(args.rounds):
            for side in (*sides[number:], *sides[:number]):
                rounds[side].append(measured(side, job, args.peers_python, folder))
                print(side, json.dumps(rounds[side][-1]), file=sys.stderr, flush=True)
    table = summary(rounds)
    settings = {key: job[key] for key in (*keys, "threads")} | {"rounds": args.rounds}
    machine = {"cpu": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    result = {"settings": settings, "machine": machine, "sides": table, "ratio": ratios(table)}
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
