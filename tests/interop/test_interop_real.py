"""SAEs of ours opened by the libraries themselves, and published ones as SAELens opens them (extra `interop`).

pip install 'wsae[interop]'   (in an environment of its own: they pin older libraries), then pytest this file
"""

import importlib.util

import pytest
import torch
from acts_models import WIDTH, make_model, some_ids
from test_interop_roundtrip import EQUALS, make
from test_interop_transcoder import ABOUT, X
from test_interop_transcoder import CASES as TRANSCODERS
from test_interop_transcoder import D as WIDE
from test_interop_transcoder import make as transcoder
from test_releases import RELEASES, D, M, empty_cache, publish, rows, weights

import wsae
from wsae.acts.hooknames import among
from wsae.interop import Provenance, load, save
from wsae.interop.releases import registry
from wsae.sae import SAE, JumpReLU, SAEConfig, TopK
from wsae.sae.forward import auxk_loss, training_forward, weighted_reconstruction_loss
from wsae.use.attach import Scale, Set, attach

PACKAGES = {
    "saelens": "sae_lens",
    "sparsify": "sparsify",
    "dictionary_learning": "dictionary_learning",
}
MISSING = [name for name in PACKAGES.values() if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(bool(MISSING), reason=f"needs {', '.join(MISSING)} (extra interop)"),
    pytest.mark.filterwarnings("default"),
]
PAIRS = [(name, kind) for name, kinds in EQUALS.items() for kind in kinds]


def of_saelens(folder):
    from sae_lens import SAE

    sae = SAE.load_from_disk(folder)
    assert sae.cfg.metadata.hook_name == "blocks.3.hook_resid_post"
    return sae.encode, sae.decode


def of_sparsify(folder):
    from sparsify import SparseCoder

    coder = SparseCoder.load_from_disk(folder)

    def encode(x):
        found = coder.encode(x)
        return torch.zeros(len(x), coder.num_latents).scatter(1, found.top_indices, found.top_acts)

    return encode, lambda z: coder.decode(*z.topk(coder.cfg.k, dim=1))


def of_dictionary_learning(folder):
    from dictionary_learning.utils import load_dictionary

    loaded, config = load_dictionary(str(folder), "cpu")
    assert config["trainer"]["layer"] == 3
    return loaded.encode, loaded.decode


OPEN = {
    "saelens": of_saelens,
    "sparsify": of_sparsify,
    "dictionary_learning": of_dictionary_learning,
}


