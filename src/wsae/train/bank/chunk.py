"""One chunk of a bank: a stack of SAEs with its optimiser, and its training step."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from wsae.losses.config import GammaConfig
from wsae.losses.gamma import gamma_from_proxy, latent_variance_proxy
from wsae.sae.config import BatchTopK, ReLU
from wsae.sae.model import SparseAutoencoder
from wsae.sae.stack import Stack, StackForward, stack_forward, stack_saes
from wsae.train.bank.config import BankConfig
from wsae.train.config import MemberConfig
from wsae.train.state import GAMMA_EVERY, follow_threshold, latent_variance
from wsae.train.step import lr_factor, remove_radial_gradient, unit_rows_

# One member of a bank: an SAE to train, what it is, and the world it sees.


@dataclass
class Entry:
    """One SAE to train: it is changed in place. Its gamma is set, its b_dec at the data's mean (untied)."""

    sae: SparseAutoencoder
    cfg: MemberConfig
    world: int = 0
    """Which of the batches' worlds it sees."""
    dead: Bool[Tensor, " d_sae"] | None = None
    """Set by training: the latents that are dead at its end, where they are followed."""


def make_entry(
    cfg: MemberConfig,
    gamma: Float[Tensor, "..."],
    mean: Float[Tensor, " d_in"] | None = None,
    world: int = 0,
    seed: int = 0,
) -> Entry:
    """Return a member at its start, as a lone run would have it; `seed` serves where the member names none."""
    d_in = gamma.shape[-1]
    seed = seed if cfg.seed is None else cfg.seed
    sae = SparseAutoencoder(cfg.sae_config(d_in), seed, cfg.start_scale())
    sae.set_gamma(gamma.detach().float())
    if sae.b_dec is not None and mean is not None:
        sae.b_dec.data.copy_(mean)
    return Entry(sae, cfg, world)


# The ReLU step of a stack by hand: the gradients autograd would give, several times faster for
# small SAEs.
#
# The code is held latent-major, z [members, d_sae, batch]: all five products then run along the
# batch, which small widths (d_in = 20) need. `stack_forward` and autograd are the specification.


@dataclass
class Scratch:
    """Buffers of one chunk, reused every step."""

    z: Float[Tensor, "members d_sae batch"]
    dz: Float[Tensor, "members d_sae batch"]

    @classmethod
    def like(cls, stack: Stack, batch: int) -> "Scratch":
        """Return buffers for a stack and a batch size."""
        members, d_sae, _ = stack.W_dec.shape
        z = stack.W_dec.new_empty(members, d_sae, batch, requires_grad=False)
        return cls(z, torch.empty_like(z))


@torch.no_grad()
def relu_gradients(
    stack: Stack,
    x: Float[Tensor, "members batch d_in"],
    gamma: Float[Tensor, "members rows d_in"],
    l1: Float[Tensor, " members"] | None,
    scratch: Scratch,
) -> Float[Tensor, " members"]:
    """Set every parameter's gradient of E||Gamma (x - x_hat)||^2 + l1 E sum_j z_j ||W_dec[j]||; returns the first term.

    `gamma` holds one row of weights per member, or a matrix [d_in, d_in].
    """
    batch, z, dz = x.shape[1], scratch.z, scratch.dz
    centred = x.mT if stack.b_dec is None else x.mT - stack.b_dec.mT
    W_enc, W_dec = stack.encoder_rows, stack.W_dec
    if stack.b_enc is None:
        torch.bmm(W_enc, centred, out=z).relu_()
    else:
        torch.baddbmm(stack.b_enc.mT, W_enc, centred, out=z).relu_()
    residual = torch.baddbmm(centred, W_dec.mT, z, alpha=-1)
    loss, g = _pull(residual, gamma, batch)
    torch.bmm(W_dec, g, out=dz)
    norms = None
    if l1 is not None:
        rate = l1[:, None, None] / batch
        norms = (
            W_dec.norm(dim=2, keepdim=True) if stack.cfg.tied else torch.ones_like(W_dec[..., :1])
        )
        dz.add_(norms * rate)
    torch.ops.aten.threshold_backward.grad_input(dz, z, 0, grad_input=dz)
    decoder = torch.bmm(g, z.mT)
    if stack.W_enc_t is None:
        W_dec.grad = decoder.baddbmm_(centred, dz.mT).mT.contiguous()
        if l1 is not None and norms is not None:
            pushed = z.sum(2, keepdim=True) * (l1[:, None, None] / batch)
            W_dec.grad.addcmul_(W_dec, pushed / norms.clamp_min(1e-12))
        return loss
    W_dec.grad = decoder.mT.contiguous()
    stack.W_enc_t.grad = torch.bmm(centred, dz.mT).mT.contiguous()
    _bias_gradients(stack, g, dz)
    return loss


