"""One step by hand-written gradients on the Triton kernels; `wsae.train.eager` is its specification.

With G = dL/dx_hat = (2 / batch) Gamma^T Gamma (x_hat - x) and the pairs (b, j) of active latents:
    dz = W_dec[j] . G[b] + l1 |W_dec[j]| / batch      dpre = dz where z > 0
    dW_dec[j] = sum z G[b]     dW_enc[j] = sum dpre (x - b_dec)[b]     db_enc[j] = sum dpre
    db_dec = sum_b G[b] - sum_j db_enc[j] W_enc[j]
The residual that dead latents model is a second reconstruction, whose pairs join the sums over a latent.

The host waits for the device only where a docstring says so: `find_codes` for batch Top-k, ReLU and JumpReLU,
`dead_latents` and `next_step` when what they read has changed, and the counters of a latent_variance gamma.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.losses.weigh import weigh
from wsae.ops import SparseCode
from wsae.ops.sparse import Plan
from wsae.ops.triton.sums import decode, pair_products
from wsae.train.config import TrainConfig
from wsae.train.counters import add_sums, count, follow_latents, refresh_gamma
from wsae.train.gpu.codes import find_codes, revive
from wsae.train.gpu.host import dead_latents
from wsae.train.gpu.pairs import in_row_order, joined, sort_by_latent
from wsae.train.gpu.update import Terms, update
from wsae.train.handwritten import Codes, Losses, step_result, threshold_slopes
from wsae.train.state import Batch, MemberState


class Part(NamedTuple):
    """One reconstruction (of x, or of the residual by dead latents): its gradients and its losses."""

    plan: Plan
    """In order of row only."""
    z: Float[Tensor, " pairs"]
    dz: Float[Tensor, " pairs"]
    dpre: Float[Tensor, " pairs"]
    G: Float[Tensor, "batch d_in"]
    error: Float[Tensor, "batch d_in"]
    """x_hat - x."""
    losses: Losses


@torch.no_grad()
def triton_step(
    member: MemberState, batch: Batch, rate: float, run: TrainConfig, step: int
) -> SparseCode:
    """One optimiser step at learning rate `rate`; metrics are summed into the member; returns the code."""
    sae, cfg, x = member.sae, member.cfg, batch.x.contiguous()
    centred = sae.centre(x)
    dtype = torch.bfloat16 if run.dtype == "bfloat16" else torch.float32
    codes = find_codes(sae, centred, dtype)
    main = _reconstruct(member, codes, x, sae.b_dec)
    if cfg.l1:
        main = _priced(member, main, codes)
    parts = [main]
    dead = dead_latents(member.dead)
    if cfg.auxk and dead.number:
        k = min(cfg.revived(x.shape[1]), dead.number)
        revival = _reconstruct(member, revive(sae, centred, dead, k, dtype), -main.error, None)
        parts.append(revival._replace(dpre=cfg.auxk * revival.dpre, G=cfg.auxk * revival.G))
    slopes = threshold_slopes(member, codes, main.dz)
    update(member, _terms(member, parts, centred), slopes, rate)
    code = SparseCode(main.z, main.plan.indices, main.plan.offsets)
    aux = parts[1].losses.reconstruction if len(parts) > 1 else None
    count(member, code, len(x))
    add_sums(member, batch, step_result(member, code, main.losses, aux))
    if follow_latents(member, code, step, run.latent_variance_decay):
        refresh_gamma(member, sae.W_dec.detach(), step, run.latent_variance_decay)
    return code


def _reconstruct(member: MemberState, codes: Codes, target: Tensor, start: Tensor | None) -> Part:
    """Decode, starting from a vector if one is given, and take the loss ||Gamma (x_hat - target)||^2 back to z."""
    sae, plan, batch = member.sae, in_row_order(codes.pre), len(target)
    W = sae.W_dec.detach()
    x_hat = decode(codes.z, W, plan)
    x_hat = x_hat if start is None else x_hat.add_(start)
    error = x_hat.sub_(target)
    weighted = weigh(error, sae.gamma)
    # Gamma^T Gamma e: the transpose shows only where Gamma is a matrix
    G = weigh(weighted, sae.gamma if sae.gamma.ndim == 1 else sae.gamma.T).mul_(2 / batch)
    dz = pair_products(G, W, plan)
    losses = Losses(weighted.square().sum() / batch, error.square().sum(), 0.0)
    return Part(plan, codes.z, dz, dz * codes.passes, G, error, losses)


def _priced(member: MemberState, main: Part, codes: Codes) -> Part:
    """Add the L1 penalty: the rows of an untied decoder have norm 1."""
    price, sae = member.cfg.l1 / codes.pre.batch, member.sae
    if sae.cfg.tied:
        price = price * torch.linalg.vector_norm(sae.W_dec.detach(), dim=1)[main.plan.indices]
    dz = main.dz + price
    losses = main.losses._replace(penalty=(main.z * price).sum())
    return main._replace(dz=dz, dpre=dz * codes.passes, losses=losses)


def _terms(member: MemberState, parts: list[Part], centred: Tensor) -> Terms:
    main, *others = parts
    plan = sort_by_latent(joined([part.plan for part in parts]), member.sae.cfg.d_sae)
    z, dpre, G = main.z, main.dpre, main.G
    for part in others:
        z, dpre = torch.cat([z, part.z]), torch.cat([dpre, part.dpre])
        G = torch.cat([G, part.G])
    return Terms(plan, z, dpre, G, centred, len(main.z))
