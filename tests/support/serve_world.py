"""A tiny run with weights, a tiny model behind it and hostile texts in it, its index, and a server for it."""

import contextlib
import http.client
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from acts_models import make_model
from report_fixture import MEMBERS, NEW_LATENT, write_interpretation, write_run
from report_text import Shape

from wsae.core.artifact import read_manifest, write_manifest
from wsae.core.files import read_json, write_json, write_text
from wsae.core.tensors import load_tensors
from wsae.sae import SAE
from wsae.sae.config import SAEConfig
from wsae.serve import server
from wsae.serve.app import Live, application
from wsae.serve.index import Shelf
from wsae.serve.server import Gate

HOOK, D_IN, D_SAE = "layers.1", 16, 64
SHAPE = Shape(hooks=(HOOK,), d_in=D_IN, d_sae=D_SAE, latents=12)
PLANTED = " Zyzzyvä "
"""A word that exactly one context of exactly one latent of each member holds."""


def write_world(path: Path, model: Path | None = None) -> Path:
    """Write an evaluated and interpreted run with weights."""
    write_interpretation(write_run(path, SHAPE))
    spare = next(i for i in range(D_SAE) if i not in latents_of(path, "interpretation", "plain"))
    renumber(path, spare)
    plant(path)
    config = read_json(path / "config.json")
    members = [{"label": name} for name in MEMBERS]
    config["train"] = {"members": members, "tokens": 262144}
    if model is not None:
        harvest = {"model": str(model), "text": {"path": "builtin"}}
        config["source"] = {"kind": "live", "harvest": harvest, "hooks": [HOOK]}
    write_json(path / "config.json", config)
    arrays = load_tensors(path / "evaluation" / "arrays.safetensors")
    for seed, name in enumerate(MEMBERS):
        sae = SAE(
            SAEConfig.parse({"d_in": D_IN, "d_sae": D_SAE, "activation": {"kind": "topk", "k": 4}}),
            seed=seed,
        )
        sae.gamma.copy_(arrays[f"{HOOK}|{name}|gamma"])
        sae.save(path / "members" / HOOK / name)
    seal_run(path)
    return path


def seal_run(path: Path) -> None:
    """Write the run's manifest, again after an edit."""
    files = ["config.json", "gamma.json", "metrics.jsonl"]
    files += [f"members/{HOOK}/{name}/manifest.json" for name in MEMBERS]
    config = read_json(path / "config.json")
    write_manifest(path, "run", config, files, info={"members": {HOOK: list(MEMBERS)}})


def latents_of(run: Path, part: str, member: str) -> dict[int, dict]:
    """Return latent -> entry of a part's contexts, read anew."""
    found = json.loads((run / part / "contexts.json").read_text())[HOOK][member]
    return {entry["latent"]: entry for entry in found}


def reseal(run: Path, part: str) -> None:
    """Write the manifest of a part again after an edit."""
    names = [p.name for p in (run / part).iterdir() if p.name not in ("manifest.json", ".lock")]
    write_manifest(run / part, part, {}, names)


def edit_contexts(run: Path, part: str, change) -> None:
    """Apply `change` to the contexts of a part and seal it again."""
    place = run / part / "contexts.json"
    value = json.loads(place.read_text())
    change(value[HOOK])
    write_text(place, json.dumps(value))
    reseal(run, part)


def renumber(run: Path, spare: int) -> None:
    """Give the latent that the member cannot have a number that it can."""

    def change(members: dict) -> None:
        for entry in members["plain"]:
            entry["latent"] = spare if entry["latent"] == NEW_LATENT else entry["latent"]

    edit_contexts(run, "interpretation", change)


def plant(run: Path) -> None:
    """Put the planted word into one context of the last latent of each member."""

    def change(members: dict) -> None:
        for entries in members.values():
            entries[-1]["contexts"][0]["tokens"][1] = PLANTED

    edit_contexts(run, "evaluation", change)


def arrays_of(run: Path, member: str) -> dict[str, np.ndarray]:
    """Return the evaluation's arrays of a member."""
    found = load_tensors(run / "evaluation" / "arrays.safetensors")
    start = f"{HOOK}|{member}|"
    return {k.removeprefix(start): v.numpy() for k, v in found.items() if k.startswith(start)}


def sae_of(run: Path, member: str) -> SAE:
    """Return a member's SAE."""
    assert read_manifest(run, "run", verify=False)
    return SAE.load(run / "members" / HOOK / member)


def tiny_model(path: Path) -> Path:
    """Save a tiny Llama whose final norm has a gain worth folding in."""
    from transformers import LlamaForCausalLM

    make_model(path)
    model = LlamaForCausalLM.from_pretrained(path)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.rand(D_IN, generator=generator) + 0.2)
    model.save_pretrained(path)
    return path


class Answer(NamedTuple):
    """A reply: status, headers in lower case, text."""

    status: int
    headers: dict[str, str]
    text: str


class Client:
    """Sends requests to one port."""

    def __init__(self, port: int, host: str = "127.0.0.1") -> None:
        self.port, self.host = port, host
        self.root = f"http://127.0.0.1:{port}"

    def ask(
        self, path: str, method: str = "GET", body: str = "", headers: dict[str, str] | None = None
    ) -> Answer:
        """Send one request exactly as told."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        connection.request(method, path, body.encode() or None, headers or {})
        reply = connection.getresponse()
        text = reply.read().decode()
        connection.close()
        return Answer(reply.status, {k.lower(): v for k, v in reply.getheaders()}, text)

    def json(self, path: str, **how) -> object:
        """Return the JSON of a request that must succeed."""
        answer = self.ask(path, **how)
        assert answer.status == 200, answer.text
        return json.loads(answer.text)


@contextlib.contextmanager
def serving(
    *runs: tuple[str, Path, Path],
    gate: Gate = Gate(),  # noqa: B008  (frozen)
    live: Live | None = None,
    host: str = "127.0.0.1",
) -> Iterator[Client]:
    """Serve (slug, run, index) in a thread, over a real socket."""
    listening = server.listen(host, 0)
    app = application([Shelf(*run) for run in runs], live or Live(), gate)
    running = server.configured(app)
    thread = threading.Thread(target=running.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    end = time.monotonic() + 60
    while not running.started and time.monotonic() < end:
        time.sleep(0.02)
    try:
        yield Client(listening.getsockname()[1], host)
    finally:
        running.should_exit = True
        thread.join(60)
        listening.close()
