"""The endpoint client against a real HTTP server that misbehaves in every way it must survive."""

import contextlib
import datetime
import email.utils
import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from interpret_server import KEY, Reply, config, error, said, serving

from wsae.core.errors import UserError
from wsae.evals.config import LlmConfig
from wsae.evals.interpret.asking import ChatMessage, Request, Unparsed, ask_all
from wsae.evals.interpret.endpoint import Endpoint, retry_after
from wsae.evals.interpret.local import open_llm
from wsae.evals.interpret.scoring import scorer_identity


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """A key, and no proxy between the test and the loopback."""
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("WSAE_TEST_KEY", KEY)


def requests(n, **more):
    return [Request((ChatMessage("user", f"question {i}"),), 20, 5, **more) for i in range(n)]


def ask(chat, tmp_path, n=1, **more):
    return Endpoint(config(chat, tmp_path / "cache", **more)).ask(requests(n))


def text_of(_number, answer):
    return answer.text


def once(bad, good=None):
    """Misbehave the first time a request comes, then answer."""
    return lambda _body, before: bad if before == 0 else good or said("yes")


def always(reply):
    return lambda _body, _before: reply


def test_answers_come_in_order_and_no_more_at_once_than_allowed(tmp_path):
    def echo(body, _before):
        reply = said(body["messages"][-1]["content"].upper())
        reply.delay = 0.02
        return reply

    with serving(echo) as chat:
        answers = ask(chat, tmp_path, 12, concurrency=3)
        assert [a.text for a in answers] == [f"QUESTION {i}" for i in range(12)]
        assert 1 < chat.most_at_once <= 3
        assert all(a.prompt_tokens == 100 and a.completion_tokens == 7 for a in answers)
        assert chat.headers[0]["authorization"] == f"Bearer {KEY}"


def test_the_key_is_in_no_file_no_answer_and_no_error_even_if_the_server_repeats_it(tmp_path):
    def leak(body, _before):
        return error(400, f"bad key {KEY}") if "0" in str(body["messages"]) else said(f"<{KEY}>")

    with serving(leak) as chat:
        llm = Endpoint(config(chat, tmp_path))
        answers = llm.ask(requests(2))
    assert answers[0].state == "failed"
    assert KEY not in repr(answers)
    assert KEY not in repr(llm.cfg)
    files = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert len(files) == 1
    assert not any(KEY.encode() in p.read_bytes() for p in files)
    with serving(always(error(401, f"bad key {KEY}"))) as chat, pytest.raises(UserError) as caught:
        ask(chat, tmp_path)
    assert KEY not in str(caught.value)


def test_a_judge_is_another_where_it_is_asked_or_thinks_otherwise(tmp_path):
    def identity(url="http://one/v1", **more):
        return scorer_identity("detection", Endpoint(LlmConfig(endpoint=url, model="m", **more)))

    assert identity() == identity(concurrency=2, retries=0, cache=str(tmp_path))
    others = [identity("http://two/v1"), identity(thinking_tokens=9), identity(temperature=None)]
    assert all(other != identity() for other in others)


def test_what_stands_in_for_a_key_stays_in_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("WSAE_TEST_KEY", "none")
    with serving(always(said("none of them"))) as chat:
        assert ask(chat, tmp_path)[0].text == "none of them"


@pytest.mark.parametrize(
    "bad",
    [error(500), error(503, "overloaded"), error(429, "slow down"), Reply("{cut", 200),
     Reply(close=True), error(408), Reply("<html>", 502, {"content-type": "text/html"})],
    ids=["500", "503", "429", "cut", "closed", "408", "502-html"],
)  # fmt: skip
def test_passing_troubles_are_tried_again(tmp_path, bad):
    with serving(once(bad)) as chat:
        answers = ask(chat, tmp_path, 2)
        assert [a.text for a in answers] == ["yes", "yes"]
        assert len(chat.bodies) == 4


def test_a_server_that_hangs_is_given_up_after_the_time_out_and_tried_again(tmp_path):
    with serving(once(Reply(delay=60))) as chat:
        start = time.monotonic()
        answers = ask(chat, tmp_path, timeout_s=1.0, retries=9)
        assert answers[0].text == "yes"
        assert 1.0 <= time.monotonic() - start < 50


