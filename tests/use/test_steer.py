"""Steering: continuations beside ones decoded by hand, their numbers, lm-eval's file, and the command."""

import json

import pytest
import torch
from acts_models import WIDTH, make_bert, make_model, make_text
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig

import wsae
from wsae.acts.config import HarvestConfig, TextConfig
from wsae.acts.flow import Flow
from wsae.acts.language import load_language
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.core.torchfile import save_plain
from wsae.sae import SAEConfig, TopK
from wsae.sae.config import Provenance
from wsae.use.attach import Add, Set, Zero, attach
from wsae.use.config import SteerConfig
from wsae.use.steer import AskedEdit, Prompt, distinct, largest, lm_eval_entry, lm_eval_file, steer

HOOK, LATENTS = "layers.1", 24
SHORT = SteerConfig(new_tokens=6)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("steer") / "model")


@pytest.fixture(scope="module")
def language(base):
    return load_language(str(base))


@pytest.fixture(scope="module")
def sae():
    made = wsae.SAE(SAEConfig(d_in=WIDTH, d_sae=LATENTS, activation=TopK(k=4)), 0)
    with torch.no_grad():
        made.W_dec *= torch.linspace(0.5, 2, LATENTS)[:, None]
        made.b_dec += 0.1
        made.b_enc[3], made.b_enc[20] = 5, -50  # one always fires, one never does
    return made.requires_grad_(False)


@pytest.fixture(scope="module")
def place(base, sae, tmp_path_factory):
    path = tmp_path_factory.mktemp("sae") / "one"
    sae.save(path, Provenance(model=str(base), hook=HOOK))
    return path


@settings(max_examples=30)
@given(st.integers(0, 10**6), st.floats(-1e4, 1e4).map(lambda x: round(x, 3)), st.booleans())
def test_an_edit_is_read_as_it_is_written(latent, value, of_peak):
    said = f"{latent}={value}{'x' if of_peak else ''}"
    for hook in (None, "layers.9", "blocks.9.hook_resid_post"):
        wanted = AskedEdit.parse("set", said if hook is None else f"{hook}:{said}")
        assert wanted == ("set", latent, value, of_peak, hook)
    edit = wanted.edit({wanted.name: 3.0}, strength=0.5)
    assert isinstance(edit, Set)
    assert edit.hook == "blocks.9.hook_resid_post"
    assert edit.value == value * (3.0 if of_peak else 1.0) * 0.5


@pytest.mark.parametrize(
    "said", ["", "5", "5=", "=5", "5=a", "-1=2", "5=1.2.3", "5=nan", "5=1e999", "5=2xx"]
)
def test_what_is_no_edit_is_refused(said):
    with pytest.raises(UserError, match="not LATENT=VALUE"):
        AskedEdit.parse("add", said)
    with pytest.raises(UserError, match="leave out the x"):
        AskedEdit.parse("scale", "5=2x")


def by_hand(language, saes, prompt, edits, n):
    """Decode greedily without a cache, the whole text anew for every token."""
    ids = prompt
    with torch.inference_mode(), attach(language.model, saes) as attached:
        language.model(input_ids=ids)  # the rule's medians are of the prompt without edits
        attached.edit(*edits)
        for _ in range(n):
            following = language.model(input_ids=ids, use_cache=False).logits[0, -1].argmax()
            ids = torch.cat([ids, following.view(1, 1)], dim=1)
            if int(following) == language.tokenizer.eos_token_id:
                break
    return ids[0, prompt.shape[1] :].tolist()


