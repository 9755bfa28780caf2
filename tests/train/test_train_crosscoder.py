"""Crosscoders: sources made alike and read side by side, whose latents are whose, folding, resume, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from acts_models import make_model, make_text
from torch import Tensor

import wsae
from wsae.acts.source import AlignedSource, ArraySource, JoinedSource
from wsae.cli.live import reopen
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.core.progress import quiet
from wsae.evals.config import EvalConfig
from wsae.sae import SAE
from wsae.sae.forward import weigh
from wsae.train.config import TrainConfig
from wsae.train.family import finished
from wsae.train.loop import run_steps
from wsae.train.run import load_run, start_family, train_run
from wsae.train.state import make_batch
from wsae.train.step import eager_step

WIDTH, EACH = 16, 5
SCALE = 40.0
"""How much larger one source is."""


def rows() -> dict[str, Tensor]:
    """Return activations of two sources of 2 x EACH features each, half of them shared."""
    g = torch.Generator().manual_seed(0)
    z = (torch.rand(4000, 3 * EACH, generator=g) < 0.1) * (
        1 + torch.rand(4000, 3 * EACH, generator=g)
    )
    small, large = (
        torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=g)).Q[: 2 * EACH] for _ in range(2)
    )
    shared, own, others = z.split(EACH, 1)
    return {
        "small": torch.cat([shared, own], 1) @ small + 1,
        "large": SCALE * torch.cat([shared, others], 1) @ large,
    }


X = rows()
NAMES = [*X]
JOINED = torch.cat([*X.values()], 1)


def joined(heldout: float = 0.1) -> JoinedSource:
    return JoinedSource(AlignedSource(*(ArraySource(x.numpy(), heldout, n) for n, x in X.items())))


SOURCE = joined()


def config(steps: int, **fields: object) -> TrainConfig:
    setting = {"d_sae": 24, "activation": {"kind": "batch_topk", "k": 2}, "lr": 1e-2, **fields}
    return TrainConfig.parse(
        {
            "members": (setting,),
            "tokens": steps * 100,
            "batch_size": 100,
            "crosscoder": [{"name": name, "width": WIDTH} for name in NAMES],
        }
    )


def trained(steps: int, **fields: object) -> SAE:
    family = start_family(cfg := config(steps, **fields), SOURCE, SOURCE.stats())
    (member,) = family.members["small+large"]
    with quiet("train", None, "rows") as tick:
        run_steps(cfg, family, SOURCE.stream(100, 0), 0, tick, lambda _: None)
    return finished(member)


def test_relative_norms_tell_shared_features_from_those_of_one_source() -> None:
    sae = trained(250, lr=3e-2)
    relative = sae.relative_norms()
    assert relative.sum(0).allclose(torch.ones(24, dtype=torch.float64))
    live = relative[1][(sae.encode(X) > 0).double().mean(0) > 0.03]
    found = [(live < 0.1).sum(), ((live > 0.4) & (live < 0.6)).sum(), (live > 0.9).sum()]
    assert min(map(int, found)) >= EACH - 1, "the world has EACH of each"
    assert sum(map(int, found)) >= 0.8 * len(live)
    began = trained(1, lr=1e-9).relative_norms()[1]
    assert float(began.min()) > 0.3, "random directions are of both"
    assert float(began.max()) < 0.7


MAPS = [None, *({"kind": kind, "power": 0.5} for kind in ("standardise", "whiten", "residual"))]


@pytest.mark.parametrize("precondition", MAPS)
def test_the_folded_crosscoder_takes_ordinary_activations(precondition: dict | None) -> None:
    cfg = config(1, precondition=precondition, gamma={"rule": "variance", "alpha": 0.5})
    (member,) = start_family(cfg, SOURCE, SOURCE.stats()).members["small+large"]
    assert member.inside is not None
    sae, batch, folded = member.sae, make_batch(JOINED[:200], member), finished(member)
    wide = sae.pre(sae.centre(batch.x)) * member.scale
    found = folded.pre(folded.centre(JOINED[:200]))
    torch.testing.assert_close(found, wide, rtol=1e-4, atol=1e-3 * float(wide.detach().std()))
    error = (sae(batch.x) - batch.x) * sae.gamma * member.scale
    there = (folded(JOINED[:200]) - JOINED[:200]).double()
    there = weigh(there, folded.gamma.double())
    torch.testing.assert_close(
        there.square().sum(1), error.double().square().sum(1), rtol=1e-2, atol=1e-3
    )
    scales = [source.scale for source in folded.cfg.sources or ()]
    sums = [c * c * float(x.var(0).sum()) for c, x in zip(scales, X.values(), strict=True)]
    assert sums[0] == pytest.approx(sums[1], rel=0.1), "10 % of the rows are held out"
    assert sum(c * c for c in scales) == pytest.approx(2)
    back = member.inside.unfold(folded.scaled(1 / member.scale))
    torch.testing.assert_close(back.W_enc, sae.W_enc, rtol=1e-4, atol=1e-5)


def test_a_step_descends_the_squared_error_of_all_sources_alike() -> None:
    cfg = config(1, auxk=0)
    (member,) = start_family(cfg, SOURCE, SOURCE.stats()).members["small+large"]
    sae = member.sae
    eager_step(member, make_batch(JOINED[:100], member), 0.0, cfg, 0)
    scales = finished(member).cfg.sources
    assert scales is not None
    x = torch.cat([X[s.name][:100].double() * s.scale for s in scales], 1) / member.scale
    leaves = {name: p.detach().double().requires_grad_() for name, p in sae.named_parameters()}
    pre = (x - leaves["b_dec"]) @ leaves["W_enc_t"].T + leaves["b_enc"]
    z = pre * (pre >= pre.detach().flatten().topk(200).values[-1])
    parts = (x - z @ leaves["W_dec"] - leaves["b_dec"]).split(WIDTH, 1)
    torch.stack([part.square().sum() / 100 for part in parts]).sum().backward()
    for name in ("W_enc_t", "b_enc", "b_dec"):
        found = getattr(sae, name).grad.double()
        torch.testing.assert_close(found, leaves[name].grad, rtol=1e-4, atol=1e-4)
    gradient = leaves["W_dec"].grad
    tangent = gradient - (gradient * leaves["W_dec"]).sum(1, keepdim=True) * leaves["W_dec"]
    torch.testing.assert_close(sae.W_dec.grad.double(), tangent, rtol=1e-4, atol=1e-4)


def stored(folder: Path) -> list[str]:
    """Write one file of each source; return their paths."""
    paths = [folder / f"{name}.npy" for name in X]
    for path, x in zip(paths, X.values(), strict=True):
        np.save(path, x.numpy())
    return [str(path) for path in paths]


class Halted(JoinedSource):
    """A source whose stream ends with an error after some batches."""

    def stream(self, *args):
        stream, left = super().stream(*args), iter(range(4))
        serve = stream.next

        def counted():
            if next(left, None) is None:
                raise RuntimeError("halted")
            return serve()

        stream.next = counted
        return stream


FLAGS = ["--d-sae", "24", "--k", "2", "--tokens", "600", "--batch-size", "100"]


def test_the_commands_train_resume_measure_and_show_a_crosscoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    small, large = stored(tmp_path)
    words = ["train", small, "--crosscoder", large, *FLAGS, "--lr", "0.01"]
    assert main([*words, "--out", str(tmp_path / "whole"), "--alpha", "0.5"]) == 0
    record = json.loads((tmp_path / "whole" / "config.json").read_text())
    cfg, source = TrainConfig.parse(record["train"]), reopen(tmp_path / "whole", "cpu")
    again = ["train", "--config", str(tmp_path / "whole" / "config.json")]
    assert main([*again, "--out", str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text()) == record
    monkeypatch.setattr("wsae.train.loop.CHECKPOINT_SECONDS", -1.0)
    assert isinstance(source, JoinedSource)
    with pytest.raises(RuntimeError, match="halted"):
        train_run(cfg, Halted(source.whole), tmp_path / "cut")
    resumed = train_run(cfg, source, tmp_path / "cut", resume=True).saes["small+large"]
    for name, sae in load_run(tmp_path / "whole").saes["small+large"].items():
        for key, tensor in sae.tensors().items():
            assert torch.equal(tensor, resumed[name].tensors()[key]), key
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "whole"), "--draws", "100", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["hooks"]["small+large"]["members"]["plain"]
    sae = resumed["plain"]
    index = np.sort(source.whole._sources[0].heldout_rows)
    for name, x_hat in sae.split(sae({n: x[index] for n, x in X.items()})).items():
        x = X[name][index]
        wanted = (x_hat - x).double().square().sum() / (x - x.mean(0)).double().square().sum()
        assert found["metrics"][f"fvu[{name}]"]["value"] == pytest.approx(float(wanted), rel=1e-4)
    place = str(tmp_path / "whole" / "members" / "small+large" / "plain")
    both = ["--source", f"{small}+{large}", "--draws", "100", "--json"]
    for target in (str(tmp_path / "whole"), place):  # a run of two sources, and one of its SAEs
        assert main(["evaluate", target, *both]) == 0
        again = json.loads(capsys.readouterr().out)["hooks"]["small+large"]["members"]
        values = [
            (again.get("plain") or again["sae"])["metrics"][key]["value"] for key in ("fvu", "l0")
        ]
        assert values == [found["metrics"][key]["value"] for key in ("fvu", "l0")]
        assert main(["evaluate", target, "--source", f"{small}+{large}+{large}"]) == 2
        assert "3 where 2 are read side by side" in capsys.readouterr().err
    counted = found["sources"]
    assert sum(counted["alone"].values()) + sum(counted["of_all"].values()) <= 24
    assert main(["report", str(tmp_path / "whole"), "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    rows = [
        page.index(f">{name}</") for name in ("Plain FVU", "Plain FVU of small", "Weighted FVU")
    ]
    assert rows == sorted(rows)  # a source's fit stands beside the whole's
    assert "relative norm: 0 is small alone, 1 is large alone" in page
    for command in (["export", "--format", "saelens"], ["export", "--format", "sparsify"]):
        assert main([command[0], place, *command[1:], "--out", str(tmp_path / "x")]) == 2
        assert "a crosscoder has no equal there" in capsys.readouterr().err


def test_a_crosscoder_of_one_model_is_put_into_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    language, text = make_model(tmp_path / "model"), make_text(tmp_path / "text.jsonl", 20)
    acts, run, hooks = str(tmp_path / "acts"), str(tmp_path / "run"), ["layers.1", "layers.0.mlp"]
    reading = ["--text", str(text), "--seq-len", "32"]
    assert main(["harvest", str(language), *reading, "--hook", *hooks, "--out", acts]) == 0
    flags = ["--d-sae", "24", "--k", "2", "--tokens", "300", "--batch-size", "100", "--out", run]
    assert main(["train", acts, "--crosscoder", *hooks, *flags]) == 0
    capsys.readouterr()
    quick = ["--draws", "50", "--splice-tokens", "200", "--json"]
    assert main(["evaluate", run, *quick]) == 0
    found = json.loads(capsys.readouterr().out)
    assert not any("not spliced" in note for note in found.get("notes", ()))
    metrics = found["hooks"]["layers.1+layers.0.mlp"]["members"]["plain"]["metrics"]
    for key in ("kl", "ce_delta"):
        assert {key, *(f"{key}[{hook}]" for hook in hooks)} <= metrics.keys()
    explained = [key for key in found["glossary"] if key.startswith(("kl[", "fvu["))]
    assert explained == [f"{key}[{hook}]" for key in ("fvu", "kl") for hook in hooks]
    assert [key for key in metrics if key.startswith("ce_clean")] == ["ce_clean"]
    place = f"{run}/members/layers.1+layers.0.mlp/plain"
    assert main(["evaluate", place, "--model", str(language), *reading, *quick]) == 0
    alone = json.loads(capsys.readouterr().out)["hooks"]["layers.1+layers.0.mlp"]["members"]
    assert alone["sae"]["metrics"]["fvu"]["value"] == pytest.approx(
        metrics["fvu"]["value"], rel=1e-3
    )
    assert main(["report", run, "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.index('id="g-kl[layers.1]"') < page.index('id="g-kl[layers.0.mlp]"')


def test_fit_takes_sources_by_name() -> None:
    sae = wsae.fit(X, k=2, d_sae=24, tokens=1000, batch_size=100)
    assert torch.equal(sae.encode(X), sae.encode(JOINED))
    back = wsae.fit(X, k=2, d_sae=24, tokens=100, batch_size=100, init_from=sae, lr=1e-9)
    torch.testing.assert_close(back.W_dec, sae.W_dec, rtol=1e-4, atol=1e-6)
    cfg = EvalConfig(n_latents=0, draws=100, random_control=False)
    metrics = wsae.evaluate(sae, X, cfg)["metrics"]
    assert {"fvu", "fvu[small]", "fvu[large]"} <= metrics.keys()
    for x, message in (
        ({"small": X["small"]}, "has small; this crosscoder reads small, large"),
        ({"small": X["small"], "large": X["large"][:5]}, "large of shape"),
    ):
        with pytest.raises(UserError, match=message):
            sae.encode(x)


def test_directions_and_the_random_control_are_at_the_scale_where_sources_vary_alike() -> None:
    sae = wsae.fit(X, k=2, d_sae=24, tokens=1000, batch_size=100)
    parts = sae.split(sae.directions)
    norms = torch.stack([part.norm(dim=1) for part in parts.values()]).double()
    torch.testing.assert_close(norms, sae.source_norms(), rtol=1e-5, atol=0)
    found = wsae.evaluate(sae, X, EvalConfig(n_latents=0, draws=100))["control"]
    small, large = (found[f"fvu[{name}]"]["value"] for name in NAMES)
    assert 0.8 < small / large < 1.25, "in their own units the larger source would be all"
    assert large < 1


def test_numbers_that_are_no_crosscoders_are_refused_in_one_line() -> None:
    shape = {"k": 2, "d_sae": 24, "tokens": 100, "batch_size": 100}
    parts = [{"name": "a", "width": 30}, {"name": "b", "width": 3}]
    for acts, options, message in (
        ({}, {}, "names no source"),
        (X, {"target": X["small"]}, "target: is of transcoders"),
        (JOINED, {"crosscoder": parts}, "sources of 33 dimensions together, and the data have 32"),
    ):
        with pytest.raises(UserError, match=message):
            wsae.fit(acts, **shape, **options)
    sae = wsae.fit(X, **shape)
    with pytest.raises(UserError, match="this crosscoder has"):
        sae.split(X["small"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["small.npy", "--crosscoder", "short.npy"], "short has 9 training rows and small 3600"),
        (["small.npy", "--crosscoder", "small.npy"], "hook 'small': is in two of the sources"),
        (["small.npy", "--crosscoder", "none.npy"], "none.npy: is no store or array"),
        (["small.npy", "--crosscoder", "large.npy", "layers.1"], "layers.1: is no store or array"),
        (["small.npy", "--crosscoder", "large.npy", "--skip"], "skip: is of transcoders"),
        (
            ["small.npy", "--crosscoder", "large.npy", "--hook-out", "large.npy"],
            "hook-out: is of tr",
        ),
        (["small.npy", "--crosscoder", "large.npy", "--tied"], "tied: is not for a crosscoder"),
        (["small.npy", "--crosscoder", "large.npy", "--loss", "ce"], "loss ce: is for SAEs of one"),
        (
            ["small.npy", "--crosscoder", "large.npy", "--precondition", "whiten"]
            + ["--shrinkage", "ledoit-wolf"],
            "ledoit-wolf: is not for crosscoders",
        ),
    ],
)
def test_what_is_no_crosscoder_is_refused_in_one_line(
    words: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    stored(tmp_path)
    np.save(tmp_path / "short.npy", X["large"][:10].numpy())
    monkeypatch.chdir(tmp_path)
    assert main(["train", *words, *FLAGS, "--out", "run"]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not Path("run").exists()