def test_a_server_that_drips_bytes_is_given_up_too(tmp_path):
    """A read time-out alone would never end: every byte comes in time."""
    stop = threading.Event()

    def drip(listener):
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            connection.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1000\r\n\r\n")
            while not stop.wait(0.05):
                connection.sendall(b" ")

    import socket

    def quietly(listener):
        with contextlib.suppress(OSError):
            drip(listener)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=quietly, args=(listener,))
        thread.start()
        cfg = LlmConfig(
            endpoint=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", model="m", retries=0,
            timeout_s=0.4, cache=str(tmp_path),
        )  # fmt: skip
        with pytest.raises(UserError, match="time-out"):
            Endpoint(cfg).ask(requests(1))
        stop.set()
        thread.join()


def test_retry_after_is_honoured_by_every_request(tmp_path):
    with serving(once(error(429, retry_after="1"))) as chat:
        answers = ask(chat, tmp_path, 2, concurrency=2)
        assert [a.text for a in answers] == ["yes", "yes"]
        assert min(chat.times[2:]) - chat.times[0] >= 1.0


def test_a_longer_wait_than_allowed_fails_the_request_at_once(tmp_path):
    with serving(once(error(429, retry_after="3600"))) as chat:
        start = time.monotonic()
        (answer,) = ask(chat, tmp_path)
        assert answer.state == "failed"
        assert "longer wait" in answer.reason
        assert time.monotonic() - start < 60
        assert len(chat.bodies) == 1


@pytest.mark.parametrize("text", ["nan", "soon", "-1e999", ""])
def test_a_senseless_retry_after_is_ignored(text):
    assert retry_after({"retry-after": text}) is None


def test_retry_after_as_a_date():
    when = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=60)
    assert 55 < (retry_after({"retry-after": email.utils.format_datetime(when)}) or 0) <= 60
    assert retry_after({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}) == 0


def test_back_off_doubles_with_seeded_jitter():
    from wsae.evals.interpret.endpoint import TryAgain

    llm = Endpoint(LlmConfig(endpoint="http://h/v1", model="m", backoff_s=1.0, max_wait_s=5.0))
    waits = [llm._wait(TryAgain("x"), "key", attempt) for attempt in range(6)]
    assert waits == [llm._wait(TryAgain("x"), "key", attempt) for attempt in range(6)]
    for attempt, wait in enumerate(waits):
        assert wait is not None
        assert 0.5 <= wait / min(5.0, 2.0**attempt) < 1.5
    assert len({round(w or 0, 6) for w in waits[3:]}) == 3, "jitter differs between attempts"


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        (error(401, "no"), "the key in WSAE_TEST_KEY is not accepted"),
        (error(403, "no"), "the key in WSAE_TEST_KEY is not accepted"),
        (error(404, "The model `mock` does not exist"), "model 'mock' not found"),
        (Reply("<html>404</html>", 404, {"content-type": "text/html"}), "no such address"),
        (error(402, "pay"), "nothing left on the account"),
        (Reply('{"error": {"code": "insufficient_quota"}}', 429), "nothing left on the account"),
        (Reply("", 307, {"location": "https://elsewhere/v1"}), "moved to https://elsewhere/v1"),
        (Reply("<!doctype html><title>hello</title>", 200, {"content-type": "text/html"}), "a web page"),
        (Reply(" <p>hello", 200, {}), "a web page"),
    ],
    ids=["401", "403", "404-model", "404-page", "402", "quota", "redirect", "html", "html-untold"],
)  # fmt: skip
def test_what_no_repetition_mends_ends_the_run_with_one_line(tmp_path, reply, line):
    with serving(always(reply)) as chat:
        with pytest.raises(UserError, match=line) as caught:
            ask(chat, tmp_path, 5, concurrency=1)
        assert len(chat.bodies) == 1, "not tried again, and nothing else sent"
    assert "\n" not in str(caught.value)


def test_a_missing_key_is_named(tmp_path, monkeypatch):
    monkeypatch.delenv("WSAE_TEST_KEY")
    with serving(always(error(401))) as chat:
        with pytest.raises(UserError, match="no key in WSAE_TEST_KEY"):
            ask(chat, tmp_path)
        assert "authorization" not in chat.headers[0]


