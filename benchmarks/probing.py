"""Sparse probing and targeted perturbation of one SAE by sae-bench's own code and by ours, on the same documents.

    python benchmarks/probing.py RUN --source STORE [--member plain] [--saes 4] [--saebench FOLDER]
    python benchmarks/probing.py RUN --source STORE --rules 100000      (our tasks by rule, alone)

Documents are windows of the store's held-out rows, four classes by their place in the text: what is compared is the
work, and that both give the same numbers. SAEBench reads one SAE after another; we read `--saes` of the run in one
pass, one random SAE beside them, and an SAE's seconds are its share of that. The probe of all latents is SAEBench's
own (AdamW, at most 100 epochs, the best of them on the test rows) against the regression's optimum by us, so these two
accuracies are not compared. Times are of the processor, one thread, so that other programs do not count.
sae-bench is installed (`pip install sae-bench==0.6.0`, in an environment of its own), or `--saebench` names a folder
with its source; SAELens and TransformerLens, which the code called here only names in annotations, need not be there.
"""

import argparse
import contextlib
import io
import json
import sys
import time
import types
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jaxtyping
import numpy as np
import scipy.sparse
import torch

from wsae import SAE
from wsae.acts.source import open_source
from wsae.evals.config import ProbeConfig
from wsae.evals.measure import EvaluatedSaes, first_rows
from wsae.evals.probing.reading import RAW, Coder
from wsae.evals.probing.run import probe_tokens
from wsae.evals.probing.scores import (
    LinearProbe,
    Removal,
    TaskSet,
    fit_all,
    one_against_others,
    sparse_right,
    targeted,
)
from wsae.interop import SAEBenchSAE

NAMED_ONLY = (
    *("sae_lens", "sae_lens.sae", "sae_lens.saes", "sae_lens.saes.sae", "sae_lens.loading"),
    *("sae_lens.loading.pretrained_saes_directory", "transformer_lens"),
)
CLASSES = ("a", "b", "c", "d")


class StandIn(types.ModuleType):
    """A package that is not installed, whose names stand in annotations alone."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def saebench(folder: Path | None) -> tuple[Any, Any, Any]:
    """Return sae-bench's modules of probes, of perturbation and of means."""
    if folder is not None:
        sys.path.insert(0, str(folder))
    jaxtyping.config.update("jaxtyping_disable", True)  # its checks want older libraries
    for name in () if find_spec("sae_lens") else NAMED_ONLY:
        sys.modules[name] = StandIn(name)
    chosen = "sae_bench.sae_bench_utils.sae_selection_utils"
    sys.modules[chosen] = StandIn(chosen)  # its tables want one package more
    from sae_bench.evals.scr_and_tpp import main as perturbation
    from sae_bench.evals.sparse_probing import probe_training
    from sae_bench.sae_bench_utils import activation_collection

    return probe_training, perturbation, activation_collection


