"""Synthetic top contexts of latents, with hostile token text among plain words."""

from dataclasses import dataclass

import numpy as np

HOSTILE = (
    "</script><img src=x onerror=alert(1)>",
    "<!--<script>",
    "\u202eesrever",
    "\u2028line\u2029",
    "nul\x00bell\x07",
    "🦜👩‍🔬",
    "\"quotes' & &amp;",
    "{{7*7}}",
    "${7*7}",
    "\ud800",
    "javascript:alert(1)",
)
WORDS = (
    " the", " of", " and", " ship", " whale", " sea", " captain", " a", " was", " in", " harbour",
    " night", ",", ".", "\n", " storm", " letter", " she", " he", " said", " over", " water", "ing", " old",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """Sizes of the synthetic run."""

    hooks: tuple[str, ...] = ("layers.9",)
    d_in: int = 96
    d_sae: int = 384
    latents: int = 24
    contexts: int = 6
    window: int = 24
    steps: int = 60
    seed: int = 0


def top_contexts(
    rng: np.random.Generator,
    shape: Shape,
    chosen: tuple[str, list[int]],
    found: dict[str, np.ndarray],
) -> list[dict]:
    member, latents = chosen
    out = []
    for place, latent in enumerate(latents):
        windows = [_window(rng, shape, place * shape.contexts + i) for i in range(shape.contexts)]
        windows.sort(key=lambda w: -max(w["acts"]))
        match = {
            "member": "plain",
            "latent": int(found["match_index"][latent]),
            "cosine": float(found["match_cosine"][latent]),
        }
        out.append(
            {
                "latent": latent,
                "density": float(found["density"][latent]),
                "variance": float(found["variance"][latent]),
                "max": max(max(w["acts"]) for w in windows),
                "match": None if member == "plain" else match,
                "contexts": windows,
            }
        )
    return out


def _window(rng: np.random.Generator, shape: Shape, serial: int) -> dict:
    tokens = [WORDS[i] for i in rng.integers(0, len(WORDS), shape.window)]
    acts = np.where(rng.random(shape.window) < 0.15, rng.gamma(2.0, 2.0, shape.window), 0.0)
    peak = int(rng.integers(0, shape.window))
    tokens[peak] = HOSTILE[serial % len(HOSTILE)] if serial % 3 == 0 else tokens[peak]
    tokens[(peak + 3) % shape.window] = (
        HOSTILE[(serial + 5) % len(HOSTILE)] if serial % 4 == 0 else " sail"
    )
    acts[peak] = acts.max() + 1 + rng.random()
    return {
        "tokens": tokens,
        "acts": [round(float(a), 4) for a in acts],
        "peak": peak,
        "seq": serial,
    }
