"""A synthetic run directory in the shape that training and evaluation write, with hostile token text in it."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from report_text import HOSTILE, Shape, top_contexts

from wsae.core.artifact import write_manifest
from wsae.core.files import write_json, write_text
from wsae.core.tensors import save_tensors

MEMBERS = {"plain": 0.0, "variance-a1": 1.0, "variance-a0.5": 0.5}
CONTROL = "control-random"
GLOSSARY = {
    "fvu": {
        "name": "Plain FVU",
        "formula": "sum ||x - x_hat||² / sum ||x - mean||²",
        "direction": "lower is better",
        "unit": "fraction",
    },
    "fvu_weighted": {
        "formula": "the same with γ² per dimension",
        "direction": "lower is better",
        "unit": "fraction",
    },
    "l0": {
        "formula": "mean number of latents above 0 per token",
        "direction": "neither",
        "unit": "latents",
    },
    "dead_frac": {
        "formula": "latents that never fire / d_sae",
        "direction": "lower is better",
        "unit": "fraction",
    },
    "ce_loss_recovered_zero": {
        "formula": "(CE_zero - CE_sae) / (CE_zero - CE)",
        "direction": "higher is better",
        "unit": "",
    },
    "kl": {
        "formula": "KL(model || spliced model)",
        "direction": "lower is better",
        "unit": "nats/token",
    },
    "latent_variance_mean": {
        "formula": "mean variance of a latent",
        "direction": "neither",
        "unit": "",
    },
    "decoder_cosine_max_mean": {
        "formula": "mean nearest decoder cosine",
        "direction": "neither",
        "unit": "",
    },
}


def write_run(
    path: Path, shape: Shape | None = None, evaluation: bool = True, contexts: bool = True
) -> Path:
    """Write a run directory and return it."""
    shape = shape or Shape()
    rng = np.random.default_rng(shape.seed)
    variance = {hook: np.sort(rng.lognormal(0, 1.4, shape.d_in)) for hook in shape.hooks}
    for values in variance.values():
        rng.shuffle(values)
    path.mkdir(parents=True, exist_ok=True)
    config = {
        "source": {
            "model": "HuggingFaceTB/SmolLM2-135M",
            "text": {"path": "builtin"},
            "hooks": list(shape.hooks),
        },
        "train": {"tokens": 262144, "lr": 0.0012, "seed": 0},
        "sae": {"d_sae": shape.d_sae, "activation": {"kind": "topk", "k": 32}},
    }
    gamma = {
        hook: {m: _gamma_record(m, a, variance[hook]) for m, a in MEMBERS.items()}
        for hook in shape.hooks
    }
    write_json(path / "config.json", config)
    write_json(path / "gamma.json", gamma)
    write_text(
        path / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in _metrics(shape, rng))
    )
    write_manifest(path, "run", config, ["config.json", "gamma.json", "metrics.jsonl"])
    if evaluation:
        _write_evaluation(path / "evaluation", shape, variance, gamma, contexts)
    return path


def _gamma(alpha: float, variance: np.ndarray) -> np.ndarray:
    raw = variance**alpha
    return raw / math.sqrt(float((raw**2).mean()))


def _gamma_record(member: str, alpha: float, variance: np.ndarray) -> dict:
    gamma = _gamma(alpha, variance)
    share = gamma**2 / (gamma**2).sum()
    top = np.argsort(-gamma)[:10]
    return {
        "rule": "none" if member == "plain" else "variance",
        "alpha": alpha,
        "normalise": "rms",
        "robust": "none",
        "tokens": 261_000,
        "heaviest": [[int(i), float(gamma[i]), float(share[i])] for i in top],
        "effective_dimensions": float(1 / (share**2).sum()),
        "without_mask": {
            "cosine": 0.31,
            "weight_moved": 0.84,
            "largest_change_dimension": int(top[0]),
        },
    }


def _metrics(shape: Shape, rng: np.random.Generator) -> list[dict]:
    rows = []
    for step in range(1, shape.steps + 1):
        for hook in shape.hooks:
            for member, alpha in MEMBERS.items():
                fall = math.exp(-step / 9)
                fvu = 0.21 + 0.04 * alpha + 0.7 * fall + 0.004 * rng.normal()
                rows.append(
                    {
                        "step": step, "tokens": step * 4096, "hook": hook, "member": member,
                        "loss": fvu * 3, "reconstruction": fvu * 3, "auxk": 0.01, "fvu": fvu,
                        "fvu_weighted": 0.2 - 0.1 * alpha + 0.6 * fall, "l0": 32.0,
                        "dead_frac": max(0.0, 0.3 * fall - 0.02), "lr": 1e-3,
                    }
                )  # fmt: skip
    return rows


def _write_evaluation(
    path: Path, shape: Shape, variance: dict, gamma: dict, with_contexts: bool
) -> None:
    rng = np.random.default_rng(shape.seed + 1)
    arrays: dict[str, torch.Tensor] = {}
    hooks, contexts = {}, {}
    for hook in shape.hooks:
        hooks[hook] = {
            "members": {
                m: {"metrics": _values(a), "config": {}, "gamma": gamma[hook][m]}
                for m, a in MEMBERS.items()
            },
            "comparisons": comparisons(),
            "matching": {
                m: {
                    "method": "assignment",
                    "n_pairs": 371,
                    "decoder_cosine_mean": 0.71,
                    "frac_above_0.9": 0.38,
                }
                for m in MEMBERS
                if m != "plain"
            },
        }
        hooks[hook]["members"][CONTROL] = {"metrics": _values(12.0), "config": {}, "gamma": None}
        found = {m: _arrays(rng, shape, variance[hook], a) for m, a in MEMBERS.items()}
        for member, named in found.items():
            arrays |= {
                f"{hook}|{member}|{name}": torch.tensor(values) for name, values in named.items()
            }
        chosen = {
            m: np.sort(rng.choice(shape.d_sae, shape.latents, replace=False)) for m in MEMBERS
        }
        partners = [found[m]["match_index"][chosen[m]] for m in MEMBERS if m != "plain"]
        chosen["plain"] = np.unique(
            np.concatenate([chosen["plain"][: shape.latents // 2], *partners])
        )
        contexts[hook] = {
            m: top_contexts(rng, shape, (m, chosen[m].tolist()), found[m]) for m in MEMBERS
        }
    files = ["evaluation.json", "arrays.safetensors"] + (["contexts.json"] if with_contexts else [])
    write_json(
        path / "evaluation.json",
        {"heldout_tokens": 50_000, "heldout_sequences": 200, "hooks": hooks, "glossary": GLOSSARY},
    )
    save_tensors(path / "arrays.safetensors", arrays)
    if with_contexts:
        write_text(path / "contexts.json", json.dumps(contexts))
    write_manifest(path, "evaluation", {}, files)


def _values(alpha: float) -> dict:
    def around(value: float, half: float) -> dict:
        return {"value": value, "low": value - half, "high": value + half}

    return {
        "fvu": around(0.2104 + 0.041 * alpha, 0.008),
        "fvu_weighted": around(0.203 - 0.11 * alpha, 0.007),
        "l0": {"value": 32.0, "low": 32.0, "high": 32.0},
        "dead_frac": {"value": 0.013 + 0.02 * alpha},
        "ce_loss_recovered_zero": around(0.957 - 0.001 * alpha, 0.004),
        "kl": around(0.182 + 0.03 * alpha, 0.01),
        "latent_variance_mean": {"value": 3.21e-4},
        "decoder_cosine_max_mean": around(0.41 + 0.02 * alpha, 0.006),
    }


def comparisons() -> list[dict]:
    """Return paired comparisons: worse, better, one whose interval covers 0, one without direction."""
    out = []
    for member, alpha in MEMBERS.items():
        for metric, difference, half in (
            ("fvu", 0.041 * alpha, 0.006),
            ("fvu_weighted", -0.09 * alpha, 0.009),
            ("ce_loss_recovered_zero", -0.001 * alpha, 0.003),
            ("decoder_cosine_max_mean", 0.02 * alpha, 0.004),
        ):
            if member != "plain":
                bounds = {"low": difference - half, "high": difference + half}
                unit, n = ("latent", 384) if "decoder" in metric else ("sequence", 200)
                pair = {"a": member, "b": "plain", "metric": metric, "difference": difference}
                out.append(
                    pair
                    | bounds
                    | {"effect_size": difference / half, "unit": unit, "n": n, "paired": True}
                )
    return out


def _arrays(
    rng: np.random.Generator, shape: Shape, variance: np.ndarray, alpha: float
) -> dict[str, np.ndarray]:
    density = 10 ** np.clip(rng.normal(-2.2 - 0.2 * alpha, 0.7, shape.d_sae), -5, -0.02)
    density[rng.random(shape.d_sae) < 0.02 + 0.03 * alpha] = 0.0
    gamma = _gamma(alpha, variance)
    explained = 1 - 0.35 / (1 + gamma**1.2) - 0.1 * rng.random(shape.d_in)
    return {
        "density": density,
        "variance": density * rng.lognormal(0, 0.5, shape.d_sae),
        "ev_per_dim": explained,
        "gamma": gamma,
        "input_variance": variance,
        "decoder_max_cosine": rng.beta(4, 5, shape.d_sae),
        "match_index": rng.integers(0, shape.d_sae, shape.d_sae),
        "match_cosine": rng.beta(6, 3, shape.d_sae),
    }


def edit_evaluation(run: Path, change: Callable[[dict], None]) -> None:
    """Apply `change` to evaluation.json and seal the directory again."""
    place = run / "evaluation"
    value = json.loads((place / "evaluation.json").read_text())
    change(value)
    write_json(place / "evaluation.json", value)
    write_manifest(
        place, "evaluation", {}, [p.name for p in place.iterdir() if p.name != "manifest.json"]
    )


SCORES = {"embedding": 0.82, "surprisal": 0.71, "detection": 0.64}
EXPLANATION = "words about ships " + "".join(HOSTILE)
INTERPRET_CONTROLS = {"control-random": -0.2, "control-shuffled": -0.3}


def write_interpretation(run: Path, latents: int = 6) -> Path:
    """Write RUN/interpretation: half of the latents that the evaluation shows, and one that it does not."""
    contexts = json.loads((run / "evaluation" / "contexts.json").read_text())
    hooks, shown = {}, {}
    for hook, members in contexts.items():
        scored = {
            name: _scored(found[:latents], i) for i, (name, found) in enumerate(members.items())
        }
        shown[hook] = {
            name: [
                {**entry, "scores": scored[name][i]["scores"]}
                | {"explanation": scored[name][i]["explanation"], "tokens": [" ship", HOSTILE[0]]}
                for i, entry in enumerate(found[:latents])
            ]
            for name, found in members.items()
        }
        shown[hook]["plain"].append(
            {**shown[hook]["plain"][0], "latent": NEW_LATENT, "variance": None}
        )
        hooks[hook] = {
            "members": {name: _entry(found, 0.01 * i) for i, (name, found) in enumerate(scored.items())},
            "controls": {
                name: _entry([], shift) | {"about": "</td><script>alert(1)</script>"}
                for name, shift in INTERPRET_CONTROLS.items()
            },
            "comparisons": [
                {"a": name, "b": "plain", "metric": score, "over": over, "difference": shift,
                 "low": shift - 0.02, "high": shift + 0.02, "effect_size": 0.2, "unit": "latent",
                 "n": 40, "paired": over == "matched"}
                for name in members if name != "plain"
                for score in SCORES
                for over, shift in (("matched", 0.05), ("all", 0.01), ("density", -0.03))
            ],
        }  # fmt: skip
    place = run / "interpretation"
    record = {
        "judges": {score: f"judge of {score} <i>" for score in SCORES},
        "hooks": hooks,
        "glossary": {
            "embedding": {"name": "Embedding detection", "formula": "AUC", "direction": "higher is better"}
        },
    }  # fmt: skip
    write_text(place / "interpretation.json", json.dumps(record))
    write_text(place / "contexts.json", json.dumps(shown))
    write_manifest(place, "interpretation", {}, ["interpretation.json", "contexts.json"])
    return run


NEW_LATENT = 9999


def _scored(found: list[dict], member: int) -> list[dict]:
    return [
        {
            "latent": entry["latent"],
            "density": entry["density"],
            "peak": entry["max"],
            "explanation": {0: EXPLANATION, 1: None}.get(i, f"explanation {member}/{i}"),
            "scores": {s: round(v - 0.03 * i, 3) for s, v in SCORES.items()},
        }
        for i, entry in enumerate(found)
    ]


def _entry(latents: list[dict], shift: float) -> dict:
    return {
        "summary": {
            score: {"value": v + shift, "low": v + shift - 0.02, "high": v + shift + 0.02, "n": 40}
            | ({"requested": 400, "parsed": 390, "failed": 7, "not_asked": 3} if score == "detection" else {})
            for score, v in SCORES.items()
        },
        "density": {"0.5": 0.004},
        "counts": {"sampled": 50, "scored": 40, "skipped": {"few windows": 10, "silent": 0}},
        "latents": latents,
    }  # fmt: skip
