"""`transformers serve`, the model server that users of Hugging Face have: started here where its extra is installed."""

import contextlib
import os
import socket
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import httpx
import pytest
from acts_models import make_model
from interpret_llm_worlds import N_LATENTS, collected
from transformers import AutoTokenizer

from wsae.evals.config import LlmConfig
from wsae.evals.interpret import judges
from wsae.evals.interpret.endpoint import Endpoint
from wsae.evals.interpret.judges import dry_run, explain_latents

pytestmark = pytest.mark.skipif(
    not all(find_spec(name) for name in ("fastapi", "uvicorn", "openai")),
    reason="needs pip install 'wsae[serving]'",
)
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
START_S = 120


@contextlib.contextmanager
def served(model: Path, log: Path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
    with log.open("w") as out:
        server = subprocess.Popen(command, stdout=out, stderr=out,
                                  env={**os.environ, "HF_HUB_OFFLINE": "1"})  # fmt: skip
    try:
        for _ in range(START_S * 2):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).is_success:
                    break
            assert server.poll() is None, log.read_text()
            time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.terminate()
        server.wait(30)


def test_explaining_and_judging_against_transformers_serve(tmp_path, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    model = make_model(tmp_path / "model", positions=16384)
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(model)
    found = collected(4)
    with served(model, tmp_path / "server.log") as url:
        cfg = LlmConfig(endpoint=url, model=str(model), cache=str(tmp_path / "answers"))
        llm = Endpoint(cfg)
        plan = dry_run(llm, ["detection"], found)
        explained = explain_latents(found, llm)
        told = dict.fromkeys(range(N_LATENTS), "the cat")
        judged = judges.judged("detection", found, told, llm)
    spent = llm.budget.tokens
    assert explained.tally.requested == plan["explanation"].requests == N_LATENTS
    assert judged.tally.requested == plan["detection"].requests
    for tally in (explained.tally, judged.tally):
        assert tally.requested == tally.parsed + tally.failed
    assert spent > 0, "the server counts the tokens it was sent"
    again = Endpoint(cfg)  # the server is gone: every answer is on disk
    repeated = judges.judged("detection", found, told, again).tally
    assert (repeated.cached, repeated.failed) == (judged.tally.requested, judged.tally.failed)
    assert again.budget.tokens == 0
