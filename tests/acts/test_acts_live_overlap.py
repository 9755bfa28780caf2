"""A live model beside the trainer: how often it runs, how far, in which thread, and that none of it changes a row."""

import subprocess
import sys
import threading
import time
import weakref

import pytest
import torch
from acts_models import LAYERS, make_model, make_text

from wsae.acts.config import HarvestConfig, LiveConfig, TextConfig
from wsae.acts.language import load_language
from wsae.acts.live import LiveSource, LiveStream
from wsae.acts.stream import ahead
from wsae.core.errors import UserError
from wsae.sae.config import TopK
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import make_family
from wsae.train.loop import run_steps

TOKENS, BLOCK, SEQS = 600, 150, 3


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("live")
    make_model(path / "model")
    make_text(path / "a.jsonl", documents=120)
    return path


@pytest.fixture(scope="module")
def language(place):
    return load_language(str(place / "model"))


def config(place, *hooks: str, **values) -> HarvestConfig:
    text = TextConfig(path=str(place / "a.jsonl"))
    own = {"seq_len": 16, "batch_seqs": SEQS, "tokens": TOKENS, "heldout_fraction": 0.2}
    return HarvestConfig(model="unused", text=text, hooks=hooks, **{**own, **values})


def live(place, language, *hooks, overlap=False, tokens=TOKENS) -> LiveSource:
    sizes = LiveConfig(shuffle_tokens=BLOCK, stats_tokens=BLOCK)
    return LiveSource(config(place, *hooks, tokens=tokens), sizes, language, overlap)


class Passes:
    """Counts forward passes by the layers that ran, and notes the threads they ran in."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.layers = [0] * LAYERS
        self.threads: set[str] = set()
        for i, layer in enumerate(model.base_model.layers):
            layer.register_forward_hook(lambda *_, i=i: self.note(i))

    def note(self, layer: int) -> None:
        self.layers[layer] += 1
        self.threads.add(threading.current_thread().name)


@pytest.mark.parametrize("tokens", [TOKENS, 10**6])  # one with epochs of its own, one of the text's
def test_rows_computed_meanwhile_are_the_same_rows(place, language, tokens):
    streams = [
        live(place, language, "layers.0", "layers.1", overlap=o, tokens=tokens).stream(20, seed=3)
        for o in (False, True)
    ]
    for _ in range(200):
        one, other = (s.next() for s in streams)
        assert all(torch.equal(x, other[hook]) for hook, x in one.items())
        assert streams[0].state() == streams[1].state()
    state = streams[1].state()
    assert state["epoch"] >= 1
    again = live(place, language, "layers.0", "layers.1", overlap=True, tokens=tokens)
    resumed = again.stream(20, seed=3, state=state)
    for _ in range(12):
        one, other = streams[0].next(), resumed.next()
        assert all(torch.equal(x, other[hook]) for hook, x in one.items())


def test_without_overlap_the_model_stays_in_the_callers_thread(place):
    for overlap in (False, True):
        language = load_language(str(place / "model"))
        passes = Passes(language.model)
        stream = live(place, language, "layers.0", overlap=overlap).stream(50, seed=0)
        for _ in range(7):
            stream.next()
        names = {threading.current_thread().name} | ({"wsae-ahead"} if overlap else set())
        assert passes.threads == names


def test_an_error_met_meanwhile_is_raised_where_the_rows_are_wanted(place):
    language = load_language(str(place / "model"))
    stream = live(place, language, "layers.0", overlap=True).stream(50, seed=0)
    first = stream.next()
    assert torch.isfinite(first["layers.0"]).all()
    for name, p in language.model.named_parameters():
        if "layers.0.mlp" in name:
            p.data.fill_(torch.inf)
    with pytest.raises(UserError, match="layers.0: NaN or infinite activation"):
        _ = [stream.next() for _ in range(2 * TOKENS // 50)]


def test_a_value_computed_ahead_comes_with_its_error():
    assert ahead(lambda: 7).result() == 7

    def fails() -> int:
        raise UserError("no")

    broken = ahead(fails)
    for _ in range(2):
        with pytest.raises(UserError, match="no"):
            broken.result()


def test_a_program_ends_at_once_while_a_value_is_computed_ahead():
    code = """
import time
from wsae.acts.stream import ahead, leaving

def work():
    for _ in range(6000):
        if leaving():
            return
        time.sleep(0.01)

ahead(work)
print(time.monotonic())
"""
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True)
    assert time.monotonic() - float(done.stdout) < 30


@pytest.mark.parametrize("hooks", [("layers.0",), ("layers.0", "layers.0.mlp", "layers.1")])
def test_one_pass_of_the_model_serves_statistics_hooks_and_members_and_stops_early(place, hooks):
    """An epoch of training needs each sequence once, up to the deepest hook, however many read it."""
    language = load_language(str(place / "model"))
    source = live(place, language, *hooks)
    sequences = set()
    for step in source.flow.steps(heldout=False):
        sequences |= set(step.seq.tolist())
        if len(sequences) * 15 >= TOKENS:  # 15 of 16 positions are kept
            break
    needed = -(-(max(sequences) + 1) // SEQS)

    language = load_language(str(place / "model"))
    passes = Passes(language.model)
    source = live(place, language, *hooks)
    before = list(passes.layers)  # resolving the hooks' names runs the model once or twice
    members = tuple(MemberConfig(activation=TopK(k=k), expansion=2) for k in (1, 2, 4))
    cfg = TrainConfig(members=members, tokens=TOKENS, batch_size=30)
    family = make_family(cfg, source.stats())
    run_steps(cfg, family, source.stream(30, 0), 0, lambda *_, **__: None, lambda _: None)
    ran = [now - then for now, then in zip(passes.layers, before, strict=True)]
    deepest = max(int(hook.split(".")[1]) for hook in hooks)
    blocks = TOKENS // BLOCK
    for layer, count in enumerate(ran):
        if layer > deepest:
            assert count == 0
        else:  # a block may end within a batch of sequences: its other rows are computed again
            assert needed - 1 <= count <= needed + blocks


def test_the_first_block_is_not_computed_twice(place):
    language = load_language(str(place / "model"))
    passes = Passes(language.model)
    source = live(place, language, "layers.0")
    source.stats()
    after_stats = passes.layers[0]
    stream = source.stream(BLOCK // 3, seed=0)
    for _ in range(3):
        stream.next()
    assert passes.layers[0] == after_stats
    other = live(place, language, "layers.0").stream(BLOCK // 3, seed=0)  # computes it
    again = source.stream(BLOCK // 3, seed=0)
    assert torch.equal(again.next()["layers.0"], other.next()["layers.0"])
    stream.next()
    assert passes.layers[0] > after_stats
    assert not source._head  # the rows are let go with their block


def test_one_block_is_held_at_a_time(place, language, monkeypatch):
    held: list[weakref.ref] = []
    fill = LiveStream._fill

    def counting(self, where):
        assert not [ref for ref in held if ref() is not None]
        block = fill(self, where)
        held.extend(weakref.ref(x) for x in block.x.values())
        return block

    monkeypatch.setattr(LiveStream, "_fill", counting)
    stream = live(place, language, "layers.0", "layers.1").stream(30, seed=0)
    for _ in range(40):
        stream.next()
    assert len(held) > 2 * TOKENS // BLOCK
