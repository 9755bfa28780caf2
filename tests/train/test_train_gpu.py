"""Who is trained with the Triton kernels; `train_gpu_cases` holds the step itself to autograd."""

import logging
from typing import Literal, get_args

import pytest
import torch

from wsae.acts.source import ArraySource
from wsae.core.errors import UserError
from wsae.core.progress import quiet
from wsae.sae import architectures
from wsae.sae.architectures import Architecture, Every
from wsae.sae.config import ActivationConfig, Kind, make_activation
from wsae.sae.forward import Whole
from wsae.train import step as dispatch
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import make_family
from wsae.train.loop import run_steps
from wsae.train.state import MemberState, Target, make_member


def member_of(kernels: str) -> tuple[MemberState, TrainConfig]:
    data = {"members": ({"d_sae": 8, "activation": {"kind": "topk", "k": 2}},), "tokens": 10}
    run = TrainConfig.parse({**data, "kernels": kernels})
    return make_member("plain", run.members[0], run, torch.zeros(3), 1.0), run


def test_triton_without_a_cuda_device_says_so() -> None:
    member, run = member_of("triton")
    with pytest.raises(
        UserError, match="'triton' cannot train plain: .* on cpu; use auto or eager"
    ):
        dispatch.chosen(member, run, torch.zeros(2, 3))


def test_auto_takes_triton_on_other_devices_or_says_once_why_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    member, run = member_of("auto")
    elsewhere = torch.zeros(2, 3, device="meta")
    dispatch._told.clear()
    with caplog.at_level(logging.WARNING, logger="wsae"):
        assert dispatch.chosen(member, run, elsewhere) == "eager"
        assert dispatch.chosen(member, run, elsewhere) == "eager"
    (record,) = caplog.records
    assert record.message.startswith("training plain with PyTorch's own kernels: the kernels run")
    monkeypatch.setattr(dispatch, "unfit_triton", lambda *_: None)
    assert dispatch.chosen(member, run, elsewhere) == "triton"
    assert dispatch.chosen(member, run, torch.zeros(2, 3)) != "triton"
    member, run = member_of("eager")
    assert dispatch.chosen(member, run, elsewhere) == "eager"


@pytest.mark.parametrize(
    ("activation", "asked"),
    [
        ({"kind": "topk", "k": 2}, (2, False)),
        ({"kind": "group_topk", "k": 2}, (2, True)),
        ({"kind": "batch_topk", "k": 2}, (None, False)),
        ({"kind": "relu"}, (None, False)),
    ],
)
def test_a_member_is_asked_for_with_what_its_kernels_depend_on(
    activation: dict[str, object], asked: tuple[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    questions = []
    monkeypatch.setattr(dispatch, "unsupported", lambda *a: questions.append(a) or "no")
    run = TrainConfig.parse(
        {"members": ({"d_sae": 8, "activation": activation},), "tokens": 1, "dtype": "bfloat16"}
    )
    member = make_member("plain", run.members[0], run, torch.zeros(3), 1.0)
    assert dispatch.unfit_triton(member, run) == "no"
    assert questions[0][1:] == (torch.bfloat16, *asked)


class OfRows(ActivationConfig):
    """A kind whose values look at whole rows."""

    kind: Literal["of_whole_rows"] = "of_whole_rows"


JUMP = {"kind": "jumprelu"}


@pytest.mark.parametrize(
    ("settings", "part", "says"),
    [
        ({"activation": OfRows()}, {}, "the kind of_whole_rows does not say which latents"),
        ({"activation": JUMP, "pre_act": 1e-5}, {}, "the pre-activation loss has a gradient at"),
        ({}, {"unfit": "its rows lie on several processes"}, "its rows lie on several processes"),
        ({}, {"d_sae": 16}, "its latents lie on several processes"),
        *(
            ({"activation": make_activation(kind, 2)}, {"d_sae": 8}, None)
            for kind in get_args(Kind)
        ),
        ({"skip": True}, {}, None),
    ],
)
def test_what_triton_does_not_train_is_said(
    settings: dict[str, object], part: dict[str, object], says: str | None, monkeypatch
) -> None:
    for name in ("unsupported", "_fails"):
        monkeypatch.setattr(dispatch, name, lambda *_: None)
    if "activation" in settings and settings["activation"] == OfRows():
        known = Architecture(OfRows, lambda cfg, own: Every())  # noqa: ARG005
        monkeypatch.setitem(architectures._BY_CONFIG, OfRows, known)
    member = {"d_sae": 8, "activation": {"kind": "topk", "k": 2}, **settings}
    run = TrainConfig.parse({"members": (MemberConfig.parse(member),), "tokens": 1})
    target = Target(torch.zeros(5), 1.0) if "skip" in settings else None
    state = make_member("plain", run.members[0], run, torch.zeros(3), 1.0, target=target)
    state.part = Whole()
    vars(state.part).update(part)
    reason = dispatch.unfit_triton(state, run)
    assert reason is None if says is None else reason.startswith(says)


def test_a_member_that_triton_does_not_train_is_refused_before_another_takes_a_step(
    monkeypatch,
) -> None:
    monkeypatch.setattr(dispatch, "unsupported", lambda *_: None)
    monkeypatch.setattr(dispatch, "_fails", lambda *_: None)
    refused = {"d_sae": 8, "activation": JUMP, "pre_act": 1e-5, "label": "jumps"}
    data = {"members": [{"d_sae": 8, "activation": {"kind": "topk", "k": 2}}, refused]}
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    source, run = ArraySource(x.numpy()), {"tokens": 64, "batch_size": 8, "kernels": "triton"}
    cfg = TrainConfig.parse({**data, **run})
    family = make_family(cfg, source.stats())
    with (
        quiet("train", None, "tokens") as tick,
        pytest.raises(UserError, match="^kernels 'triton' cannot train jumps: the pre-activation"),
    ):
        run_steps(cfg, family, source.stream(8, 0), 0, tick, lambda _: None)
    assert not any(member.sums["rows"] for _, member in family.all())


def test_triton_that_does_not_start_is_a_reason() -> None:
    """Without a CUDA device no kernel launches, which the trial reports instead of raising."""
    if torch.cuda.is_available():
        return
    reason = dispatch._fails(torch.device("cpu"))
    assert reason is not None
    assert reason.startswith("triton does not work here (")
