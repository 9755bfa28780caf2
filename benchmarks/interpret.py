"""Scores without an LLM: agreement with hand-made features, and time per latent. Prints JSON.

Run: .venv/bin/python benchmarks/interpret.py [--latents 1000] [--dtype bfloat16] [--surprisal-latents 10].
Embedding: latents with as many contexts as `wsae interpret` shows (15 + 20 + 20 + 20 windows of 32 tokens; the random
ones from a pool of 2,048), drawn from the text in the package. Surprisal: the builtin model.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch

from wsae.acts.config import TextConfig
from wsae.acts.language import LanguageModel, load_language, load_tokenizer
from wsae.acts.text import documents
from wsae.acts.tokens import decode_table, joined
from wsae.evals.interpret.detection import (
    Memo,
    PrefixReader,
    embedding_scores,
    load_encoder,
    surprisal_scores,
)
from wsae.evals.interpret.summary import LatentScore
from wsae.evals.interpret.windows import Collected, LatentContexts, Shown, Windows

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "support"))
from interpret_worlds import features  # noqa: E402  (the hand-made features live with the tests)

WIDTH, POOL, ROLES = 32, 2048, (15, 20, 20, 20)


def texts_windows(n: int) -> Windows:
    """Return n windows of 32 tokens of the package's text."""
    tokenizer = load_tokenizer("builtin")
    rows: list[list[int]] = []
    for document in documents(TextConfig(path="builtin")):
        ids = tokenizer(document.text, add_special_tokens=False)["input_ids"]
        rows += [ids[i : i + WIDTH] for i in range(0, len(ids) - WIDTH + 1, WIDTH)]
        if len(rows) >= n:
            break
    ids = np.array(rows[:n], dtype=np.int32)
    table = decode_table(tokenizer, np.unique(ids).tolist())
    place = np.arange(len(ids))
    return Windows(ids, place, 0 * place, place, lambda some: joined([table[int(i)] for i in some]))


def stand_ins(n_latents: int, seed: int = 0) -> Collected:
    """Return latents with windows drawn at random: scores mean nothing, the work is that of real ones."""
    rng = np.random.default_rng(seed)
    made = texts_windows(POOL + 20_000)
    n_own = len(made) - POOL

    def shown(pool: int, start: int, n: int) -> Shown:
        window = start + rng.choice(pool, n, replace=False)
        return Shown(window, np.zeros((n, WIDTH), dtype=np.float32))

    latents = []
    for latent in range(n_latents):
        explain, positive, hard = (shown(n_own, POOL, ROLES[role]) for role in (0, 1, 3))
        roles = (explain, positive, shown(POOL, 0, ROLES[2]), hard)
        latents.append(LatentContexts(latent, 0.01, 1.0, *roles))
    return Collected(made, latents, {})


def means(scores: list[LatentScore]) -> dict[str, float]:
    """Return the mean of each number."""
    names = ("auc", "auc_hard", "balanced_accuracy")
    return {name: round(float(np.mean([getattr(s, name) for s in scores])), 4) for name in names}


def hand_made(language: LanguageModel | None, encoder: Memo) -> dict[str, dict[str, float]]:
    """Return what each scorer makes of the hand-made features; for embeddings both halves explain in turn."""
    out: dict[str, list[LatentScore]] = {}
    for turn in (False, True):
        collected, names = features(turn=turn)
        made = {
            "embedding, windows": embedding_scores(collected, encoder),
            "embedding, words": embedding_scores(collected, encoder, names),
        }
        if language is not None and not turn:
            reader = PrefixReader(language)
            made["surprisal, windows"] = surprisal_scores(collected, reader)
            made["surprisal, words"] = surprisal_scores(collected, reader, names)
        for name, scores in made.items():
            out.setdefault(name, []).extend(scores)
    return {name: means(scores) for name, scores in out.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--latents", type=int, default=1000)
    parser.add_argument("--surprisal-latents", type=int, default=10, help="0 leaves surprisal out")
    parser.add_argument("--dtype", default="bfloat16", help="of both models")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    out: dict = {
        "machine": f"{platform.processor() or platform.machine()}, {args.threads} threads",
        "dtype": args.dtype,
    }
    encoder = load_encoder(dtype=args.dtype)
    language = load_language("builtin", dtype=args.dtype) if args.surprisal_latents else None
    out["hand-made"] = hand_made(language, Memo(encoder))
    collected = stand_ins(args.latents)
    memo, start = Memo(encoder), time.perf_counter()
    embedding_scores(collected, memo)
    out["embedding"] = {
        "latents": args.latents,
        "distinct windows": len(memo),
        "seconds": round(time.perf_counter() - start, 1),
    }
    start = time.perf_counter()
    embedding_scores(collected, memo)
    out["embedding"]["seconds without encoding"] = round(time.perf_counter() - start, 2)
    if language is not None:
        few, start = range(args.surprisal_latents), time.perf_counter()
        surprisal_scores(collected, language, latents=few)
        seconds = (time.perf_counter() - start) / args.surprisal_latents
        out["surprisal"] = {"latents": len(few), "seconds per latent": round(seconds, 2)}
    print(json.dumps(out, indent=1))


if __name__ == "__main__":
    main()
