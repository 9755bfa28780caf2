"""A finished run on made-up text in which some latents are planted: each fires on the words of one topic."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from wsae.acts.source import HeldoutRows
from wsae.acts.tokens import TokenTable
from wsae.core.artifact import write_manifest
from wsae.core.files import digest, write_json
from wsae.core.progress import Progress, quiet
from wsae.evals.config import ContextConfig, InterpretConfig, LlmConfig
from wsae.evals.interpret.asking import Answer, Llm, Request
from wsae.sae import SAE, SAEConfig, TopK
from wsae.sae.config import GammaConfig
from wsae.train.config import MemberConfig, TrainConfig

TOPICS, PER_TOPIC, FILLERS, NOISE = 8, 6, 20, 8
WIDTH, SEQ_LEN, N_SEQ, HOOK = 8, 32, 160, "layers.1"
D_IN = TOPICS + NOISE
CFG = InterpretConfig(
    contexts=ContextConfig(
        width=WIDTH, n_latents=12, min_windows=6, n_score=10, n_hard=5, reservoir=30, pool=400
    ),
    scores=("embedding",),
    draws=100,
    batch_size=500,
)


class Text:
    """Windows of one topic each, in documents of four windows; activations tell a token's topic, and noise."""

    def __init__(self, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        topic = np.repeat(rng.integers(0, TOPICS, (N_SEQ, SEQ_LEN // WIDTH)), WIDTH, axis=1)
        is_topical = rng.random((N_SEQ, SEQ_LEN)) < 0.6
        word = topic * PER_TOPIC + rng.integers(0, PER_TOPIC, topic.shape)
        filler = TOPICS * PER_TOPIC + rng.integers(0, FILLERS, topic.shape)
        ids = np.where(is_topical, word, filler)
        x = np.abs(rng.normal(0, 0.05, (*topic.shape, D_IN)))
        x[..., TOPICS:] += (rng.random((*topic.shape, NOISE)) < 0.2) * 2
        strength = 3 + rng.random(topic.shape)
        np.put_along_axis(
            x, topic[..., None], np.where(is_topical, strength, 0.05)[..., None], axis=2
        )
        self.x = torch.from_numpy(x.reshape(-1, D_IN)).float()
        self.seq, self.pos = (
            torch.from_numpy(a.ravel()) for a in np.indices(ids.shape, dtype=np.int64)
        )
        names = {i: f" t{i // PER_TOPIC}w{i % PER_TOPIC}" for i in range(TOPICS * PER_TOPIC)}
        names |= {TOPICS * PER_TOPIC + i: f" f{i}" for i in range(FILLERS)}
        lengths = torch.full((N_SEQ,), SEQ_LEN)
        self.table = TokenTable(torch.from_numpy(ids).int(), lengths, names, ())
        self.hooks = {HOOK: D_IN}
        self.passes = 0

    def heldout(self, batch_size: int):
        self.passes += 1
        for first in range(0, len(self.x), batch_size):
            part = slice(first, first + batch_size)
            yield HeldoutRows({HOOK: self.x[part]}, self.seq[part], self.pos[part])

    def tokens(self) -> TokenTable:
        return self.table


def planted_sae(k: int = 3, shift: int = 0, dead: int = 2) -> SAE:
    """Latent i reads dimension i + shift: the topics' are planted, the others read noise, the last ones never fire."""
    sae = SAE(SAEConfig(d_in=D_IN, d_sae=D_IN + dead, activation=TopK(k=k)))
    rows = torch.zeros(D_IN + dead, D_IN)
    rows[:D_IN] = torch.eye(D_IN).roll(shift, 1)
    rows[D_IN:, 0] = -1.0
    with torch.no_grad():
        sae.W_enc_t.copy_(rows)
        sae.W_dec.copy_(rows + 0.01)
        sae.b_enc.fill_(-0.5)
    return sae.requires_grad_(False)


def write_planted_run(path: Path) -> Path:
    """Write a run directory with a plain and a weighted member, whose latents are matched one to one."""
    members = {"plain": planted_sae(), "variance-a1": planted_sae(shift=1)}
    rules = {"plain": GammaConfig(), "variance-a1": GammaConfig(rule="variance")}
    train = TrainConfig(
        members=tuple(
            MemberConfig(gamma=rules[name], d_sae=D_IN + 2, activation=TopK(k=3), label=name)
            for name in members
        ),
        tokens=1000,
    )
    write_json(path / "config.json", {"train": train.to_dict(), "source": {"hooks": [HOOK]}})
    write_json(path / "gamma.json", {HOOK: {n: {"rule": r.rule} for n, r in rules.items()}})
    for name, sae in members.items():
        sae.save(path / "members" / HOOK / name)
    info = {"members": {HOOK: list(members)}}
    write_manifest(path, "run", {}, ["config.json", "gamma.json"], info=info)
    return path


class BagEncoder:
    """A text as the unit sum of its words' random vectors: texts with the same words are near."""

    name = "bag of words"

    def __init__(self) -> None:
        self.calls = 0

    def encode(self, texts: Sequence[str], progress: Progress = quiet) -> np.ndarray:  # noqa: ARG002
        self.calls += 1
        rows = np.array([sum(map(self.vector, text.split())) for text in texts])
        return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)

    @staticmethod
    def vector(word: str) -> np.ndarray:
        return np.random.default_rng(int(digest(word)[:12], 16)).standard_normal(64)


class KeywordLlm(Llm):
    """Explains by the marked words, and says that a text holds the pattern when it has one of them."""

    def __init__(self, unparsable: int = 0, stop_after: int | None = None) -> None:
        super().__init__(LlmConfig(simulator="json"), "keywords")
        self.asked = 0
        self.unparsable, self.stop_after = unparsable, stop_after

    def peek(self, request: Request) -> Answer | None:  # noqa: ARG002
        return None

    def question(self, request: Request) -> dict:
        return {"messages": [list(message) for message in request.messages]}

    def answer_new(self, requests, done) -> None:
        raise NotImplementedError

    def ask(self, requests, task: str = "ask", progress: Progress = quiet) -> list[Answer]:  # noqa: ARG002
        return [self.answer(request.messages[-1].content) for request in requests]

    def answer(self, text: str) -> Answer:
        self.asked += 1
        if self.asked <= self.unparsable:
            return Answer("answered", "I would rather not say")
        if self.stop_after is not None and self.asked > self.stop_after:
            return Answer("not asked", reason="budget")
        if not text.startswith("Explanation:"):
            words = re.findall(r"\w+", " ".join(re.findall(r"<<(.*?)>>", text)))
            return Answer("answered", f"[EXPLANATION]: {' '.join(sorted(set(words)))}")
        keywords = set(text.splitlines()[0].split()[1:])
        texts = re.findall(r"^Text \d+: (.*)$", text, re.M)
        if texts:
            found = [int(bool(keywords & set(re.findall(r"\w+", one)))) for one in texts]
            return Answer("answered", str(found))
        tokens = re.findall(r"^(\d+)\t ?(.*)$", text, re.M)
        return Answer("answered", str([[int(i), 10 * (word in keywords)] for i, word in tokens]))
