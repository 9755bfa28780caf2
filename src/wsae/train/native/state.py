"""Where a member's large tensors are: in the SAE and its optimiser, or, while compiled kernels train it, in slices."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from wsae.ops.native.select import dimension_scales
from wsae.ops.native.weights import Matrix, Weights, make_weights
from wsae.sae.config import GroupTopK
from wsae.train.state import MemberState


def enter(member: MemberState) -> Weights:
    """Move a member's matrices and their Adam moments into slices, if they are not there; returns them."""
    if member.weights is None:
        cfg = member.sae.cfg
        group = (
            cfg.d_sae // cfg.activation.k if isinstance(cfg.activation, GroupTopK) else cfg.d_sae
        )
        matrices = [_take(member, p) for p in _matrices(member)]
        encoder = matrices[1] if len(matrices) > 1 else None
        dim = dimension_scales(member.spread)
        member.weights = make_weights(matrices[0], encoder, cfg.d_in, group, dim)
    return member.weights


def leave(member: MemberState) -> None:
    """Move them back."""
    if member.weights is None:
        return
    weights, member.weights = member.weights, None
    _put(member, weights)


@contextlib.contextmanager
def as_usual(member: MemberState) -> Iterator[None]:
    """Show the SAE and its optimiser whole while inside, without disturbing compiled training."""
    weights = member.weights
    if weights is not None:
        _put(member, weights)
    try:
        yield
    finally:
        if weights is not None:
            for p in _matrices(member):
                _clear(member, p)


def moments(member: MemberState, parameter: nn.Parameter) -> dict[str, Tensor]:
    """Return a parameter's Adam state, made as torch.optim.Adam makes it where there is none."""
    state = member.optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state["exp_avg"] = torch.zeros_like(parameter.detach())
        state["exp_avg_sq"] = torch.zeros_like(parameter.detach())
    return state


def _matrices(member: MemberState) -> list[nn.Parameter]:
    sae = member.sae
    return [sae.W_dec] if sae.W_enc_t is None else [sae.W_dec, sae.W_enc_t]


def _take(member: MemberState, parameter: nn.Parameter) -> Matrix:
    state = moments(member, parameter)
    matrix = Matrix.of(parameter.detach(), (state["exp_avg"], state["exp_avg_sq"]))
    _clear(member, parameter)
    return matrix


def _clear(member: MemberState, parameter: nn.Parameter) -> None:
    """Let go of the memory of a parameter and its moments; the count of steps stays."""
    parameter.data, parameter.grad = parameter.new_empty(0), None
    state = member.optimizer.state[parameter]
    state["exp_avg"] = state["exp_avg_sq"] = parameter.new_empty(0)


def _put(member: MemberState, weights: Weights) -> None:
    for parameter, matrix in zip(_matrices(member), weights.dense(), strict=True):
        parameter.data = matrix.W
        state = member.optimizer.state[parameter]
        state["exp_avg"], state["exp_avg_sq"] = matrix.m, matrix.v