def timed(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return a result and the processor's seconds."""
    begun = time.process_time()
    with contextlib.redirect_stdout(io.StringIO()):
        found = work()
    return found, time.process_time() - begun


def documents(args: argparse.Namespace) -> dict[str, torch.Tensor]:
    """Return [documents, length, d_in] for each class."""
    n = args.documents * len(CLASSES)
    source = open_source(args.source)
    (hook,) = [hook for hook in source.hooks if args.hook in (None, hook)]
    chunks = first_rows(source.heldout(4096), n * args.length)
    rows = torch.cat([chunk.x[hook] for chunk in chunks])
    return dict(zip(CLASSES, rows.view(len(CLASSES), args.documents, args.length, -1), strict=True))


def theirs(sae: SAEBenchSAE, halves: list[dict], args: argparse.Namespace, modules: Any) -> dict:
    """Return accuracies by k, losses of perturbation by n and seconds, by sae-bench."""
    training, perturbation, means = modules
    out: dict[str, Any] = {"s": {}}
    coded, out["s"]["means of codes"] = timed(
        lambda: [means.get_sae_meaned_activations(half, sae, 125) for half in halves]
    )
    for k in args.k:
        torch.manual_seed(args.seed)
        found, seconds = timed(lambda k=k: training.train_probe_on_activations(*coded, k)[1])
        out[k], out["s"][f"probes of {k}"] = [*found.values()], seconds
    whole = {"select_top_k": None, "use_sklearn": False, "batch_size": 250, "epochs": 100}
    torch.manual_seed(args.seed)
    _, out["s"]["probe of all"] = timed(
        lambda: training.train_probe_on_activations(*coded, **whole, lr=1e-2)
    )
    raw = [means.create_meaned_model_activations(half) for half in halves]
    torch.manual_seed(args.seed)
    probes, _ = timed(
        lambda: training.train_probe_on_activations(*raw, None, use_sklearn=False, epochs=20)[0]
    )
    clean = perturbation.get_probe_test_accuracy(probes, list(CLASSES), raw[1], 500, False)

    def perturbed() -> dict:
        torch.set_grad_enabled(False)
        effects = perturbation.get_all_node_effects_for_one_sae(
            sae, probes, list(CLASSES), False, halves[0], 125
        )
        losses = perturbation.perform_feature_ablations(
            probes, sae, 125, halves[1], effects, args.ablated, list(CLASSES), 500, False
        )
        return perturbation.create_tpp_plotting_dict(losses, clean)[0]

    found, out["s"]["perturbation"] = timed(perturbed)
    out["tpp"] = {n: found[f"tpp_threshold_{n}_total_metric"] for n in args.ablated}
    out["probes"] = probes
    return out


def ours(saes: dict[str, SAE], halves: list[dict], args: argparse.Namespace, probes: dict) -> dict:
    """Return the same of the first SAE by us; `probes` are those on the activations."""
    out: dict[str, Any] = {"s": {}}
    name, sae = next(iter(saes.items()))
    coder = Coder({"hook": EvaluatedSaes(saes)}, 0)

    def coded() -> dict:
        for half in halves:
            for x in half.values():
                for part in x.split(32):
                    each = np.full((1, args.length), 1 / args.length)
                    pool = scipy.sparse.kron(scipy.sparse.eye_array(len(part)), each).tocsr()
                    coder.add({"hook": part.flatten(0, 1)}, pool.astype(np.float32))
        return coder.tables()["hook"]

    tables, together = timed(coded)
    out["s"]["means of codes"] = together / len(saes)
    codes = tables[name]
    ends = np.cumsum([0, *(len(x) for half in halves for x in half.values())])
    rows = [np.arange(a, b) for a, b in zip(ends, ends[1:], strict=False)]
    near = dict(zip(CLASSES, rows[: len(CLASSES)], strict=True))
    far = dict(zip(CLASSES, rows[len(CLASSES) :], strict=True))
    tasks = one_against_others(near, far, args.seed)
    for k in args.k:
        out[k], out["s"][f"probes of {k}"] = timed(
            lambda k=k: [float(sparse_right(codes, t, (k,))[0][k].mean()) for t in tasks]
        )
    _, out["s"]["probe of all"] = timed(lambda: [fit_all(codes[t.train], t.train_y) for t in tasks])
    linear = [
        LinearProbe(p.net.weight[0].double().numpy(), float(p.net.bias)) for p in probes.values()
    ]
    decoder = sae.W_dec.detach().double().numpy()
    removal = Removal(tables[RAW], codes, decoder, tasks, linear)
    units = TaskSet(tasks, np.arange(ends[-1]), int(ends[-1]))
    found, out["s"]["perturbation"] = timed(lambda: targeted(removal, units, args.ablated))
    out["tpp"] = {n: found[f"tpp_{n}"].value for n in args.ablated}
    return out


def ratio(seconds: dict[str, dict[str, float]]) -> float:
    """Return sae-bench's total over ours."""
    theirs, mine = (sum(seconds[side].values()) for side in ("sae-bench", "wsae"))
    return theirs / mine


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--source", required=True)
    parser.add_argument("--hook")
    parser.add_argument("--member", default="plain")
    parser.add_argument("--saes", type=int, default=4)
    parser.add_argument("--saebench", type=Path)
    parser.add_argument("--documents", type=int, default=150)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--k", type=int, nargs="+", default=[1, 2, 5])
    parser.add_argument("--ablated", type=int, nargs="+", default=[2, 10, 50])
    parser.add_argument("--seed", type=int, default=ProbeConfig().seed)
    parser.add_argument("--rules", type=int)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    (hook,) = [p.name for p in (args.run / "members").iterdir() if args.hook in (None, p.name)]
    folder = args.run / "members" / hook
    others = sorted(p.name for p in folder.iterdir() if p.name != args.member)
    names = [args.member, *others][: args.saes]
    saes = {name: SAE.load(folder / name) for name in names}
    sae = saes[args.member]
    if args.rules is not None:
        family, source = {hook: EvaluatedSaes({"sae": sae})}, open_source(args.source)
        found, s = timed(lambda: probe_tokens(family, source, ProbeConfig(tokens=args.rules)))
        print(json.dumps({"counts": found.record["counts"], "seconds": s}))
        return 0
    modules = saebench(args.saebench)
    cut = 2 * args.documents // 3
    whole = documents(args)
    halves = [
        {name: x[part] for name, x in whole.items()} for part in (slice(cut), slice(cut, None))
    ]
    with torch.no_grad():
        upstream = theirs(SAEBenchSAE(sae), halves, args, modules)
        mine = ours(saes, halves, args, upstream.pop("probes"))
    seconds = {"sae-bench": upstream.pop("s"), "wsae": mine.pop("s")}
    without = {
        side: {name: s for name, s in parts.items() if name != "perturbation"}
        for side, parts in seconds.items()
    }
    gaps = {k: float(np.abs(np.subtract(upstream[k], mine[k])).max()) for k in args.k}
    result = {
        "documents": args.documents * len(CLASSES),
        "tokens": args.documents * len(CLASSES) * args.length,
        "d_sae": sae.cfg.d_sae,
        "seconds": seconds,
        "times as fast": {"sparse probing": ratio(without), "all of it": ratio(seconds)},
        "largest difference of an accuracy": gaps,
        "perturbation": {"sae-bench": upstream["tpp"], "wsae": mine["tpp"]},
    }
    print(json.dumps(result, indent=1))
    if args.out is not None:
        args.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
