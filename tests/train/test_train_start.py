"""Fine-tuning: an SAE goes on as it is, whatever it was trained on; another one is refused; a killed run resumes."""

import shutil
from pathlib import Path

import pytest
import torch
from halting import Halting
from test_train import config, files_of, weighted, world

from wsae.acts.source import ArraySource
from wsae.api import fit_family
from wsae.core.errors import UserError
from wsae.sae import SAE
from wsae.sae.config import SAEConfig
from wsae.train.family import Start
from wsae.train.loop import Stopped
from wsae.train.run import train_run

WHITE = {"kind": "whiten", "power": 0.7}
STANDARD = {"kind": "standardise"}
STILL = {"lr": 1e-12, "auxk": 0.0}
TOPK, BATCH, GROUP, RELU, GATED, NESTED, JUMP = (
    {"kind": "topk", "k": 4},
    {"kind": "batch_topk", "k": 4},
    {"kind": "group_topk", "k": 4},
    {"kind": "relu"},
    {"kind": "gated"},
    {"kind": "matryoshka", "k": 4, "over": "topk", "widths": (6, 24)},
    {"kind": "jumprelu", "threshold": 0.3},
)


@pytest.mark.parametrize(
    ("trained", "tuned"),
    [
        ({"activation": TOPK}, {}),
        ({"activation": BATCH}, {}),
        ({"activation": GROUP, "precondition": WHITE}, {"precondition": WHITE}),
        ({"activation": BATCH, "precondition": STANDARD}, {"precondition": STANDARD}),
        ({"activation": GATED, "precondition": STANDARD}, {}),
        ({"activation": NESTED}, {}),
        ({"activation": JUMP}, {"precondition": WHITE}),
        ({"activation": RELU, "precondition": WHITE}, {}),
        ({"activation": RELU, "tied": True}, {}),
    ],
)
def test_an_sae_that_learns_nothing_stays_as_it_is(
    tmp_path: Path, trained: dict, tuned: dict
) -> None:
    """Scale, preconditioner and the decoder's unit rows are undone and done again: the same latents' directions."""
    source, x = ArraySource(40 * world()), 40 * world(seed=1)
    first = config(weighted("none", label="one", **trained), tokens=1_000)
    sae = train_run(first, source, tmp_path / "first").saes["acts"]["one"]
    tuned = {**{k: v for k, v in trained.items() if k != "precondition"}, **tuned, **STILL}
    again = config(weighted("variance", label="one", **tuned), tokens=200)
    start = Start({"acts": sae})
    found = train_run(again, source, tmp_path / "again", start=start).saes["acts"]["one"]
    z, same = sae.encode(x), found.encode(x)
    size = sae.decode(z).abs().max()
    if trained["activation"] is BATCH:  # its threshold follows the data, which say the same
        assert 0.9 < float(found.threshold / sae.threshold) < 1.1
        found.threshold.copy_(sae.threshold)
        same = found.encode(x)
    assert float((found.decode(same) - sae.decode(z)).abs().max() / size) < 1e-5
    assert torch.equal(same > 0, z > 0) or float(((same > 0) != (z > 0)).float().mean()) < 1e-4
    if trained.get("precondition") == tuned.get("precondition"):
        for name in ("W_dec", "W_enc", "b_dec", "b_enc"):
            if name in sae.tensors():
                a, b = sae.tensors()[name], found.tensors()[name]
                assert float((a - b).abs().max() / a.abs().max()) < 1e-5, name


def test_fine_tuning_goes_on_and_ends_the_same_when_it_was_stopped(tmp_path: Path) -> None:
    source, member = ArraySource(world()), weighted("none", label="one")
    sae = train_run(config(member, tokens=4_000), source, tmp_path / "first").saes["acts"]["one"]
    cfg, start = config(member, tokens=4_000), Start({"acts": sae}, "first")
    whole = train_run(cfg, source, tmp_path / "whole", start=start)
    fvu = [_fvu(one, world(seed=0)) for one in (sae, whole.saes["acts"]["one"])]
    assert fvu[1] < fvu[0]
    with pytest.raises(Stopped):
        train_run(cfg, Halting(world(), 7), tmp_path / "cut", start=start)
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    with pytest.raises(UserError, match="init_from is .* there, None here"):
        train_run(cfg, source, tmp_path / "cut", resume=True)
    other = Start({"acts": whole.saes["acts"]["one"]}, "first")
    with pytest.raises(UserError, match=r"train\.init_from is"):
        train_run(cfg, source, tmp_path / "other", resume=True, start=other)
    moved = Start({"acts": sae}, "elsewhere")
    train_run(cfg, source, tmp_path / "cut", resume=True, start=moved)
    same, ends = (files_of(tmp_path / name) for name in ("whole", "cut"))
    assert [
        n for n in same if n != "config.json" and "manifest" not in n and same[n] != ends[n]
    ] == []


def _fvu(sae: SAE, x: torch.Tensor) -> float:
    return float((sae(x) - x).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ({"d_sae": 32}, "has d_sae 32, and d_sae 48 is to be trained"),
        ({"activation": {"kind": "jumprelu"}}, "has activation jumprelu, and activation topk is to be"),
        ({"tied": True}, "has tied True, and tied False is to be trained"),
        ({"d_in": 8}, "has d_in 8, and d_in 16 is to be trained"),
    ],
)  # fmt: skip
def test_another_shape_is_refused_before_anything_is_written(
    tmp_path: Path, shape: dict, told: str
) -> None:
    data = {"d_in": 16, "d_sae": 48, "activation": TOPK, **shape}
    start = Start({"acts": SAE(SAEConfig.parse(data))})
    with pytest.raises(UserError, match=told):
        train_run(config(weighted()), ArraySource(world()), tmp_path / "run", start=start)
    assert not (tmp_path / "run").exists()


def test_rows_that_would_choose_other_latents_are_refused(tmp_path: Path) -> None:
    sae = SAE(SAEConfig.parse({"d_in": 16, "d_sae": 48, "activation": TOPK}))
    mapped = config(weighted("none", precondition=WHITE))
    with pytest.raises(UserError, match="rows of lengths .* topk would choose other latents"):
        train_run(mapped, ArraySource(world()), tmp_path / "run", start=Start({"acts": sae}))


def test_a_skip_transcoder_goes_on_too() -> None:
    x = world()[:1_000]
    y = x[:, :8].relu() @ torch.randn(8, 12, generator=torch.Generator().manual_seed(1)) + 1
    member = weighted("none", skip=True, precondition=WHITE)
    still = member.model_copy(update=STILL)
    data = {"target": y, "tokens": 400, "batch_size": 200}
    first = fit_family(x, [member], **data).saes[0]
    again = fit_family(x, [still], **data, init_from=first).saes[0]
    torch.testing.assert_close(again(x), first(x), rtol=1e-5, atol=1e-4)
