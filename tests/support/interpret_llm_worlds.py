"""A world in which latent j is word j, and judges that read the prompts and know the truth (or do not)."""

import json
import re
from typing import Any

import numpy as np
import torch
from interpret_server import Reply, error, prompt, said

from wsae.acts.source import HeldoutRows
from wsae.acts.tokens import TokenTable
from wsae.evals.config import FragmentConfig
from wsae.evals.interpret.collect import fragments
from wsae.evals.interpret.windows import Collected, LatentContexts, Shown, Windows
from wsae.sae import SAE, SAEConfig, TopK

WORDS = ["apple", "bread", "chair", "dream", "eagle", "flame", "grape", "house", "inlet", "joker"]
"""The first N_LATENTS are what latents fire on; the others fill up."""
N_LATENTS, WIDTH, END = 3, 12, len(WORDS)


def decode(ids: Any) -> list[str]:
    return [f" {WORDS[int(i)]}" if int(i) < END else "<end>" for i in ids]


def collected(n: int = 10, seed: int = 0) -> Collected:
    """Return n windows per latent and role: those of latent j hold word j once or twice among words of no latent."""
    rng = np.random.default_rng(seed)
    ids: list[np.ndarray] = []

    def windows(word: int | None, count: int, hard: bool = False) -> Shown:
        first, acts = len(ids), np.zeros((count, WIDTH), dtype=np.float32)
        for row in range(count):
            tokens = rng.integers(N_LATENTS, END, WIDTH)
            if hard:
                tokens[rng.integers(WIDTH)] = (word or 0) + 1
            elif word is not None:
                places = rng.choice(WIDTH, int(rng.integers(1, 3)), replace=False)
                tokens[places] = word
                acts[row, places] = rng.uniform(1, 5)
            ids.append(tokens)
        return Shown(np.arange(first, first + count), acts)

    latents = []
    for word in range(N_LATENTS):
        roles = (
            windows(word, n),
            windows(word, n),
            windows(None, n),
            windows(word, n // 2, hard=True),
        )
        latents.append(LatentContexts(word, 0.1, 5.0, *roles))
    place = np.arange(len(ids))
    every = Windows(np.stack(ids).astype(np.int32), place, np.zeros_like(place), place, decode)
    return Collected(every, latents, {})


def explained(body: dict[str, Any]) -> Reply:
    """Explain by the marked word."""
    words = re.findall(r"<< ?(\w+)", prompt(body))
    return said(f"They agree.\n[EXPLANATION]: the word {max(set(words), key=words.count)}")


def truths(body: dict[str, Any]) -> list[int]:
    """Judge rightly: detection by the word's presence, fuzzing by what is marked."""
    text = prompt(body)
    word = re.findall(r"Explanation: the word (\w+)", text)[0]
    lines = re.findall(r"^Text \d+: (.*)$", text, flags=re.MULTILINE)
    if "<<" not in text:
        return [int(word in line) for line in lines]
    return [
        int({*re.findall(r"<<(.*?)>>", line)} <= {f" {word}", f" {word} {word}"}) for line in lines
    ]


def simulated(body: dict[str, Any]) -> list[tuple[int, str, int]]:
    text = prompt(body)
    word = re.findall(r"Explanation: the word (\w+)", text)[0]
    rows = re.findall(r"^(\d+)\t(.*)$", text, flags=re.MULTILINE)
    return [(int(i), token, 10 if token.strip() == word else 0) for i, token in rows]


def perfect(body: dict[str, Any], _before: int) -> Reply:
    """Explain, judge and simulate rightly."""
    text = prompt(body)
    if text.startswith("Example 1"):
        return explained(body)
    if "Text 1: " in text:
        return said(json.dumps(truths(body)))
    rows = simulated(body)
    if not body.get("logprobs"):
        return said(json.dumps([[i, value] for i, _, value in rows]))
    return spelled(
        [part for i, token, value in rows for part in (f"{i}\t{token}\t", str(value), "\n")]
    )


def spelled(parts: list[str]) -> Reply:
    """Return an answer with log-probabilities: each number has 0.9, and its neighbour below (or above 0) 0.1."""
    content = []
    for part in parts[:-1]:
        top = [{"token": part, "logprob": float(np.log(0.9))}]
        if part.isdigit():
            other = str(int(part) - 1) if part != "0" else "1"
            top.append({"token": other, "logprob": float(np.log(0.1))})
        content.append({**top[0], "bytes": list(part.encode()), "top_logprobs": top})
    return said("".join(parts[:-1]), logprobs={"content": content})


def yes(body: dict[str, Any], before: int) -> Reply:
    """Say 1 to everything."""
    if "Text 1: " in prompt(body):
        return said(json.dumps([1] * len(truths(body))))
    return perfect(body, before)


def half(body: dict[str, Any], before: int) -> Reply:
    """Answer rightly or fail, in every way in turn, by a hash of the question."""
    if "Text 1: " not in prompt(body):
        return perfect(body, before)
    good = truths(body)
    bad = [said("I cannot tell."), said(json.dumps([*good, 0])), said(""), error(400, "no"),
           said(json.dumps(good) + json.dumps(good)), said(json.dumps([2, *good[1:]]))]  # fmt: skip
    number = sum(prompt(body).encode()) % 12
    return bad[number] if number < len(bad) else perfect(body, before)


class WordSource:
    """Held-out rows in which dimension j is word j: one-hot times a strength."""

    def __init__(
        self, documents: int = 60, length: int = 30, seq_len: int = 40, seed: int = 0
    ) -> None:
        rng = np.random.default_rng(seed)
        stream: list[int] = []
        for _ in range(documents):
            stream += [
                *rng.integers(0, END, int(rng.integers(length // 3, length * 2))).tolist(),
                END,
            ]
        n_seq = -(-len(stream) // seq_len)
        ids = np.full((n_seq, seq_len), END)
        ids.ravel()[: len(stream)] = stream
        lengths = np.full(n_seq, seq_len)
        lengths[-1] = len(stream) - seq_len * (n_seq - 1)
        self.ids, self.lengths = ids, lengths
        self.strength = rng.uniform(0.5, 5, ids.shape).astype(np.float32)
        self.hooks = {"h": END + 1}

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return x, seq, pos of all rows but each sequence's first one."""
        kept = np.arange(self.ids.shape[1])[None] < self.lengths[:, None]
        kept[:, 0] = False
        seq, pos = kept.nonzero()
        x = np.zeros((len(seq), END + 1), dtype=np.float32)
        x[np.arange(len(seq)), self.ids[seq, pos]] = self.strength[seq, pos]
        return x, seq, pos

    def heldout(self, batch_size: int):
        x, seq, pos = map(torch.from_numpy, self.rows())
        for i in range(0, len(x), batch_size):
            part = slice(i, i + batch_size)
            yield HeldoutRows({"h": x[part]}, seq[part], pos[part])

    def tokens(self) -> TokenTable:
        strings = dict(enumerate(decode(range(END + 1))))
        ids, lengths = torch.from_numpy(self.ids), torch.from_numpy(self.lengths)
        return TokenTable(ids, lengths, strings, ends=(END,))


def word_sae() -> SAE:
    """Return the SAE whose latents are the dimensions."""
    size = END + 1
    sae = SAE(SAEConfig(d_in=size, d_sae=size, activation=TopK(k=1)))
    eye = torch.eye(size)
    tensors = {"W_enc_t": eye, "W_dec": eye}
    with torch.no_grad():
        for name, parameter in sae.named_parameters():
            parameter.copy_(tensors[name] if name in tensors else torch.zeros_like(parameter))
    return sae.requires_grad_(False)


def word_fragments(width: int = 10, batch_size: int = 64, limit: int = 50_000, **source: int):
    """Return the fragments of the first words' latents."""
    cfg = FragmentConfig(width=width, batch_size=batch_size, limit=limit)
    latents = {"h": {"sae": torch.arange(N_LATENTS)}}
    made = WordSource(**source)
    return fragments(made, {"h": {"sae": word_sae()}}, latents, cfg)["h"]["sae"], made