def _pull(residual: Tensor, gamma: Tensor, batch: int) -> tuple[Tensor, Tensor]:
    """Return E||Gamma r||^2 per member and its gradient with respect to x_hat [members, d_in, batch]."""
    if gamma.shape[1] == 1:
        weights = gamma.mT
        weighed = residual * weights
        g = weighed * (weights * (-2 / batch))
    else:
        weighed = torch.bmm(gamma, residual)
        g = torch.bmm(gamma.mT, weighed).mul_(-2 / batch)
    return weighed.square_().sum((1, 2)) / batch, g


def _bias_gradients(stack: Stack, g: Tensor, dz: Tensor) -> None:
    assert stack.b_enc is not None
    assert stack.b_dec is not None
    summed = dz.sum(2, keepdim=True)
    stack.b_enc.grad = summed.mT
    stack.b_dec.grad = (g.sum(2, keepdim=True) - torch.bmm(stack.encoder_rows.mT, summed)).mT


Batches = Callable[[int], Float[Tensor, "worlds batch d_in"]]
"""Step -> activations of some worlds, valid until the next call; a pure function of the step."""


class Source(NamedTuple):
    """Where a chunk's activations come from."""

    worlds: list[int]
    """Numbers of the worlds, in the order of the batches' first axis."""
    batch: int
    """Rows per step."""
    batches: Batches


@dataclass
class Chunk:
    """Stacked members and everything of them that changes; coefficients have one entry per member."""

    members: list[int]
    """Their places among the bank's entries."""
    batches: Batches
    world: Int64[Tensor, " members"]
    """Each member's place on the batches' first axis."""
    stack: Stack
    optimizer: torch.optim.Optimizer
    lr: float
    gamma: Float[Tensor, "members rows d_in"]
    """rows is 1 for weights per dimension, d_in for a matrix."""
    coefficients: Float[Tensor, "members 3"]
    """Of auxk, l1 and l0."""
    active: tuple[bool, bool, bool]
    """Which of the three penalties the members have: all of a chunk or none, known without a look at the device."""
    k_aux: int
    rule: GammaConfig | None
    """The latent_variance rule whose gamma moves, if that is the members' rule."""
    since_fired: Int64[Tensor, "members d_sae"]
    dead: Bool[Tensor, "members d_sae"]
    any_dead: bool
    follows_dead: bool
    dead_rows: int
    latent_moments: Float64[Tensor, "2 members d_sae"]
    loss_sum: Float64[Tensor, " members"]
    """Sum over steps of the weighted reconstruction loss."""
    scratch: Scratch | None
    """Set where the step is written by hand: ReLU without revival."""

    def write_gamma(self, saes: list[SparseAutoencoder]) -> None:
        """Copy gamma back where training moved it."""
        if self.rule is not None:
            for sae, gamma in zip(saes, self.gamma, strict=True):
                sae.gamma.copy_(gamma[0])


