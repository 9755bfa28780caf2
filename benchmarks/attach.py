"""What an attached SAE costs: passes, continuations and attribution on SmolLM2-135M. Prints JSON.

    python benchmarks/attach.py --sae runs/first/members/layers.9/plain [--threads 2] [--rounds 9]

Sides alternate; times are medians, of the clock and of the processor, which other programs disturb less. `added` is the
time of a pass with the SAE attached over the bare pass and the SAE's own encoding of the same rows together.
"""

import argparse
import json
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from wsae import SAE, LogitDifference, Set, attach, attribute
from wsae.acts.capture import Capture, hooks_named
from wsae.acts.config import HarvestConfig
from wsae.acts.flow import SkipRule
from wsae.acts.language import LanguageModel, load_language
from wsae.sae.model import Encoder

TEXT = (
    "When Mary and John went to the store in the old town, they met a friend who had just come back from a long "
    "journey through the mountains of Italy, where he had seen many small villages, churches and vineyards. Mary gave "
    "the friend some bread, and after a while John gave a bottle of milk to Mary, and then Mary gave it to"
)


def as_trained(language: LanguageModel) -> SkipRule:
    return SkipRule(HarvestConfig(), language.tokenizer.all_special_ids)


def passes(
    language: LanguageModel, sae: SAE, hook: str, size: tuple[int, int], rounds: int
) -> dict[str, Any]:
    """Return the cost of passes over sequences of this size: bare and attached ones alternate."""
    ids = torch.randint(100, 40_000, size, generator=torch.Generator().manual_seed(0))
    rows = Capture(language.model, [hooks_named(language.model, [hook])[hook]])(ids)[hook]
    rows, encode = rows[:, 1:].flatten(0, 1).clone(), Encoder(sae)

    def run() -> None:
        language.model(input_ids=ids, use_cache=False)

    turns = {"bare": run, "encode": lambda: encode(rows), "attached": run}
    clock: dict[str, list[float]] = {name: [] for name in turns}
    busy: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds + 1):
        for name, turn in turns.items():
            on = attach(language.model, {hook: sae}, exclude=as_trained(language))
            with on if name == "attached" else nullcontext():
                start, work = time.perf_counter(), time.process_time()
                turn()
                busy[name].append(1e3 * (time.process_time() - work))
                clock[name].append(1e3 * (time.perf_counter() - start))
    return {"sequences": size[0], "tokens": size[1], **summary(clock, busy)}


def summary(clock: dict[str, list[float]], busy: dict[str, list[float]]) -> dict[str, Any]:
    found = {}
    for kind, times in (("clock_ms", clock), ("processor_ms", busy)):
        middle = {name: statistics.median(each[1:]) for name, each in times.items()}
        added = middle["attached"] / (middle["bare"] + middle["encode"]) - 1
        found[kind] = {**middle, "added": added}
    return found


def continuations(
    language: LanguageModel, sae: SAE, hook: str, tokens: int, rounds: int
) -> dict[str, Any]:
    """Return tokens a second of greedy continuations: bare, attached, and with an edit."""
    ids = torch.tensor([language.tokenizer(TEXT)["input_ids"]])
    rates: dict[str, list[float]] = {"bare": [], "attached": [], "edited": []}
    for _ in range(rounds + 1):
        for name, found in rates.items():
            on = attach(language.model, {hook: sae}, exclude=as_trained(language))
            with on if name != "bare" else nullcontext() as attached:
                if attached is not None and name == "edited":
                    attached.edit(Set(7, 5.0))
                start = time.process_time()
                language.model.generate(
                    ids, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
                )
                found.append(tokens / (time.process_time() - start))
    return {name: statistics.median(found[1:]) for name, found in rates.items()}


def attribution(language: LanguageModel, sae: SAE, hook: str) -> dict[str, Any]:
    """Return seconds of attributing the last of 64 tokens, and how well effects are predicted."""
    tokenizer = language.tokenizer
    ids = torch.tensor(tokenizer(TEXT)["input_ids"][-64:])
    names = [
        tokenizer(name, add_special_tokens=False)["input_ids"][0] for name in (" John", " Mary")
    ]
    found: dict[str, Any] = {"tokens": len(ids)}
    for method in ("gradient", "integrated"):
        start, work = time.perf_counter(), time.process_time()
        made = attribute(
            language.model,
            {hook: sae},
            ids,
            LogitDifference(*names),
            method=method,
            exclude=as_trained(language),
        )
        found[method] = {
            "clock_s": time.perf_counter() - start,
            "processor_s": time.process_time() - work,
            "correlation": made.correlation,
            "incompleteness": made.hooks[hook].incompleteness,
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sae", type=Path, required=True)
    parser.add_argument("--hook", default="layers.9")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    language, sae = load_language("builtin"), SAE.load(args.sae)
    with torch.inference_mode():
        found = {
            "passes": [
                passes(language, sae, args.hook, size, args.rounds) for size in ((1, 64), (4, 128))
            ],
            "continuations": continuations(language, sae, args.hook, 32, 3),
        }
    found["attribution"] = attribution(language, sae, args.hook)
    print(json.dumps({"threads": args.threads, "d_sae": sae.cfg.d_sae, **found}, indent=1))


if __name__ == "__main__":
    main()