def test_continuations_are_those_decoded_by_hand_at_each_strength(language, sae):
    wanted = [
        AskedEdit("set", 3, 20.0, True),
        AskedEdit("add", 7, 15.0),
        AskedEdit("scale", 5, 0.0),
    ]
    strengths, peaks = (0.0, 0.5, 2.0), {"3": 2.5}
    found = steer(language, {HOOK: sae}, "the cat sat on", wanted, strengths, peaks, SHORT)
    prompt = Prompt.of(language, "the cat sat on").ids
    assert [c.strength for c in found.continuations] == [None, *strengths]
    texts = []
    for one in found.continuations:
        edits = [] if one.strength is None else [w.edit(peaks, one.strength) for w in wanted]
        assert one.ids == by_hand(language, {HOOK: sae}, prompt, edits, SHORT.new_tokens)
        ids = torch.cat([prompt[0], torch.tensor(one.ids)])
        losses = torch.nn.functional.cross_entropy(
            language.model(input_ids=ids[None]).logits[0, :-1].double(), ids[1:], reduction="none"
        )
        assert one.cross_entropy == pytest.approx(float(losses[-len(one.ids) :].mean()), rel=1e-6)
        texts.append(one.ids)
    assert texts[0] != texts[3]  # this edit does something
    first = found.continuations[0].cross_entropy
    assert all(one.cross_entropy > first for one in found.continuations if one.ids != texts[0])
    assert found.peaks == {"3": 2.5}


def test_edits_name_their_hook_where_several_saes_are_attached(language, sae):
    other = wsae.SAE(SAEConfig(d_in=WIDTH, d_sae=9, activation=TopK(k=2)), 1)
    saes = {HOOK: sae, "layers.0": other}
    wanted = [
        AskedEdit.parse("set", "blocks.0.hook_resid_post:8=9"),
        AskedEdit("add", 7, 15.0, hook=HOOK),
    ]
    found = steer(language, saes, "the cat sat on", wanted, cfg=SHORT)
    prompt = Prompt.of(language, "the cat sat on").ids
    edits = [Set(8, 9.0, hook="layers.0"), Add(7, 15.0, hook=HOOK)]
    assert found.continuations[1].ids == by_hand(language, saes, prompt, edits, SHORT.new_tokens)
    assert found.edits == ["set blocks.0.hook_resid_post:8=9", "add layers.1:7=15"]
    for said, error in (
        ("8=9", "say which hook: layers.1, layers.0"),
        ("layers.0:9=1", "9 latents, 0 to 8"),
        ("layers.7:9=1", "no SAE is attached at 'layers.7'"),
    ):
        with pytest.raises(UserError, match=error):
            steer(language, saes, "the cat", [AskedEdit.parse("set", said)])


def test_an_edit_that_no_model_can_take_is_named(language, sae):
    wanted = [AskedEdit("add", 1, 1.0), AskedEdit("set", 3, 1e30)]
    with pytest.raises(
        UserError, match=r"edit Set of latent 3: at position 1 the activation becomes too large"
    ):
        steer(language, {HOOK: sae}, "the cat", wanted)
    steer(language, {HOOK: sae}, "the cat", wanted, (1e-27,), cfg=SHORT)


def test_a_random_choice_is_the_same_at_the_same_seed_and_leaves_the_state_alone(language, sae):
    state = torch.random.get_rng_state()
    texts = [
        steer(language, {HOOK: sae}, "the", [AskedEdit("add", 1, 0.0)], (1.0,), {},
              SteerConfig(new_tokens=12, temperature=1.5, seed=seed)).continuations
        for seed in (0, 0, 1)
    ]  # fmt: skip
    assert torch.equal(state, torch.random.get_rng_state())
    assert texts[0][0].ids == texts[0][1].ids == texts[1][0].ids != texts[2][0].ids


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_continuation_takes_nothing_from_the_models_own_generation_settings(
    language, sae, monkeypatch, temperature
):
    cfg, model = SteerConfig(new_tokens=8, temperature=temperature), language.model

    def written():
        wanted = [AskedEdit("add", 1, 0.0)]
        return steer(language, {HOOK: sae}, "the", wanted, cfg=cfg).continuations[0].ids

    plain = written()
    own = GenerationConfig(suppress_tokens=plain, no_repeat_ngram_size=1, min_p=0.9, top_k=1)
    monkeypatch.setattr(model, "generation_config", own)
    assert written() == plain
    assert model.generation_config is own


