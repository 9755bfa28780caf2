"""The registry: a kind of one's own goes everywhere; what is registered is refused twice."""

import re
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

import wsae
from wsae.acts.source import ArraySource
from wsae.cli.main import main
from wsae.core.errors import UserError
from wsae.interop.saes import save
from wsae.sae import SAE, ActivationConfig, Architecture, SAEConfig, register
from wsae.sae.architectures import _BY_CONFIG, Every, architecture_of
from wsae.sae.config import KINDS
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.run import train_run

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kinds.md"


class AbsTopK(ActivationConfig):
    """The k largest pre-activations of either sign."""

    kind: Literal["abs_topk"] = "abs_topk"
    k: int = 4


def largest(pre: Tensor, own: object, cfg: AbsTopK) -> Tensor:  # noqa: ARG001
    index = pre.detach().abs().topk(cfg.k, dim=-1).indices
    return pre * torch.zeros_like(pre).scatter(-1, index, 1.0)


def every(cfg: AbsTopK, own: object) -> Every:  # noqa: ARG001
    return Every()


@pytest.fixture(scope="module")
def acts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    g = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(60, 24, generator=g), dim=1)
    z = (torch.rand(3000, 60, generator=g) < 0.05) * torch.rand(3000, 60, generator=g)
    path = tmp_path_factory.mktemp("kinds") / "acts.npy"
    np.save(path, (8 * z @ directions).numpy())
    return path


@pytest.fixture(scope="module")
def soft(acts: Path, tmp_path_factory: pytest.TempPathFactory) -> type[ActivationConfig]:
    """The documentation's example, run as it stands."""
    (code,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(), flags=re.S)
    assert len(code.splitlines()) < 60
    here = tmp_path_factory.mktemp("example")
    found: dict[str, type[ActivationConfig]] = {"__name__": "example"}  # type: ignore[dict-item]
    code = code.replace('"acts.npy"', repr(str(acts))).replace(
        '"soft")  #', f"{str(here / 'sae')!r})  #"
    )
    try:
        exec(compile(code, "kinds.md", "exec"), found)  # noqa: S102
        assert SAE.load(here / "sae").cfg.activation == found["Soft"](margin=0.3)
        register(Architecture(AbsTopK, every, values=largest))
        yield found["Soft"]
    finally:
        for kind in ("soft", "abs_topk"):
            _BY_CONFIG.pop(KINDS.pop(kind), None)


def family(kernels: str, soft: type[ActivationConfig]) -> TrainConfig:
    own = {"d_sae": 96, "lr": 3e-3, "l1": 0.3, "activation": {"kind": "soft", "margin": 0.2}}
    members = ({**own, "gamma": {"rule": "variance", "alpha": 0.5}}, own)
    data = {"members": members, "tokens": 12_000, "batch_size": 200, "kernels": kernels}
    cfg = TrainConfig.parse(data)
    assert isinstance(cfg.members[0].activation, soft)
    return cfg


def test_a_kind_of_ones_own_goes_through_training_files_and_commands(
    acts: Path, soft: type[ActivationConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = {
        kernels: train_run(family(kernels, soft), ArraySource(acts), tmp_path / kernels)
        for kernels in ("auto", "eager")
    }
    for name, sae in runs["auto"].saes["acts"].items():
        other = runs["eager"].saes["acts"][name]
        assert type(sae.cfg.activation) is soft
        assert "margin" in sae.tensors()
        assert not torch.equal(sae.tensors()["margin"], torch.full((96,), 0.2))  # it was learned
        for key, tensor in sae.tensors().items():
            assert (other.tensors()[key] - tensor).norm() <= 5e-3 * max(1.0, float(tensor.norm()))
        z = sae.encode(np.load(acts)[:9])
        pre = sae.pre(sae.centre(torch.from_numpy(np.load(acts)[:9])))
        torch.testing.assert_close(z, (pre - sae.tensors()["margin"]).relu())
    out = tmp_path / "auto"
    assert main(["evaluate", str(out), "--source", str(acts), "--json"]) == 0
    capsys.readouterr()
    assert main(["report", str(out), "--out", str(tmp_path / "report.html")]) == 0
    with pytest.raises(UserError, match="activation soft has no equal in SAELens"):
        save(sae, tmp_path / "saelens", "saelens")


def test_a_kind_whose_values_look_at_whole_rows_trains_by_autograd(
    acts: Path, soft: type[ActivationConfig]
) -> None:
    assert soft  # registers both
    member = MemberConfig(activation=AbsTopK(k=3), d_sae=48, lr=3e-3)
    (sae,) = wsae.fit_family(str(acts), [member], tokens=9000, batch_size=200).saes
    z = sae.encode(np.load(acts)[:50])
    assert bool((z != 0).sum(1).eq(3).all())
    assert bool((z < 0).any())


def test_a_name_is_registered_once_and_unknown_ones_are_told(soft: type[ActivationConfig]) -> None:
    with pytest.raises(UserError, match="called 'soft' is registered already; choose another name"):
        register(Architecture(soft, every))

    class Other(ActivationConfig):
        kind: Literal["topk"] = "topk"

    with pytest.raises(UserError, match="called 'topk' is registered already"):
        register(Architecture(Other, every))
    with pytest.raises(UserError, match="activation Other is not registered"):
        architecture_of(Other())
    data = {"d_in": 4, "d_sae": 8, "activation": {"kind": "sfot"}}
    with pytest.raises(
        UserError, match="activation 'sfot' is unknown; choose topk, .* or abs_topk"
    ):
        SAEConfig.parse(data)
    data["activation"] = {"kind": "soft", "margins": 1}
    with pytest.raises(UserError, match=r"soft: unknown key 'margins' \(nearest: margin\)"):
        SAEConfig.parse(data)
