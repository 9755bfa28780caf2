"""A tiny model, text, encoder and the commands from harvest to report on them: made in seconds, no downloads."""

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.reliability.common import ENVIRONMENT

ROOT = Path(__file__).resolve().parents[2]
SHARDS, STEPS = 200, 60
LEFT_OUT = ("speed.jsonl", ".lock")
"""Not compared: `speed.jsonl` holds wall times, `.lock` is empty."""


def prepare() -> None:
    """Import what the commands import, so that a forked child starts at once; no work, no threads."""
    os.environ.update(ENVIRONMENT)
    sys.path.append(str(ROOT / "tests" / "support"))
    import torch

    torch.set_num_threads(1)
    import transformers  # noqa: F401

    import wsae.acts.harvest
    import wsae.acts.source
    import wsae.cli.evaluate
    import wsae.cli.export
    import wsae.cli.harvest
    import wsae.cli.interpret
    import wsae.cli.main
    import wsae.cli.push
    import wsae.cli.report
    import wsae.cli.runner
    import wsae.cli.serve
    import wsae.cli.train
    import wsae.evals.interpret.detection
    import wsae.evals.interpret.run
    import wsae.evals.run
    import wsae.interop.card
    import wsae.report.html
    import wsae.serve.build
    import wsae.train.run  # noqa: F401


def make(at: Path) -> None:
    """Write a model, an encoder and a text into `at`."""
    import torch
    from acts_models import make_model, make_text, make_tokenizer
    from transformers import BertConfig, BertModel

    make_model(at / "model")
    make_text(at / "text.jsonl", documents=150)
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(tokenizer), intermediate_size=16, **size)
    BertModel(config).save_pretrained(at / "encoder")
    tokenizer.save_pretrained(at / "encoder")


def commands(at: Path) -> dict[str, list[str]]:
    """Return stage -> words of its command; each is the same when repeated after a kill."""
    model, store, run = (str(at / name) for name in ("model", "store", "run"))
    member = ("--member", "variance-a1")
    return {
        "harvest": [
            *("harvest", model, "--text", str(at / "text.jsonl"), "--hook", "layers.1"),
            *("--out", store, "--tokens", "3000", "--heldout-tokens", "2000", "--seq-len", "32"),
            *("--shard-tokens", str(SHARDS), "--batch-seqs", "4"),
        ],
        "train": [
            *(
                "train",
                store,
                "--out",
                run,
                "--d-sae",
                "48",
                "--k",
                "4",
                "--batch-size",
                "64",
                "--alpha",
                "1",
            ),
            *("--tokens", str(64 * STEPS), "--resume"),
        ],
        "evaluate": [
            *("evaluate", run, "--draws", "20", "--n-latents", "8", "--splice-tokens", "300"),
        ],
        "interpret": [
            *("interpret", run, "--score", "embedding", "--encoder", str(at / "encoder")),
            *("--n-latents", "10", "--width", "8", "--min-windows", "4", "--n-score", "6"),
            *("--n-hard", "2", "--draws", "20", "--controls", "random_sae", "shuffled"),
        ],
        "report": ["report", run, "--out", str(at / "page" / "report.html")],
        "export": ["export", run, *member, "--format", "saelens", "--out", str(at / "exported")],
        "push": ["push", run, "a/b", *member, "--dry-run", "--out", str(at / "pushed")],
        "index": ["serve", run, "--index-only", "--logits", "0", "--out", str(at / "indexed")],
    }


OUTPUTS = {
    "harvest": "store",
    "train": "run",
    "evaluate": "run/evaluation",
    "interpret": "run/interpretation",
    "report": "page",
    "export": "exported",
    "push": "pushed",
    "index": "indexed",
}
"""Where each stage writes, below the world's directory."""


def start(
    words: list[str],
    log: Path,
    before: Callable[[], object] = int,
    after: Callable[[], object] = int,
) -> int:
    """Run a command in a forked child, `before` and `after` it what else the child does; return its process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(out, 1)
        os.dup2(out, 2)
        _checkpoint_always()
        from wsae.cli.main import main

        before()
        code = main([*words, "--device", "cpu"])
        sys.stdout.flush()
        after()
    finally:
        os._exit(code)


def _checkpoint_always() -> None:
    """Have a checkpoint after every step, not once a minute, so that a kill may land anywhere in one."""
    from wsae.train import loop

    loop.CHECKPOINT_SECONDS = 0.0
    recorder: Any = loop.Recorder
    recorder._cost = property(lambda _: 0.0, lambda _, __: None)


def finish(words: list[str], log: Path) -> float:
    """Run a command to its end and return the seconds; raises SystemExit with its words when it fails."""
    begin = time.monotonic()
    status = os.waitpid(start(words, log), 0)[1]
    if status:
        raise SystemExit(f"{' '.join(words)}: status {status}\n{log.read_text()[-2000:]}")
    return time.monotonic() - begin


def contents(place: Path) -> dict[str, bytes]:
    """Return every file of a directory but those left out, hidden and temporary ones included."""
    return {
        str(path.relative_to(place)): path.read_bytes()
        for path in sorted(place.rglob("*"))
        if path.is_file() and path.name not in LEFT_OUT
    }


def forget(at: Path, stage: str) -> None:
    """Remove what a stage has written."""
    shutil.rmtree(at / OUTPUTS[stage], ignore_errors=True)


@contextlib.contextmanager
def restored(at: Path, stage: str) -> Iterator[None]:
    """Put back what a stage had written, and what later stages wrote inside it, after trials of that stage."""
    kept = at / "kept"
    shutil.copytree(at / OUTPUTS[stage], kept)
    yield
    forget(at, stage)
    kept.rename(at / OUTPUTS[stage])


Reference = dict[str, tuple[float, dict[str, bytes]]]
"""Stage -> the seconds it took undisturbed, and what it wrote."""


def undisturbed(at: Path) -> Reference:
    """Make the world and run every stage without a kill."""
    make(at)
    found: Reference = {}
    for stage, words in commands(at).items():
        seconds = finish(words, at / "log")
        found[stage] = (seconds, contents(at / OUTPUTS[stage]))
    return found
