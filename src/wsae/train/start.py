"""A family at its start, from data: covariances, and what pilots leave, taken where a member asks for them."""

import math
from collections.abc import Callable

import torch

from wsae.acts.flow import SourceStats
from wsae.acts.stream import ActivationSource
from wsae.core.errors import UserError
from wsae.core.progress import Progress, quiet
from wsae.sae.config import GammaConfig
from wsae.stats import Covariance
from wsae.train.config import MemberConfig, TrainConfig
from wsae.train.family import FamilyState, Inputs, Start, make_family
from wsae.train.loop import run_steps
from wsae.train.native import as_usual
from wsae.train.state import MemberState, make_batch

MAX_ROWS = 131_072
"""Rows behind a covariance at most: 32 for each of 4096 dimensions."""
_BATCH = 4096


def covariances(
    cfg: TrainConfig,
    source: ActivationSource,
    stats: dict[str, SourceStats],
    progress: Progress = quiet,
) -> dict[str, Covariance]:
    """Return each hook's covariance over shuffled training rows of one epoch, 131,072 at most; {} if no rule needs it.

    Rows are counted as the statistics are: a live model's first `stats_tokens`. Memory is d_in^2 x 8 bytes per hook and
    one batch. The sample is that of the run's seed, so a resumed run sees the same one.
    """
    if not any(member.needs_covariance for member in cfg.members):
        return {}
    wanted = min(MAX_ROWS, *(s.kept.n for s in stats.values()))
    even = wanted // math.ceil(wanted / _BATCH)  # whole batches that leave almost no row out
    batch = even if source.n_rows is not None else min(cfg.batch_size, wanted)
    stream = source.stream(batch, cfg.seed)
    found = {hook: Covariance(d_in) for hook, d_in in source.hooks.items()}
    with progress("covariance", wanted // batch * batch, "rows") as tick:
        for _ in range(wanted // batch):
            rows = stream.next()
            if stream.state().get("epoch", 0) != 0:
                break  # a short text has begun again
            for hook, covariance in found.items():
                covariance.update(rows[hook])
            tick(batch)
    return found


PILOT = 4
"""A pilot is trained on one in so many of the run's rows."""


def start_family(
    cfg: TrainConfig,
    source: ActivationSource,
    stats: dict[str, SourceStats],
    device: str = "cpu",
    progress: Progress = quiet,
    make: Callable[[str, str, MemberConfig, Inputs], MemberState | None] | None = None,
    start: Start | None = None,
) -> FamilyState:
    """Return every hook's members at step 0, with what the data say of their loss weights and preconditioners.

    `make` and `start` are those of `make_family`; pilots start there too. With a `make`, pilots are trained on the CPU,
    where all processes get the same bits.
    """
    found = covariances(cfg, source, stats, progress)
    pilots = "cpu" if make else device
    left = residuals(cfg, source, stats, found, pilots, progress, start)
    return make_family(cfg, stats, device, found, left, make, start)


def residuals(
    cfg: TrainConfig,
    source: ActivationSource,
    stats: dict[str, SourceStats],
    covariances: dict[str, Covariance],
    device: str = "cpu",
    progress: Progress = quiet,
    start: Start | None = None,
) -> dict[str, dict[str, Covariance]]:
    """Return hook -> member -> covariance of the residual x - x_hat of its pilot, for members that ask for one.

    A pilot is the member without weights (in round 2: with those of round 1) and without a map made of what it leaves,
    trained on the run's first batches, a quarter of all; the covariance is taken over shuffled training rows, 131,072
    at most, of what the SAE sees: with another preconditioner that is P x. Members that differ in nothing else share
    one. Pilots are not kept: a resumed run trains them again, to the same bits on a CPU. Raises UserError for a map
    made of what a pilot leaves with a `start`, whose rows are of norm 1 in other coordinates.
    """
    asked = dict(zip(cfg.names(), cfg.members, strict=True))
    asked = {name: member for name, member in asked.items() if member.needs_pilot}
    if start is not None and any(not m.gamma.needs_pilot for m in asked.values()):
        raise UserError(
            "precondition residual: does not go on with an SAE, whose rows are of norm 1 elsewhere; leave out one of "
            "--precondition and --init-from"
        )
    left: dict[str, dict[str, Covariance]] = {}
    for number in range(1, 1 + max((m.gamma.rounds or 1 for m in asked.values()), default=0)):
        alike: dict[MemberConfig, list[str]] = {}
        for name, member in asked.items():
            if (member.gamma.rounds or 1) >= number:
                alike.setdefault(_pilot(member, number), []).append(name)
        named = tuple(
            pilot.model_copy(update={"label": names[0]}) for pilot, names in alike.items()
        )
        tokens = max(cfg.batch_size, cfg.tokens // PILOT)
        pilot = cfg.model_copy(update={"members": named, "tokens": tokens})
        family = make_family(pilot, stats, device, covariances, left, start=start)
        stream = source.stream(pilot.batch_size, pilot.seed)
        with progress(f"pilot {number}", pilot.steps * pilot.batch_size, "tokens") as tick:
            run_steps(pilot, family, stream, 0, tick, lambda _: None)
        left = _left(pilot, family, source, stats, left)
        for found in left.values():
            found |= {name: found[names[0]] for names in alike.values() for name in names}
    return left


def _pilot(member: MemberConfig, number: int) -> MemberConfig:
    """Return the SAE, unnamed, whose errors a member's weights or map are made of in a round."""
    mapped = member.precondition
    own = {"gamma": GammaConfig()} if number == 1 else {}
    own |= {"precondition": None} if mapped is not None and mapped.needs_pilot else {}
    return member.model_copy(update={**own, "label": None})


@torch.no_grad()
def _left(
    cfg: TrainConfig,
    family: FamilyState,
    source: ActivationSource,
    stats: dict[str, SourceStats],
    before: dict[str, dict[str, Covariance]],
) -> dict[str, dict[str, Covariance]]:
    """Return the covariance of what each trained pilot leaves, beside those of `before`."""
    found = {hook: dict(before.get(hook, {})) for hook in family.members}
    for hook, member in family.all():
        found[hook][member.name] = Covariance(len(member.mean))
    stream = source.stream(cfg.batch_size, cfg.seed)
    rows = min(MAX_ROWS, *(s.kept.n for s in stats.values()))
    for _ in range(max(1, rows // cfg.batch_size)):
        batch = stream.next()
        for hook, member in family.all():
            with as_usual(member):
                out, device = cfg.given(hook), member.mean.device
                y = None if out is None else batch[out].to(device)
                made = make_batch(batch[hook].to(device), member, y)
                found[hook][member.name].update((made.target - member.sae(made.x)) * member.scale)
    return found