@pytest.mark.parametrize(("name", "kind"), PAIRS)
@pytest.mark.parametrize("tied", [False, True])
def test_upstreams_own_loader_gives_our_latents_and_reconstructions(tmp_path, name, kind, tied):
    from wsae.interop import Provenance

    sae = make(kind, d_in=6, groups=5, k=3, tied=tied, seed=1)
    encode, decode = OPEN[name](save(sae, tmp_path / "sae", name, Provenance(hook="layers.3")))
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(2)) * 2 + 1
    with torch.no_grad():
        z, ours = encode(x), sae.encode(x)
        norms = sae.W_dec.norm(dim=1)
        if (name, kind) == ("dictionary_learning", "relu"):  # its loader folds the norms
            ours = ours * norms
        torch.testing.assert_close(z, ours, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(decode(z), sae(x), atol=1e-4, rtol=1e-5)
    assert (z != 0).sum() > len(x)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    return empty_cache(tmp_path, monkeypatch)


@pytest.mark.parametrize("target", RELEASES)
def test_a_release_is_what_saelens_makes_of_it(target, cache, monkeypatch):
    from sae_lens import SAE
    from sae_lens.loading import pretrained_sae_loaders as loaders

    publish(cache, target)
    release, _, sae_id = target.partition(":")
    found = registry().release(release)[sae_id]
    shapes = {name.replace("W_", "w_"): list(t.shape) for name, t in weights().items()}
    monkeypatch.setattr(loaders, "get_safetensors_tensor_shapes", lambda *_: shapes)
    opens = loaders.NAMED_PRETRAINED_SAE_LOADERS[found.loader]
    small = {"d_in": D, "d_sae": M} if found.loader != "llama_scope_r1_distill" else {}
    small |= {"d_out": D} if "transcoder" in target else {}

    def converter(**given):
        return opens(**{**given, "cfg_overrides": {**given["cfg_overrides"], **small}})

    theirs = SAE.from_pretrained(release, sae_id, converter=converter)
    theirs.turn_off_forward_pass_hook_z_reshaping()
    ours = wsae.SAE.from_pretrained(release, sae_id)
    with torch.no_grad():
        z = theirs.encode(rows())
        assert (z != 0).sum() > len(z)
        torch.testing.assert_close(ours.encode(rows()), z, atol=1e-5, rtol=1e-5)
        x_hat = theirs(rows()) if ours.cfg.transcoder else theirs.decode(z)
        torch.testing.assert_close(ours(rows()), x_hat, atol=1e-5, rtol=1e-5)
    about = load(target).about
    assert about.hook is not None
    named = (
        theirs.cfg.metadata
    )  # hook_mlp_in is the place before the norm; the files name the one behind it
    hook = (ours.cfg.transcoder and named.hf_hook_name) or named.hook_name
    assert among(hook.removesuffix(".output"), [about.hook.removesuffix(".output")]), about.hook


@pytest.mark.parametrize("activation", [TopK(k=4), JumpReLU(threshold=0.3)], ids=lambda a: a.kind)
def test_attached_and_edited_a_model_answers_as_in_saelens_with_its_error_term(
    tmp_path, activation
):
    from sae_lens import SAE as TheirSAE
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge
    from transformers import AutoModelForCausalLM

    folder, ids = make_model(tmp_path / "model"), some_ids()
    mine, inner = (
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        for _ in range(2)
    )
    theirs = SAETransformerBridge.boot_transformers(str(folder), hf_model=inner, device="cpu")
    sae = SAE(SAEConfig(d_in=WIDTH, d_sae=48, activation=activation), seed=1)
    exported = save(sae, tmp_path / "sae", "saelens", Provenance(hook="layers.1"))
    their_sae = TheirSAE.load_from_disk(exported)
    their_sae.use_error_term = True

    def edited(acts, hook):  # noqa: ARG001
        acts = acts.clone()
        acts[:, 2, 5] = 8.0
        acts[:, :, 7] *= 3
        return acts

    with torch.no_grad(), attach(mine, {"blocks.1.hook_resid_post": sae}, exclude=None) as a:
        plain = theirs.run_with_saes(ids, saes=[their_sae])
        torch.testing.assert_close(mine(input_ids=ids).logits, plain, atol=1e-6, rtol=1e-5)
        a.edit(Set(5, 8.0, positions=2), Scale(7, 3.0))
        moved = theirs.run_with_hooks_with_saes(
            ids, saes=[their_sae], fwd_hooks=[(theirs.get_sae_hook_name(their_sae), edited)]
        )
        torch.testing.assert_close(mine(input_ids=ids).logits, moved, atol=1e-6, rtol=1e-5)
    assert (moved - plain).abs().max() > 0.1


@pytest.mark.parametrize(
    ("name", "kind", "skip"), [c for c in TRANSCODERS if c[0] != "circuit_tracer"]
)
def test_transcoders_in_the_tools_own_classes_give_our_output(tmp_path, name, kind, skip) -> None:
    sae = transcoder(kind, skip)
    folder = save(sae, tmp_path / "it", name, ABOUT)
    if name == "saelens":
        from sae_lens import SAE as Theirs

        found = Theirs.load_from_disk(folder)
        y_hat = found(X)
        torch.testing.assert_close(found.encode(X), sae.encode(X), rtol=1e-5, atol=1e-5)
        assert found.cfg.metadata.hook_name_out == "layers.0.mlp"
    else:
        from sparsify import SparseCoder

        y_hat = SparseCoder.load_from_disk(folder)(X).sae_out
    torch.testing.assert_close(y_hat, sae(X), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("skip", [False, True])
def test_loss_and_gradients_are_sparsifys(tmp_path, skip) -> None:
    """sparsify's loss is the sum of squared errors over the batch's variance, ours their mean over its rows."""
    from sparsify import SparseCoder

    sae = transcoder("topk", skip).requires_grad_(True)
    sae.set_gamma(torch.ones(WIDE))
    coder = SparseCoder.load_from_disk(save(sae, tmp_path / "it", "sparsify", ABOUT))
    y = torch.randn(len(X), WIDE, generator=torch.Generator().manual_seed(1)) * 3 - 1
    dead = torch.arange(20) % 3 == 0
    found = coder(X, y, dead_mask=dead)
    share = (y - y.mean(0)).square().sum() / len(X)
    forward = training_forward(sae, X)
    loss = weighted_reconstruction_loss(y, forward.x_hat, sae.gamma)
    rest = auxk_loss(sae, y - forward.x_hat.detach(), forward, dead, WIDE // 2)
    torch.testing.assert_close(loss, found.fvu * share, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rest, found.auxk_loss * share, rtol=1e-5, atol=1e-5)
    pairs = {"W_enc_t": coder.encoder.weight, "b_enc": coder.encoder.bias}
    pairs |= {name: coder.get_parameter(name) for name in ("W_dec", "b_dec")}
    pairs |= {"W_skip": coder.W_skip} if skip else {}
    (found.fvu * share).backward(retain_graph=True)
    loss.backward(retain_graph=True)
    for name, other in pairs.items():
        torch.testing.assert_close(sae.get_parameter(name).grad, other.grad, rtol=1e-5, atol=1e-5)
    encoder = coder.encoder.weight.grad.clone()
    (found.auxk_loss * share).backward()
    rest.backward()
    torch.testing.assert_close(sae.W_dec.grad, coder.W_dec.grad, rtol=1e-5, atol=1e-5)
    assert torch.equal(coder.encoder.weight.grad, encoder)  # its AuxK never reaches the encoder
    assert not torch.equal(sae.get_parameter("W_enc_t").grad, encoder)
