"""Attribution against its formulas computed another way, and against ablation by `attach`."""

import json

import pytest
import torch
from acts_models import WIDTH, make_model
from test_attach import HOOK, VOCABULARY, llama, make, some_ids

from wsae.acts.capture import one_hook, splice
from wsae.acts.config import HarvestConfig
from wsae.acts.flow import SkipRule
from wsae.acts.language import load_language
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.sae import SAE, JumpReLU, SAEConfig, TopK
from wsae.sae.config import Provenance
from wsae.use.attach import Zero, attach
from wsae.use.attribute import Logit, LogitDifference, Loss, attribute

METRICS = {"logit": Logit(7), "difference": LogitDifference(7, 11), "loss": Loss(3)}


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def sae():
    return make(TopK(k=4))


@pytest.fixture(scope="module")
def ids():
    return some_ids(1, 9)[0]


def by_hand(model, ids, kind):
    logits = model(input_ids=ids[None]).logits[0]
    if kind == "loss":
        return torch.nn.functional.cross_entropy(logits[2:-1], ids[3:])
    return logits[-1, 7] - (logits[-1, 11] if kind == "difference" else 0.0)


@pytest.mark.parametrize(
    ("kind", "norm"), [*((kind, None) for kind in METRICS), ("logit", "layer_norm")]
)
def test_gradient_times_activation_is_the_derivative_in_the_latents_scale(model, ids, kind, norm):
    sae = make(TopK(k=4), input_norm=norm)
    found = attribute(model, {HOOK: sae}, ids, METRICS[kind], method="gradient", verify=0)
    at = found.hooks[HOOK]
    scales = torch.ones(9, 40, requires_grad=True)
    errors = torch.ones(9, 1, requires_grad=True)

    def scaled(x, _call):
        z, rest = sae.encode(x[0]).detach(), x[0] - sae(x[0]).detach()
        new = sae.decode(scales * z, x[0].detach()) + errors * rest
        return torch.cat([x[0, :1], new[1:]])[None]

    with splice(model, HOOK, scaled):
        value = by_hand(model, ids, kind)
    wanted, wanted_errors = torch.autograd.grad(value, [scales, errors])
    mine = torch.zeros(9, 40)
    for one in at.effects:
        mine[one.position, one.latent] = one.effect
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(at.errors), wanted_errors[:, 0], rtol=1e-3, atol=1e-4)
    assert found.value == pytest.approx(float(value.detach()), rel=1e-5)
    assert at.left_out == {0: "first"}
    assert len(at.effects) == at.active == 8 * 4


@pytest.mark.parametrize(
    ("kind", "norm"), [*((kind, None) for kind in METRICS), ("logit", "layer_norm")]
)
def test_integrated_gradients_add_up_to_what_the_rows_change(model, ids, kind, norm):
    sae = make(TopK(k=4), input_norm=norm)
    found = attribute(model, {HOOK: sae}, ids, METRICS[kind], method="integrated", verify=0)
    at = found.hooks[HOOK]

    def silent(x, _call):
        gone = sae.b_dec.detach().expand(1, 8, -1)
        if norm is not None:
            gone = gone * x[:, 1:].std(2, keepdim=True) + x[:, 1:].mean(2, keepdim=True)
        return torch.cat([x[:, :1], gone], dim=1)

    with splice(model, HOOK, silent):
        left = float(by_hand(model, ids, kind))
    assert at.change == pytest.approx(found.value - left, rel=1e-4)
    assert at.total == pytest.approx(at.change, rel=0.03)
    assert at.total == pytest.approx(sum(e.effect for e in at.effects) + sum(at.errors))


def test_a_model_in_which_sequences_disturb_each_other_is_given_one_at_a_time(model, sae, ids):
    class Mixing(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, x, **rest):
            return self.layer(x + 3 * torch.arange(len(x))[:, None, None], **rest)

    mixing = llama()
    mixing.model.layers[1] = Mixing(mixing.model.layers[1])
    found, plain = (
        attribute(m, {HOOK: sae}, ids, Logit(7), method="integrated", verify=3)
        for m in (mixing, model)
    )
    for one, other in zip(found.verified, plain.verified, strict=True):
        assert one.predicted.latent == other.predicted.latent
        assert one.true == pytest.approx(other.true, abs=1e-5)
    assert found.hooks[HOOK].total == pytest.approx(plain.hooks[HOOK].total, rel=1e-4)


