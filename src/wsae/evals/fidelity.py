"""How well reconstructions match held-out activations: streaming sums from which every fidelity metric follows.

Two passes over the data, members sharing each chunk. The first (`Survey`) gives the exact mean and variance and what
the latents do; the second (`Errors`) sums squared errors against that mean. So memory depends on the number of
sequences and dimensions, never on the number of tokens.

    fvu = sum_t |x_t - x_hat_t|^2 / sum_t |x_t - mean|^2            mean: over the held-out rows

Not about zero: where the mean is large against the spread (residual streams), sum |x|^2 counts a constant that any
bias explains, and a poor SAE would look near perfect.
"""

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Float64, Int64
from torch import Tensor

from wsae.core.errors import UserError
from wsae.evals.latents import Entries, LatentActivity
from wsae.losses.weigh import Weights, weigh
from wsae.ops import SparseCode
from wsae.sae import SparseAutoencoder
from wsae.sae.encoding import Encoder
from wsae.stats.moments import Moments


class SequenceSums:
    """Running sums of some columns per sequence, in fp64; grows with the largest sequence number met."""

    def __init__(self, columns: int) -> None:
        self._sums = torch.zeros(0, columns, dtype=torch.float64)
        self.n_seq = 0

    def add(self, seq: Int64[Tensor, " rows"], values: Float64[Tensor, "rows columns"]) -> None:
        """Add each row's values to its sequence."""
        if not len(seq):
            return
        self.n_seq = max(self.n_seq, int(seq.max()) + 1)
        if self.n_seq > len(self._sums):
            grown = values.new_zeros(max(self.n_seq, 2 * len(self._sums)), values.shape[1])
            grown[: len(self._sums)] = self._sums
            self._sums = grown
        self._sums.index_add_(0, seq, values)

    @property
    def sums(self) -> Float64[Tensor, "n_seq columns"]:
        """The sums of sequences 0 .. n_seq - 1."""
        return self._sums[: self.n_seq]


class Survey:
    """First pass over one hook: held-out moments, and each member's latent activity."""

    def __init__(self, hook: str, saes: dict[str, SparseAutoencoder], d_in: int) -> None:
        for name, sae in saes.items():
            check_width(f"{hook}/{name}", sae.cfg.d_in, d_in)
        self.hook = hook
        self.saes = saes
        self.moments = Moments(d_in)
        self.activity = {name: LatentActivity(sae.cfg.d_sae) for name, sae in saes.items()}
        self._encoders = {name: Encoder(sae) for name, sae in saes.items()}

    def update(self, x: Float[Tensor, "rows d_in"]) -> dict[str, SparseCode]:
        """Add some rows and return each member's code of them.

        Raises UserError naming the hook, row and dimension of a NaN or infinity.
        """
        try:
            self.moments.update(x)
        except UserError as error:
            raise UserError(f"held-out data of {self.hook}: {error}") from error
        codes = {
            name: encode(x.to(self.saes[name].W_dec.device))
            for name, encode in self._encoders.items()
        }
        for name, code in codes.items():
            self.activity[name].update(Entries(code))
        return codes


def check_width(name: str, sae_width: int, data_width: int) -> None:
    """Raise UserError unless the SAE takes rows of the data's width."""
    if sae_width != data_width:
        raise UserError(
            f"{name}: this SAE takes activations of width {sae_width}, "
            f"but the data have width {data_width}; evaluate it on the hook it was trained on"
        )


@dataclass
class MemberErrors:
    """Sums of one member: squared error per dimension, and per sequence under each weighting."""

    sse_dim: Float64[Tensor, " d_in"]
    sse: SequenceSums
    l0: SequenceSums = field(default_factory=lambda: SequenceSums(1))


class Errors:
    """Second pass over one hook: squared errors about the exact mean, plain and under every member's weights."""

    def __init__(self, mean: Float64[Tensor, " d_in"], gammas: dict[str, Weights]) -> None:
        self.mean = mean
        self.names = list(gammas)
        """Weightings beside the plain one, in the order of the columns."""
        wide = [gamma.detach().double().cpu() for gamma in gammas.values()]
        squares = [g.square() if g.ndim == 1 else torch.zeros_like(mean) for g in wide]
        self._weights = torch.stack([torch.ones_like(mean), *squares], dim=1)
        self._matrices = {column: g for column, g in enumerate(wide, start=1) if g.ndim == 2}
        """Weightings by a whole matrix, by column; the others share one product."""
        self.var = SequenceSums(len(gammas) + 1)
        self.rows = SequenceSums(1)
        self.members: dict[str, MemberErrors] = {}

    def add_rows(self, x: Float64[Tensor, "rows d_in"], seq: Int64[Tensor, " rows"]) -> None:
        """Add the rows' squared distance from the mean."""
        deviation = x - self.mean
        self.var.add(seq, self._weighted(deviation, deviation.square()))
        self.rows.add(seq, x.new_ones(len(x), 1))

    def add_member(
        self,
        name: str,
        error: Float64[Tensor, "rows d_in"],
        l0: Float64[Tensor, " rows"],
        seq: Int64[Tensor, " rows"],
    ) -> None:
        """Add one member's errors x - x_hat; raises UserError when a reconstruction is not finite."""
        square = error.square()
        if name not in self.members:
            sums = SequenceSums(self._weights.shape[1])
            self.members[name] = MemberErrors(torch.zeros_like(self.mean), sums)
        member = self.members[name]
        member.sse_dim += square.sum(0)
        if not member.sse_dim.isfinite().all():
            raise UserError(f"{name}: its reconstruction of the held-out data has NaN or infinity")
        member.sse.add(seq, self._weighted(error, square))
        member.l0.add(seq, l0[:, None])

    def _weighted(
        self, values: Float64[Tensor, "rows d_in"], square: Float64[Tensor, "rows d_in"]
    ) -> Float64[Tensor, "rows columns"]:
        """Return ||Gamma v||^2 of each row under each weighting."""
        sums = square @ self._weights
        for column, gamma in self._matrices.items():
            sums[:, column] = weigh(values, gamma).square().sum(1)
        return sums

    def arrays(self, name: str) -> dict[str, Tensor]:
        """Return the member's per-sequence sums; `seq_sse@M` and `seq_var@M` are weighted by member M's Gamma."""
        member = self.members[name]
        sse, var = member.sse.sums, self.var.sums
        out = {
            "seq_rows": self.rows.sums[:, 0],
            "seq_l0": member.l0.sums[:, 0],
            "seq_sse": sse[:, 0],
            "seq_var": var[:, 0],
        }
        for column, other in enumerate(self.names, start=1):
            out[f"seq_sse@{other}"] = sse[:, column]
            out[f"seq_var@{other}"] = var[:, column]
        return {key: value.clone() for key, value in out.items()}


def ev_per_dim(
    sse_dim: Float64[Tensor, " d_in"], input_variance: Float64[Tensor, " d_in"], rows: int
) -> Float64[Tensor, " d_in"]:
    """Return 1 - sum_t (x_ti - x_hat_ti)^2 / sum_t (x_ti - mean_i)^2 per dimension; NaN where x_i is constant."""
    ev = 1 - sse_dim / (input_variance * rows)
    return torch.where(input_variance > 0, ev, torch.nan)