def test_no_server_at_all_is_one_line(tmp_path):
    with serving(always(said("x"))) as chat:
        url = chat.url
    cfg = LlmConfig(endpoint=url, model="m", retries=1, backoff_s=0.01, cache=str(tmp_path))
    with pytest.raises(UserError, match="cannot connect, 2 times"):
        Endpoint(cfg).ask(requests(3))


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        (Reply('{"choices": []}'), "no choices"),
        (Reply('{"choices": [7]}'), "no choices"),
        (Reply("[1, 2]"), "no JSON object"),
        (Reply('"text"'), "no JSON object"),
        (said(""), "empty content"),
        (said(" \n"), "empty content"),
        (said(None), "empty content"),
        (said(["part"]), "empty content"),
        (Reply('{"choices": [{"message": "text"}]}'), "empty content"),
        (error(400, "context\nlength\u202e exceeded"), "HTTP 400: context length\u2426 exceeded"),
        (Reply('{"error": {"message": "upstream"}}'), "no choices: upstream"),
    ],
)
def test_useless_answers_are_failures_with_a_reason_and_not_tried_again(tmp_path, reply, reason):
    with serving(always(reply)) as chat:
        (answer,) = ask(chat, tmp_path)
        assert answer.state == "failed"
        assert reason in answer.reason
        assert len(chat.bodies) == 1


def test_attempts_end(tmp_path):
    with serving(always(error(500))) as chat:
        (answer,) = ask(chat, tmp_path, retries=2)
        assert (answer.state, answer.reason) == ("failed", "HTTP 500")
        assert len(chat.bodies) == 3


def test_an_endless_reply_is_cut(tmp_path, monkeypatch):
    from wsae.evals.interpret import endpoint

    monkeypatch.setattr(endpoint, "MAX_REPLY_BYTES", 1 << 16)
    with serving(always(said("x" * (1 << 20)))) as chat:
        (answer,) = ask(chat, tmp_path, retries=0)
        assert (answer.state, answer.reason) == ("failed", "not JSON")


def test_answers_are_kept_and_found_under_the_content_alone(tmp_path, monkeypatch):
    with serving(always(said("yes"))) as chat:
        first = ask(chat, tmp_path, 3)
        monkeypatch.setenv("WSAE_TEST_KEY", "another")
        second = ask(chat, tmp_path, 3, concurrency=1, retries=9, max_requests=7)
        assert len(chat.bodies) == 3
        assert [a.text for a in second] == [a.text for a in first]
        assert all(a.cached for a in second)
        assert not any(a.cached for a in first)
        ask(chat, tmp_path, 3, temperature=0.5)
        ask(chat, tmp_path, 3, seed=1)
        assert len(chat.bodies) == 9, "other parameters are other requests"


def test_equal_requests_are_asked_once_and_counted_as_often_as_they_come(tmp_path):
    with serving(always(said("yes"))) as chat:
        llm = Endpoint(config(chat, tmp_path))
        results, tally = ask_all(llm, [requests(1)[0]] * 4, text_of, "t")
        assert results == ["yes"] * 4
        assert len(chat.bodies) == 1
    assert (tally.requested, tally.parsed, tally.cached) == (4, 4, 3)
    assert tally.prompt_tokens + tally.completion_tokens == llm.budget.tokens == 107


