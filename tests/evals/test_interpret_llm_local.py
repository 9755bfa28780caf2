"""A local Hugging Face model as the language model: in this process, and behind a real chat server."""

import json
import math
import threading
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from acts_models import make_kind, make_model, rewritten
from interpret_llm_worlds import N_LATENTS, collected, word_fragments
from interpret_server import Reply, config, serving
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from wsae.core.errors import UserError
from wsae.evals.config import LlmConfig
from wsae.evals.interpret import judges
from wsae.evals.interpret.asking import ChatMessage, Request, ask_all
from wsae.evals.interpret.endpoint import Endpoint
from wsae.evals.interpret.judges import (
    dry_run,
    explain_latents,
    simulation_scores,
)
from wsae.evals.interpret.local import UNKNOWN, LocalModel, SlotReader, open_llm
from wsae.evals.interpret.scoring import asks_again
from wsae.use.attribute import one_token

CHATML = (
    "{% for m in messages %}<s>{{ m['role'] }}\n{{ m['content'] }}</s>{% endfor %}<s>assistant:"
)
NO_SYSTEM = (
    "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "tiny")


def local(model: Path, cache: Path, **more) -> LocalModel:
    llm = open_llm(LlmConfig(endpoint=f"local:{model}", cache=str(cache), **more))
    assert isinstance(llm, LocalModel)
    return llm


def widened(llm: LocalModel, positions: int = 16384) -> LocalModel:
    """Our prompts are longer than the tiny model's 128 positions; rotary embeddings reach further."""
    llm.language.model.config.max_position_embeddings = positions
    return llm


def ids_of(llm: LocalModel, request: Request) -> list[int]:
    return llm._prompt(request.messages)


QUESTION = Request(
    (ChatMessage("system", "be brief"), ChatMessage("user", "the cat sat")), 6, 3, logprobs=True
)


@pytest.mark.parametrize("end", [True, False], ids=["stops", "cut"])
def test_greedy_answers_equal_a_search_without_cache(model, tmp_path, end):
    """The model's second token ends the text; where nothing is an end, it writes to the limit."""
    llm = local(model, tmp_path)
    tokenizer = llm.language.tokenizer
    ends = (1, 2) if end else ()
    if not end:
        llm.language.model.generation_config.eos_token_id = tokenizer.eos_token = None
    (answer,) = llm.ask([QUESTION])
    prompt, steps, written = ids_of(llm, QUESTION), [], []
    while len(written) < 6:
        with torch.no_grad():
            logits = llm.language.model(torch.tensor([prompt + written])).logits[0, -1]
        if int(logits.argmax()) in ends:
            break
        steps.append(logits.softmax(-1))
        written.append(int(logits.argmax()))
    assert (len(written) == 6) == (answer.finish == "length") == (not end)
    assert answer.text == tokenizer.decode(written, skip_special_tokens=True)
    assert (answer.prompt_tokens, answer.completion_tokens) == (len(prompt), len(written))
    for token, chosen, p in zip(answer.tokens, written, steps, strict=True):
        assert token.text == tokenizer.decode([chosen])
        same = [i for i in p.topk(20).indices.tolist() if tokenizer.decode([i]) == token.text]
        assert math.exp(token.top[token.text]) == pytest.approx(float(p[same].sum()), rel=1e-4)
        assert math.fsum(map(math.exp, token.top.values())) == pytest.approx(
            float(p.topk(20).values.sum()), rel=1e-4
        )


def test_a_judge_without_its_head_or_that_is_no_language_model_is_refused(tmp_path):
    lacking = rewritten(
        make_model(tmp_path / "m"), lambda x: {k: v for k, v in x.items() if "lm_head" not in k}
    )
    with pytest.raises(UserError, match=r"predictions .*depends on .*lm_head\.weight"):
        local(lacking, tmp_path)
    with pytest.raises(UserError, match="continues no text; use a causal"):
        local(make_kind(tmp_path / "encoder", "modernbert"), tmp_path)


def test_answers_are_kept_and_another_model_has_its_own(model, tmp_path):
    first = local(model, tmp_path / "c").ask([QUESTION, QUESTION])
    assert [a.cached for a in first] == [False, True]
    again = local(model, tmp_path / "c")
    assert again.peek(QUESTION) is not None
    assert again.ask([QUESTION])[0].cached
    assert again.budget.tokens == 0
    other = make_model(tmp_path / "other", kind="neox")
    assert local(other, tmp_path / "c").peek(QUESTION) is None


@pytest.mark.parametrize("template", [None, CHATML, NO_SYSTEM], ids=["none", "chat", "no-system"])
def test_turns_follow_the_models_template(model, tmp_path, template):
    llm = local(model, tmp_path)
    llm.language.tokenizer.chat_template = template
    text = llm.language.tokenizer.decode(ids_of(llm, QUESTION))
    if template is None:
        assert text == "be brief\n\n### Question\nthe cat sat\n\n### Answer\n"
    elif template == CHATML:
        assert text == "<s>system\nbe brief</s><s>user\nthe cat sat</s><s>assistant:"
    else:
        assert text == "<s>user\nbe brief\n\nthe cat sat</s><s>assistant:"


def test_a_template_that_refuses_everything_is_one_line(model, tmp_path):
    llm = local(model, tmp_path)
    llm.language.tokenizer.chat_template = "{{ raise_exception('never') }}"
    with pytest.raises(UserError, match="its chat template refuses our turns"):
        llm.ask([QUESTION])


def test_budgets_and_lengths_are_hard_stops(model, tmp_path):
    llm = local(model, tmp_path, max_requests=1)
    other = Request((ChatMessage("user", "two dogs run"),), 6, 3)
    states = [a.state for a in llm.ask([QUESTION, other, QUESTION])]
    assert states == ["answered", "not asked", "answered"], "the last one is on disk"
    (answer,) = local(model, tmp_path).ask(
        [Request((ChatMessage("user", "the cat " * 200),), 6, 3)]
    )
    assert (answer.state, answer.reason) == ("failed", "longer than the model's 128 positions")


def numbers(llm, prompt, slots, split):
    """Recompute every slot from passes of their own: E = sum v P(v) / sum P(v), by the chain rule."""
    tokenizer, model = llm.language.tokenizer, llm.language.model

    def plain(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    def after(ids):
        with torch.no_grad():
            return model(torch.tensor([ids])).logits[0, -1].double().softmax(-1)

    ids, out = list(prompt), []
    for slot in slots:
        ids += plain(slot)
        first = after(ids)
        mass = [float(first[plain(str(v))[0]]) for v in range(10)]
        ten = mass[1] * float(after([*ids, plain("1")[0]])[plain("0")[0]])
        assert split
        mass = [*mass, ten]
        mass[1] -= ten
        out.append(sum(v * p for v, p in enumerate(mass)) / sum(mass))
        ids += plain(UNKNOWN)
    return out


def test_slots_are_read_in_one_pass_as_many_passes_would(model, tmp_path, monkeypatch):
    from wsae.evals.interpret import local as slots

    monkeypatch.setattr(slots, "_NEGLIGIBLE", 0.0)
    llm = local(model, tmp_path)
    prompt = ids_of(llm, QUESTION)
    pieces = ("1\tthe\t", "2\t cat\t", "3\t sat\t")
    reader = SlotReader(llm.language.model, llm.language.tokenizer, llm.language.device)
    with torch.inference_mode():
        found = reader.expected(prompt, pieces)
    assert found == pytest.approx(numbers(llm, prompt, pieces, split=True), abs=1e-4)
    assert all(0 <= v <= 10 for v in found)
    (answer,) = llm.ask([Request(QUESTION.messages, 9, 9, logprobs=True, slots=pieces)])
    assert answer.values == pytest.approx(found)
    assert (
        llm.ask([Request(QUESTION.messages, 9, 9, logprobs=True, slots=pieces)])[0].values
        == answer.values
    )


def test_a_ten_of_one_token_is_read_directly():
    class Tokenizer:
        def __call__(self, text, **_):
            table = {str(v): [v] for v in range(11)}
            return {"input_ids": table.get(text, [11])}

    class Model:
        def forward(self, input_ids, **_):
            weights = torch.zeros(12).double()
            weights[10], weights[4] = 3.0, 1.0
            logits = weights.add(1e-30).log().expand(1, input_ids.shape[1], 12)
            return type("Out", (), {"logits": logits, "past_key_values": None})

        __call__ = forward

    reader = SlotReader(Model(), Tokenizer(), torch.device("cpu"))
    assert reader.expected([0], ("x", "y")) == pytest.approx([8.5, 8.5])


def test_numbers_are_told_apart_where_a_text_begins_with_a_space_of_its_own():
    """As Llama 2, Mistral and Phi 3 write it: "5" alone is two tokens, of which all numbers share the first."""
    signs = ["<unk>", "\u2581", "\t", "\n", *"0123456789abcdefghijklmnopqrstuvwxyz"]
    raw = Tokenizer(models.BPE({sign: i for i, sign in enumerate(signs)}, [], unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw)
    assert tokenizer("5")["input_ids"] == [1, signs.index("5")]
    assert one_token(tokenizer, "5", "--answer") == signs.index("5")
    asked = []

    class Seven:
        def forward(self, input_ids, **_):
            asked.append(input_ids[0].tolist())
            logits = torch.full((1, input_ids.shape[1], len(signs)), -30.0)
            logits[:, :, signs.index("7")] = 0.0
            return type("Out", (), {"logits": logits, "past_key_values": None})

        __call__ = forward

    reader = SlotReader(Seven(), tokenizer, torch.device("cpu"))
    assert reader.expected([0], ("1\ta\t", "2\tb\t")) == pytest.approx([7.0, 7.0])
    assert "".join(signs[i] for i in asked[0][1:]) == "1\ta\tunknown\n2\tb\tunknown\n"


def test_what_a_model_cannot_take_leaves_nothing_to_ask_again(model, tmp_path):
    llm = local(model, tmp_path)
    long = Request((ChatMessage("user", "the cat sat " * 200),), 6, 3)
    tallies = [
        ask_all(llm, [one], lambda _, answer: answer.text, "t")[1] for one in (long, QUESTION)
    ]
    assert tallies[0].failed == 1
    assert not any(asks_again({"detection": {"tally": asdict(tally)}}) for tally in tallies)


def test_every_score_runs_on_a_local_model_and_its_babble_is_counted_as_failed(model, tmp_path):
    """A model of random weights follows no instruction: nothing it says may become a score."""
    llm = widened(local(model, tmp_path, thinking_tokens=0))
    found, (frags, _) = collected(4), word_fragments()
    plan = dry_run(llm, ["detection", "simulation"], found, frags)
    explained = explain_latents(found, llm)
    assert (
        explained.tally.requested
        == explained.tally.failed
        == plan["explanation"].requests
        == N_LATENTS
    )
    told = dict.fromkeys(range(N_LATENTS), "the cat")
    judged = judges.judged("detection", found, told, llm)
    assert judged.tally.requested == judged.tally.failed == plan["detection"].requests
    assert all(s.balanced_accuracy is None and s.failed == 8 for s in judged.scores)
    done = simulation_scores(frags, told, llm)
    assert done.tally.requested == done.tally.parsed == plan["simulation"].requests
    assert all(s.mixed is not None and -1 <= s.mixed <= 1 for s in done.scores)


def chat_server(language, lock):
    """Serve the model as an endpoint does: decode greedily, count tokens, give log-probabilities when asked."""

    def answering(body, _before):
        tokenizer, model = language.tokenizer, language.model
        text = "".join(f"{m['role']}: {m['content']}\n" for m in body["messages"]) + "assistant: "
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with lock, torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=min(8, body["max_tokens"]),
                do_sample=False, output_scores=True, return_dict_in_generate=True, pad_token_id=2,
            )  # fmt: skip
        written = out.sequences[0, ids.shape[1] :]
        content = []
        for token, scores in zip(written.tolist(), out.scores, strict=True):
            values, places = scores[0].log_softmax(-1).topk(body.get("top_logprobs", 1))
            top = [{"token": tokenizer.decode([i]), "logprob": v}
                   for v, i in zip(values.tolist(), places.tolist(), strict=True)]  # fmt: skip
            content.append(
                {
                    "token": tokenizer.decode([token]),
                    "logprob": values[0].item(),
                    "top_logprobs": top,
                }
            )
        choice = {"message": {"content": tokenizer.decode(written)}, "finish_reason": "length"}
        if body.get("logprobs"):
            choice["logprobs"] = {"content": content}
        usage = {"prompt_tokens": ids.shape[1], "completion_tokens": len(written)}
        return Reply(json.dumps({"choices": [choice], "usage": usage}))

    return answering


def test_end_to_end_against_a_real_model_behind_a_server(model, tmp_path, monkeypatch):
    """The served model and the local one say the same; tokens are those that the server counted."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    language = local(model, tmp_path / "l").language
    found = collected(4)
    with serving(chat_server(language, threading.Lock())) as chat:
        llm = Endpoint(config(chat, tmp_path / "e", probabilities=True))
        plan = dry_run(llm, ["detection"], found)
        explained = explain_latents(found, llm)
        told = dict.fromkeys(range(N_LATENTS), "the cat")
        judged = judges.judged("detection", found, told, llm)
        assert len(chat.bodies) == sum(p.requests for p in plan.values())
        (answer,) = llm.ask([QUESTION])
    tallies = (explained.tally, judged.tally)
    asked = sum(p.requests for p in plan.values())
    assert asked == sum(t.requested for t in tallies) == sum(t.failed for t in tallies)
    spent = sum(one.prompt_tokens + one.completion_tokens for one in (*tallies, answer))
    assert spent == llm.budget.tokens > 0
    text = "system: be brief\nuser: the cat sat\nassistant: "
    ids = language.tokenizer(text)["input_ids"]
    with torch.no_grad():
        first = language.model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
    assert answer.tokens[0].text == language.tokenizer.decode([int(first.argmax())])
    assert max(answer.tokens[0].top.values()) == pytest.approx(float(first.max()), abs=1e-4)
    assert answer.prompt_tokens == len(ids)
    assert math.isclose(answer.completion_tokens, 6)