def test_the_largest_effects_of_all_hooks_are_verified_by_ablation(model, sae, ids):
    saes = {HOOK: sae, "layers.1": make(JumpReLU(threshold=0.3), seed=1)}
    found = attribute(model, saes, ids, Logit(7), method="gradient", verify=6)
    effects = [e.effect for at in found.hooks.values() for e in at.effects]
    checked = [v.predicted.effect for v in found.verified]
    assert checked == sorted(effects, key=abs, reverse=True)[:6]
    assert {v.predicted.hook for v in found.verified} == set(saes)
    with attach(model, saes) as a, torch.no_grad():
        for v in found.verified:
            one = v.predicted
            a.edit(Zero(one.latent, hook=one.hook, positions=one.position))
            without = float(model(input_ids=ids[None]).logits[0, -1, 7])
            assert v.true == pytest.approx(found.value - without, abs=1e-4)
    pairs = torch.tensor([[v.predicted.effect, v.true] for v in found.verified]).T
    assert found.correlation == pytest.approx(float(pairs.corrcoef()[0, 1]), rel=1e-4)


@pytest.mark.parametrize("skip", [False, True])
def test_a_transcoders_latents_act_where_its_module_gives(model, ids, skip):
    shape = {"d_in": WIDTH, "d_sae": 40, "d_out": WIDTH, "skip": skip}
    coder = SAE(SAEConfig(**shape, activation=TopK(k=4)), 3).requires_grad_(False)
    coder.b_dec.normal_(generator=torch.Generator().manual_seed(4))
    if skip:
        coder.W_skip.normal_(std=0.2, generator=torch.Generator().manual_seed(5))
    read, given = "layers.0.mlp.input", "layers.0.mlp"
    saes = {read: coder}
    point, before = (one_hook(model, name) for name in (given, read))
    scales = torch.ones(9, 40, requires_grad=True)
    errors = torch.ones(9, 1, requires_grad=True)

    def scaled(y, call):
        x = call.read[0].detach()
        z, rest = coder.encode(x), y[0].detach() - coder(x)
        new = coder.decode(scales * z, x) + errors * rest
        return torch.cat([y[0, :1], new[1:]])[None]

    with splice(model, point, scaled, before):
        value = by_hand(model, ids, "logit")
    wanted, wanted_errors = torch.autograd.grad(value, [scales, errors])
    found = attribute(model, saes, ids, Logit(7), method="gradient", verify=5)
    at = found.hooks[read]
    mine = torch.zeros(9, 40)
    for one in at.effects:
        mine[one.position, one.latent] = one.effect
    torch.testing.assert_close(mine, wanted, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(torch.tensor(at.errors), wanted_errors[:, 0], rtol=1e-3, atol=1e-4)
    assert found.value == pytest.approx(float(value.detach()), rel=1e-5)
    with attach(model, saes) as a, torch.no_grad():
        for v in found.verified:
            a.edit(Zero(v.predicted.latent, positions=v.predicted.position))
            without = float(model(input_ids=ids[None]).logits[0, -1, 7])
            assert v.true == pytest.approx(found.value - without, abs=1e-4)

    def silent(y, call):
        x = call.read[0]
        gone = coder.b_dec + (x @ coder.W_skip.T if skip else 0 * x)
        return torch.cat([y[0, :1], gone[1:]])[None]

    with splice(model, point, silent, before), torch.no_grad():
        left = float(by_hand(model, ids, "logit"))
    outs = {"hook_out": {read: given}}
    whole = attribute(model, saes, ids, Logit(7), method="integrated", verify=0, **outs).hooks[read]
    assert whole.change == pytest.approx(found.value - left, rel=1e-3)
    assert whole.total == pytest.approx(whole.change, rel=0.03)


def test_what_cannot_be_attributed_is_refused(model, sae, ids):
    for metric, says in (
        (Logit(VOCABULARY), "token 50: the model has 0 to 49"),
        (Loss(9), "loss from token 9 on: the text has 1 to 8"),
    ):
        with pytest.raises(UserError, match=says):
            attribute(model, {HOOK: sae}, ids, metric)
    assert attribute(model, {HOOK: sae}, ids[:1], Logit(3)).hooks[HOOK].effects == []
    with pytest.raises(UserError, match="tokens are more than the model's 2,048 posit"):
        attribute(model, {HOOK: sae}, ids.repeat(250), Logit(3))


def test_attribution_has_gradients_where_the_caller_has_switched_them_off(model, sae, ids):
    wanted = attribute(model, {HOOK: sae}, ids, Logit(7), verify=2)
    with torch.inference_mode():
        assert attribute(model, {HOOK: sae}, ids.clone(), Logit(7), verify=2) == wanted


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An SAE of a tiny model on disk, which names model and hook."""
    folder = tmp_path_factory.mktemp("attribute")
    language = make_model(folder / "model")
    made = SAE(SAEConfig(d_in=WIDTH, d_sae=24, activation=TopK(k=4)), 0)
    made.save(folder / "sae", Provenance(model=str(language), hook="layers.1"))
    made.save(folder / "nameless")
    return folder


def test_the_command_prints_effects_beside_ablation_and_json(place, capsys):
    words = ["--prompt", "the cat sat on the mat", "--verify", "4", "--device", "cpu"]
    out = place / "effects.json"
    given = ["--sae", str(place / "sae"), *words, "--out", str(out)]
    assert main(["attribute", *given, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result == json.loads(out.read_text())
    language = load_language(str(place / "model"))
    ids = torch.tensor(result["ids"])
    logits = language.model(input_ids=ids[None]).logits[0, -1]
    top = int(logits.argmax())
    assert result["metric"] == {
        "kind": "logit", "token": top, "token_text": language.tokenizer.decode([top])
    }  # fmt: skip
    assert result["value"] == pytest.approx(float(logits[top]), abs=1e-5)
    assert "".join(result["tokens"]).strip() == "the cat sat on the mat"
    rule = SkipRule(HarvestConfig(), language.tokenizer.all_special_ids)
    sae = SAE.load(place / "sae")
    found = attribute(language.model, {"layers.1": sae}, ids, Logit(top), verify=4, exclude=rule)
    assert result["hooks"]["layers.1"]["effects"] == found.to_dict()["hooks"]["layers.1"]["effects"]
    bare = ["attribute", str(place / "model"), "--sae", str(place / "nameless"), "--hook", "h"]
    assert main([*bare[:-1], "layers.1", *words, "--metric", "loss"]) == 0
    shown = capsys.readouterr().out
    assert "by ablation" in shown
    assert "loss:" in shown
    assert "active latents" in shown


BAD = [
    (["--sae", "SAE", "--verify", "-1"], "--verify: -1 is not between 0 and"),
    (["--sae", "SAE", "--against", "x"], "--against 'x': goes with --metric difference"),
    (["--sae", "SAE", "--answer", "the cat"], "'the cat': is 2 tokens"),
    (["--sae", "NAMELESS"], "does not say of which model it is; give MODEL first"),
    (["MODEL", "--sae", "NAMELESS"], "does not say at which hook it belongs; give --hook"),
    (["MODEL", "--sae", "NAMELESS", "--hook", "layer.9"], "hook 'layer.9': "),
    ([], "--sae: name at least one"),
]


@pytest.mark.parametrize(("words", "says"), BAD, ids=[says[:20] for _, says in BAD])
def test_bad_input_of_the_command_is_one_line(place, words, says, capsys):
    names = {"SAE": "sae", "NAMELESS": "nameless", "MODEL": "model"}
    words = [str(place / names[word]) if word in names else word for word in words]
    assert main(["attribute", *words, "--prompt", "the cat", "--device", "cpu"]) == 2
    error = capsys.readouterr().err.strip()
    assert says in error
    assert "\n" not in error