@given(st.lists(st.integers(0, 3), max_size=9), st.integers(1, 3))
def test_distinct_is_one_where_nothing_is_repeated(ids, n):
    share = distinct(ids, n)
    grams = {tuple(ids[i : i + n]) for i in range(max(0, len(ids) - n + 1))}
    assert (share is None) == (len(ids) < n)
    assert share is None or share * (len(ids) - n + 1) == pytest.approx(len(grams))


def test_the_largest_activation_is_that_of_the_kept_tokens(language, sae, tmp_path):
    text = TextConfig(path=str(make_text(tmp_path / "a.jsonl", documents=8)))
    cfg = HarvestConfig(text=text, hooks=(HOOK,), seq_len=16, heldout_fraction=0, heldout_tokens=0)
    flow = Flow(cfg, language)
    flow.calibrate()
    rows = torch.cat([step.x[HOOK] for step in flow.steps(heldout=False)])[:100]
    z = sae.encode(rows).amax(0)
    firing, silent = 3, 20
    found = largest(sae, HOOK, [firing], flow.steps(heldout=False), 100)
    assert found == {firing: pytest.approx(float(z[firing]), rel=1e-5)}
    assert float(z[silent]) == 0
    with pytest.raises(UserError, match=f"latent {silent}: does not fire on 100 tokens"):
        largest(sae, HOOK, [silent], flow.steps(heldout=False), 100)


def test_lm_eval_files_hold_sums_of_adds_or_one_set(sae):
    added = lm_eval_entry(sae, [Add(3, 2.0), Add(9, -1.0)])
    expected = 2 * sae.W_dec[3] - sae.W_dec[9]
    torch.testing.assert_close(added["steering_coefficient"] * added["steering_vector"], expected)
    x = torch.randn(5, WIDTH)
    clamp = lm_eval_entry(sae, [Set(4, 3.0)])
    unit = clamp["steering_vector"] / clamp["steering_vector"].norm()
    centred = x - clamp["bias"]
    moved = centred + (clamp["steering_coefficient"] - centred @ unit)[:, None] * unit
    # what is along the row is then the row times the value
    along = (moved @ unit)[:, None] * unit
    torch.testing.assert_close(along, (3.0 * sae.W_dec[4]).expand_as(x))
    for edits in ([Zero(1)], [Set(1, 1.0), Set(2, 1.0)], [Set(1, 1.0), Add(2, 1.0)], []):
        with pytest.raises(UserError, match="one --set, or several --add"):
            lm_eval_entry(sae, edits)


def test_lm_eval_steers_by_our_file_as_we_do(base, language, sae, tmp_path):
    theirs = pytest.importorskip("lm_eval.models.hf_steered").SteeredModel
    edits, path = [Add(3, 4.0), Add(9, -2.0)], tmp_path / "steer.pt"
    file = lm_eval_file(language, {HOOK: sae}, edits)
    save_plain(path, file)
    made = theirs(str(base), steer_path=str(path), device="cpu", dtype="float32")
    ids = Prompt.of(language, "two dogs run over green hills").ids
    with torch.inference_mode(), attach(language.model, {HOOK: sae}, exclude=None) as attached:
        attached.edit(*edits)
        ours = language.model(input_ids=ids).logits
    torch.testing.assert_close(made._model_call(ids), ours)
    assert not torch.allclose(ours, language.model(input_ids=ids).logits)


def test_the_command_prints_continuations_and_writes_files(place, tmp_path, capsys):
    words = [
        "steer",
        "--sae",
        str(place),
        "--prompt",
        "the cat",
        "--prompt",
        "rain",
        "--add",
        "3=1x",
    ]
    text = make_text(tmp_path / "a.jsonl", documents=9)
    words += ["--text", str(text), "--text-tokens", "100", "--new-tokens", "4", "--sweep", "1", "8"]
    words += ["--lm-eval", str(tmp_path / "s.pt"), "--out", str(tmp_path / "o.json"), "--json"]
    assert main(words) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((tmp_path / "o.json").read_text())
    assert [p["prompt"] for p in found["prompts"]] == ["the cat", "rain"]
    for one in found["prompts"]:
        assert [c["strength"] for c in one["continuations"]] == [None, 1, 8]
    ((hook, entry),) = torch.load(tmp_path / "s.pt", weights_only=True).items()
    assert (hook, entry["action"], entry["bias"]) == ("layers.1", "add", None)
    assert found["edits"] == [f"add 3={found['peaks']['3']:g}"]