def damage(path, how):
    data = path.read_bytes()
    if how == "cut":
        path.write_bytes(data[: len(data) // 2])
    elif how == "altered":
        path.write_bytes(data.replace(b'"text": "yes"', b'"text": "no!"'))
    elif how == "swapped":
        others = [p for p in path.parents[1].rglob("*.json") if p != path]
        path.write_bytes(others[0].read_bytes())
    elif how == "empty":
        path.write_bytes(b"")
    else:
        path.write_bytes(b"\xff\xfe[]")


@pytest.mark.parametrize("how", ["cut", "altered", "swapped", "empty", "binary"])
def test_a_damaged_answer_is_named_and_asked_again(tmp_path, how):
    with serving(always(said("yes"))) as chat:
        llm = Endpoint(config(chat, tmp_path))
        asked = requests(3)
        llm.ask(asked)
        path = llm.cache.path(llm.key(asked[1]))
        damage(path, how)
        results, tally = ask_all(llm, asked, text_of, "t")
        assert results == ["yes"] * 3
        assert len(chat.bodies) == 4
        assert tally.damaged == [str(path)]
        assert tally.cached == 2
        assert not ask_all(llm, asked, text_of, "t")[1].damaged, "mended"


def test_a_paid_answer_is_kept_even_if_empty(tmp_path):
    with serving(always(said(""))) as chat:
        ask(chat, tmp_path)
        (answer,) = ask(chat, tmp_path)
        assert (answer.state, answer.reason, answer.cached) == ("failed", "empty content", True)
        assert len(chat.bodies) == 1


def test_the_budget_of_requests_is_a_hard_stop_retries_included(tmp_path):
    with serving(once(error(500))) as chat:
        llm = Endpoint(config(chat, tmp_path, max_requests=5, concurrency=1))
        results, tally = ask_all(llm, requests(10), text_of, "t")
        assert len(chat.bodies) == 5
    assert results == ["yes", "yes", *[None] * 8]
    assert (tally.parsed, tally.failed, tally.not_asked) == (2, 1, 7)
    assert tally.reasons == {"HTTP 500, then budget": 1, "budget": 7}


@pytest.mark.parametrize("concurrency", [1, 4])
def test_the_budget_of_tokens_stops_before_the_request_that_could_exceed_it(tmp_path, concurrency):
    """The server charges 107 tokens a request; each may cost its estimate and its limit."""
    most = requests(1)[0].estimated_tokens + 20
    assert most < 107
    with serving(always(said("yes"))) as chat:
        llm = Endpoint(config(chat, tmp_path, max_tokens=107 * 4 + most, concurrency=concurrency))
        _, tally = ask_all(llm, requests(10), text_of, "t")
        assert 5 <= len(chat.bodies) <= 4 + concurrency
        assert tally.prompt_tokens + tally.completion_tokens == 107 * len(chat.bodies)
        assert tally.not_asked == 10 - len(chat.bodies)
        sent = len(chat.bodies)
        again, tally = ask_all(llm, requests(10), text_of, "t")
        assert len(chat.bodies) == sent, "closed for good"
        assert (tally.cached, tally.not_asked) == (sent, 10 - sent), "but what is on disk is free"


def test_a_budget_of_nothing_asks_nothing(tmp_path):
    with serving(always(said("yes"))) as chat:
        (answer,) = ask(chat, tmp_path, max_tokens=0)
        assert (answer.state, answer.reason) == ("not asked", "budget")
        assert not chat.bodies


def test_tokens_are_estimated_where_the_endpoint_does_not_count(tmp_path):
    body = {"choices": [{"message": {"content": "x" * 30}}]}
    with serving(always(Reply(json.dumps(body)))) as chat:
        llm = Endpoint(config(chat, tmp_path))
        (answer,) = llm.ask(requests(1))
    assert (answer.prompt_tokens, answer.completion_tokens) == (round(10 / 3) + 8, 10)
    assert llm.budget.tokens == answer.prompt_tokens + 10


def test_time_outs_are_taken_for_paid_and_refusals_are_not(tmp_path):
    with serving(once(Reply(delay=60))) as chat:
        llm = Endpoint(config(chat, tmp_path / "a", timeout_s=1.0, retries=9))
        llm.ask(requests(1))
        given_up = len(chat.bodies) - 1  # one, or more where the machine is very busy
    assert llm.budget.tokens == 107 + given_up * requests(1)[0].estimated_tokens
    with serving(once(error(429))) as chat:
        llm = Endpoint(config(chat, tmp_path / "b"))
        llm.ask(requests(1))
    assert llm.budget.tokens == 107


def test_failures_and_parse_failures_are_counted_and_sum_up(tmp_path):
    def mixed(body, _before):
        i = int(body["messages"][0]["content"].split()[-1])
        return [said("yes"), said("???"), said(""), error(400, "no")][i % 4]

    def parse(number, answer):
        if answer.text != "yes":
            raise Unparsed("not yes")
        return number

    with serving(mixed) as chat:
        llm = Endpoint(config(chat, tmp_path))
        results, tally = ask_all(llm, [*requests(12), None], parse, "t")
    assert [r for r in results if r is not None] == [0, 4, 8]
    assert (tally.requested, tally.parsed, tally.failed, tally.not_asked) == (13, 3, 9, 1)
    assert tally.reasons == {
        "unparsed: not yes": 3, "empty content": 3, "HTTP 400: no": 3, "no explanation": 1
    }  # fmt: skip


def test_missing_log_probabilities_end_the_run_and_are_not_kept(tmp_path):
    with serving(always(said("yes"))) as chat:
        llm = Endpoint(config(chat, tmp_path))
        with pytest.raises(UserError, match="no log-probabilities; use --simulator json"):
            llm.ask(requests(1, logprobs=True))
        assert llm.peek(requests(1, logprobs=True)[0]) is None


def test_it_works_where_a_loop_is_running_already(tmp_path):
    import asyncio

    async def notebook(chat):
        return ask(chat, tmp_path, 2)

    with serving(always(said("yes"))) as chat:
        assert [a.text for a in asyncio.run(notebook(chat))] == ["yes", "yes"]


@pytest.mark.parametrize(
    ("endpoint", "line"),
    [
        ("api.openai.com/v1", "not a URL"),
        ("ftp://host/v1", "not a URL"),
        ("http://", "not a URL"),
        ("http://host:port/v1", "not a URL"),
        ("http://[::1/v1", "not a URL"),
        ("https://user:hunter2@host/v1", "a user, password"),
        ("https://host/v1?key=hunter2", "a user, password"),
    ],
)
def test_a_bad_endpoint_is_one_line_that_does_not_repeat_it(endpoint, line):
    with pytest.raises(UserError, match=line) as caught:
        LlmConfig.parse({"endpoint": endpoint, "model": "m"})
    assert "hunter2" not in str(caught.value)


def test_settings_that_cannot_work_are_refused(monkeypatch):
    with pytest.raises(UserError, match="model: empty"):
        LlmConfig.parse({"endpoint": "http://host/v1"})
    with pytest.raises(UserError, match="no language model"):
        open_llm(LlmConfig())
    monkeypatch.setenv("WSAE_TEST_KEY", "sk\u00e9")
    with pytest.raises(UserError, match="WSAE_TEST_KEY: holds characters") as caught:
        open_llm(LlmConfig(endpoint="http://h/v1", model="m", key_env="WSAE_TEST_KEY"))
    assert "sk\u00e9" not in str(caught.value)


RUN = """
import sys
from wsae.evals.config import LlmConfig
from wsae.evals.interpret.asking import ChatMessage, Request
from wsae.evals.interpret.endpoint import Endpoint
cfg = LlmConfig(endpoint=sys.argv[1], model="mock", cache=sys.argv[2], concurrency=int(sys.argv[3]), timeout_s=60)
requests = [Request((ChatMessage("user", f"question {i}"),), 20, 5) for i in range(24)]
print(sum(a.state == "answered" for a in Endpoint(cfg).ask(requests)))
"""


def run(chat, cache, concurrency):
    arguments = [chat.url, str(cache), str(concurrency)]
    return subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.PIPE)


@pytest.mark.parametrize("concurrency", [1, 4])
def test_a_killed_run_repeats_no_answered_request(tmp_path, concurrency):
    """The server answers 10 requests and lets the others hang until the client is killed: those were never answered."""
    open_gate = threading.Event()
    answered: list[str] = []
    lock = threading.Lock()

    def gate(body, _before):
        with lock:
            if open_gate.is_set() or len(answered) < 10:
                answered.append(json.dumps(body))
                return said("yes")
        return Reply(delay=60, close=True)

    with serving(gate) as chat:
        with run(chat, tmp_path, concurrency) as killed:
            deadline = time.monotonic() + 60
            while len(chat.bodies) < 10 + concurrency and time.monotonic() < deadline:
                time.sleep(0.02)
            killed.send_signal(signal.SIGKILL)
        open_gate.set()
        before = len(list(tmp_path.rglob("*.json")))
        assert before == 10
        with run(chat, tmp_path, concurrency) as resumed:
            assert resumed.stdout is not None
            assert resumed.stdout.read().split() == [b"24"]
        assert len(answered) == len(set(answered)) == 24, "no answered request came again"
        assert not list(tmp_path.rglob("*.tmp"))
