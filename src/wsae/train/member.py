"""The parts of a member's training under one name."""

from wsae.train.counters import GAMMA_EVERY, metrics_row
from wsae.train.eager import remove_radial_gradient as _remove_radial_gradient
from wsae.train.eager import unit_rows_ as _unit_rows_
from wsae.train.state import Batch, MemberState, make_batch, make_member
from wsae.train.step import train_step

__all__ = [
    "GAMMA_EVERY",
    "Batch",
    "MemberState",
    "_remove_radial_gradient",
    "_unit_rows_",
    "make_batch",
    "make_member",
    "metrics_row",
    "train_step",
]