def test_a_run_on_a_model_of_this_machine_is_steered_by_that_model(base, tmp_path, capsys):
    """By the run, its member's folder and with the store gone; what is shared has no path of this machine."""
    text, store, run = make_text(tmp_path / "a.jsonl"), tmp_path / "acts", tmp_path / "run"
    own = ["--device", "cpu"]
    words = ["--text", str(text), "--hook", HOOK, "--seq-len", "16", "--tokens", "300", *own]
    assert main(["harvest", str(base), "--out", str(store), *words]) == 0
    words = ["--k", "2", "--expansion", "2", "--batch-size", "64", "--tokens", "128", *own]
    assert main(["train", str(store), "--out", str(run), *words]) == 0
    for gone in (False, True):
        for sae in (run, run / "members" / HOOK / "plain"):
            capsys.readouterr()
            words = ["--set", "1=2", "--prompt", "the cat", "--new-tokens", "2", "--json", *own]
            assert main(["steer", "--sae", str(sae), *words]) == 0
            assert json.loads(capsys.readouterr().out)["prompts"]
        out = tmp_path / f"shared-{gone}"
        assert main(["export", str(run), "--out", str(out)]) == 0
        assert json.loads((out / "cfg.json").read_text())["metadata"]["model_name"] == base.name
        assert all(str(base) not in file.read_text(errors="replace") for file in out.iterdir())
        store = store.rename(tmp_path / f"moved-{gone}")


def test_a_crosscoder_is_refused_before_a_model_is_loaded(tmp_path, capsys):
    parts = [{"name": name, "width": 8} for name in ("layers.0", "layers.1")]
    made = wsae.SAE(
        SAEConfig.parse(
            {"d_in": 16, "d_sae": 8, "activation": {"kind": "topk", "k": 2}, "sources": parts}
        )
    )
    made.save(
        tmp_path / "cc", Provenance(model=str(tmp_path / "nowhere"), hook="layers.0+layers.1")
    )
    words = ["--set", "1=2x", "--prompt", "the cat", "--device", "cpu"]
    assert main(["steer", "--sae", str(tmp_path / "cc"), *words]) == 2
    assert "its SAE is a crosscoder" in capsys.readouterr().err


def test_bad_input_of_the_command_is_one_line(place, sae, tmp_path, capsys):
    bert = make_bert(tmp_path / "bert")
    nowhere = tmp_path / "nowhere"
    sae.save(nowhere)
    cases = [
        (["--sae", str(place)], "no edit"),
        (["--sae", str(place), "--set", "24=1"], "has 24 latents, 0 to 23"),
        (["--sae", str(place), "--set", "1"], "not LATENT=VALUE"),
        (["--sae", str(place), "--set", "layers.0:1=2"], "no SAE is attached at 'layers.0'"),
        (["--sae", str(place), "--set", "1=1", "--chat"], "no chat template"),
        (["--sae", str(place), "--set", "1=1", "--new-tokens", "500"], "128 positions"),
        (["--sae", str(place), "--scale", "1=2", "--lm-eval", str(tmp_path / "x.pt")], "--lm-eval"),
        ([str(bert), "--sae", str(place), "--set", "1=1"], "continues no text"),
        (["--sae", str(nowhere), "--set", "1=1"], "does not say of which model"),
        ([str(bert), "--sae", str(nowhere), "--set", "1=1"], "does not say at which hook"),
        (["--sae", str(tmp_path / "gone"), "--set", "1=1"], "gone"),
    ]
    for words, message in cases:
        assert main(["steer", *words, "--prompt", "the cat"]) == 2, words
        said = capsys.readouterr()
        assert message in said.err, (words, said.err)
        assert said.out == ""
        assert said.err.strip().splitlines()[-1].startswith("wsae: error:")
    assert not (tmp_path / "x.pt").exists()
