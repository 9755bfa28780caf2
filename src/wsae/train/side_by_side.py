"""Members of a family on a CPU's cores: compiled members train side by side, a thread each, others in turn.

Two members on two threads finish sooner side by side, on one thread each, than in turn on both: no core waits for
another inside a step. Results do not change: the compiled kernels give the same bits for any number of threads.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import torch

from wsae.train.config import TrainConfig
from wsae.train.family import Family
from wsae.train.state import Batch, MemberState
from wsae.train.step import chosen, train_step

Steps = Callable[[list[MemberState], Batch, int], None]


@contextmanager
def side_by_side(cfg: TrainConfig, family: Family) -> Iterator[Steps]:
    """Yield what takes one step of every member of a hook."""
    threads = torch.get_num_threads()
    together = min(threads, max(len(members) for members in family.members.values()))
    if together < 2 or not all(_compiled(member, cfg) for _, member in family.all()):
        yield lambda members, batch, step: _in_turn(members, batch, step, cfg)
        return
    pool = ThreadPoolExecutor(
        together, "wsae-member", initializer=torch.set_num_threads, initargs=(threads // together,)
    )
    try:

        def together_now(members: list[MemberState], batch: Batch, step: int) -> None:
            list(pool.map(lambda member: train_step(member, batch, step, cfg), members))

        yield together_now
    finally:
        pool.shutdown(cancel_futures=True)


def _compiled(member: MemberState, cfg: TrainConfig) -> bool:
    """Say whether every step of this member will be the compiled one (ReLU kinds change over on the way)."""
    return hasattr(member.cfg.activation, "k") and chosen(member, cfg, member.mean) == "native"


def _in_turn(members: list[MemberState], batch: Batch, step: int, cfg: TrainConfig) -> None:
    for member in members:
        train_step(member, batch, step, cfg)