def make_chunk(
    members: list[int], entries: Sequence[Entry], source: Source, cfg: BankConfig, device: str
) -> Chunk:
    """Return the entries stacked at their start."""
    dtype = torch.float32 if cfg.dtype == "float32" else torch.float64
    stack = stack_saes([entry.sae for entry in entries], device, dtype)
    first, shape = entries[0].cfg, (len(entries), stack.cfg.d_sae)
    gammas = [g if g.ndim == 2 else g[None] for g in (entry.sae.gamma for entry in entries)]
    numbers = [[entry.cfg.auxk, entry.cfg.l1, entry.cfg.l0] for entry in entries]
    lr = first.learning_rate(stack.cfg.d_in)
    by_hand = isinstance(stack.cfg.activation, ReLU) and not first.auxk and not first.l0
    return Chunk(
        members=members,
        batches=source.batches,
        world=torch.tensor([source.worlds.index(entry.world) for entry in entries], device=device),
        stack=stack,
        optimizer=_optimizer(cfg, stack, lr),
        lr=lr,
        gamma=torch.stack(gammas).to(device, dtype),
        coefficients=torch.tensor(numbers, dtype=dtype, device=device),
        active=(first.auxk > 0, first.l1 > 0, first.l0 > 0),
        k_aux=first.k_aux or max(1, stack.cfg.d_in // 2),
        rule=first.gamma if first.gamma.rule == "latent_variance" else None,
        since_fired=torch.zeros(shape, dtype=torch.int64, device=device),
        dead=torch.zeros(shape, dtype=torch.bool, device=device),
        any_dead=False,
        follows_dead=first.auxk > 0 or cfg.count_dead,
        dead_rows=cfg.dead_after or max(source.batch, cfg.steps * source.batch // 5),
        latent_moments=torch.zeros(2, *shape, dtype=torch.float64, device=device),
        loss_sum=torch.zeros(len(entries), dtype=torch.float64, device=device),
        scratch=Scratch.like(stack, source.batch) if by_hand else None,
    )


def run_chunk(chunk: Chunk, steps: range, cfg: BankConfig) -> None:
    """Train every member of a chunk for a stretch of steps."""
    weights = chunk.stack.W_dec
    for step in steps:
        chunk_step(chunk, chunk.batches(step).to(weights.device, weights.dtype), step, cfg)


def chunk_step(
    chunk: Chunk, x: Float[Tensor, "worlds batch d_in"], step: int, cfg: BankConfig
) -> None:
    """One optimiser step of every member on its world's batch.

    The members' losses are added, so each gets its own gradient; Adam and gradient descent work entry by entry.
    """
    stack = chunk.stack
    x = x.index_select(0, chunk.world)
    reconstruction, z = _by_hand(chunk, x) if chunk.scratch else _by_autograd(chunk, x)
    rate = chunk.lr * lr_factor(step, cfg.steps, cfg.warmup, cfg.decay)
    for group in chunk.optimizer.param_groups:
        group["lr"] = rate
    with torch.no_grad():
        remove_radial_gradient(stack)
        chunk.optimizer.step()
        unit_rows_(stack)
        chunk.loss_sum += reconstruction
        _count(chunk, z, step)
        if isinstance(stack.cfg.activation, BatchTopK):
            follow_threshold(stack.threshold, torch.where(z > 0, z, torch.inf).amin((1, 2)))
        _track_latents(chunk, z, step, cfg.latent_variance_decay)


def _by_hand(chunk: Chunk, x: Tensor) -> tuple[Tensor, Tensor]:
    assert chunk.scratch is not None
    l1 = chunk.coefficients[:, 1] if chunk.active[1] else None
    loss = relu_gradients(chunk.stack, x, chunk.gamma, l1, chunk.scratch)
    return loss, chunk.scratch.z.mT


def _by_autograd(chunk: Chunk, x: Tensor) -> tuple[Tensor, Tensor]:
    forward = stack_forward(chunk.stack, x)
    residual = x - forward.x_hat
    reconstruction = _weighted(residual, chunk.gamma)
    loss = reconstruction + _penalties(chunk, residual, forward)
    for parameter in chunk.stack.parameters():
        parameter.grad = None
    loss.sum().backward()
    return reconstruction.detach(), forward.z.detach()


def _weighted(residual: Tensor, gamma: Tensor) -> Tensor:
    """Return the mean over the batch of ||Gamma r||^2, one number per member (Eq. 12)."""
    weighed = residual * gamma if gamma.shape[1] == 1 else torch.bmm(residual, gamma.mT)
    return weighed.square().sum((1, 2)) / residual.shape[1]


def _penalties(chunk: Chunk, residual: Tensor, forward: StackForward) -> Tensor:
    auxk, l1, l0 = chunk.coefficients.unbind(1)
    has_auxk, has_l1, has_l0 = chunk.active
    total = torch.zeros_like(auxk)
    if has_l1:
        total = total + l1 * forward.l1
    if has_l0:
        total = total + l0 * forward.l0
    if has_auxk and chunk.any_dead:
        total = total + auxk * _revival(chunk, residual.detach(), forward)
    return total


def _revival(chunk: Chunk, residual: Tensor, forward: StackForward) -> Tensor:
    """AuxK of every member (see `auxk_loss`): its dead latents model its residual."""
    count = min(chunk.k_aux, chunk.stack.cfg.d_sae)
    dead = chunk.dead[:, None].expand_as(forward.pre)
    candidates = forward.pre.detach().masked_fill(~dead, -torch.inf)
    index = candidates.topk(count, dim=2, sorted=False).indices
    values = forward.pre.gather(2, index).relu() * dead.gather(2, index)
    z = torch.zeros_like(forward.pre).scatter(2, index, values)
    loss = _weighted(residual - torch.bmm(z, chunk.stack.W_dec), chunk.gamma)
    return loss * chunk.dead.any(1)


def _optimizer(cfg: BankConfig, stack: Stack, lr: float) -> torch.optim.Optimizer:
    if cfg.optimizer == "adam":
        return torch.optim.Adam(stack.parameters(), lr=lr, fused=True)
    return torch.optim.SGD(stack.parameters(), lr=lr)


def _count(chunk: Chunk, z: Tensor, step: int) -> None:
    if not chunk.follows_dead:
        return
    fired = (z > 0).any(1)
    chunk.since_fired.add_(z.shape[1]).masked_fill_(fired, 0)
    if (step + 1) % GAMMA_EVERY == 0:
        chunk.dead = chunk.since_fired > chunk.dead_rows
        chunk.any_dead = bool(chunk.dead.any())


def _track_latents(chunk: Chunk, z: Tensor, step: int, decay: float) -> None:
    """Refresh a latent_variance gamma from the running variances of the latents."""
    if chunk.rule is None:
        return
    moments = torch.stack([z.mean(1), z.square().mean(1)]).double()
    chunk.latent_moments.lerp_(moments, 1 - decay)
    if (step + 1) % GAMMA_EVERY == 0:
        variance = latent_variance(chunk.latent_moments, step, decay)
        for i, W_dec in enumerate(chunk.stack.W_dec.detach().double()):
            proxy = latent_variance_proxy(variance[i], W_dec)
            chunk.gamma[i, 0] = gamma_from_proxy(chunk.rule, proxy).to(chunk.gamma)
