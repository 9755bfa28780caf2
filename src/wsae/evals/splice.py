"""Cross-entropy and KL of every member of a hook, as per-sequence arrays (the measuring is in `downstream`)."""

import torch
from jaxtyping import Float
from torch import Tensor

from wsae.acts.hookpoints import Probed
from wsae.acts.tokens import TokenTable
from wsae.core.progress import Progress, quiet
from wsae.evals.config import EvalConfig
from wsae.evals.data import Language
from wsae.evals.downstream import Replace, TokenSequence, spliced_losses
from wsae.evals.fidelity import Survey
from wsae.evals.measure import Kept
from wsae.sae import SparseAutoencoder


def splice_sequences(tokens: TokenTable, cfg: EvalConfig) -> list[int]:
    """Return the sequences to splice: about splice_tokens tokens, evenly spread over the held-out data."""
    n_seq, seq_len = tokens.ids.shape
    wanted = min(n_seq, -(-cfg.splice_tokens // seq_len))
    return [i * n_seq // wanted for i in range(wanted)]


def splice_arrays(
    language: Language,
    probed: Probed,
    saes: dict[str, SparseAutoencoder],
    survey: Survey,
    data: tuple[TokenTable, Kept],
    cfg: EvalConfig,
    progress: Progress = quiet,
) -> dict[str, dict[str, Tensor]]:
    """Return, for each member, sums over the scored tokens of each spliced sequence (nats) and their number.

    Beside the members, kept positions are set to zero and to the held-out mean: the two ablations. Of a model that sees
    later tokens there is no cross-entropy of the next token, which it reads; only KL.
    """
    mean = survey.moments.mean.float()
    variants: dict[str, Replace] = {"zero": torch.zeros_like, "mean": _constant(mean)}
    variants |= {f"sae {name}": _reconstruction(sae) for name, sae in saes.items()}
    sequences = token_sequences(data[0], data[1], language.tokenizer.all_special_ids)
    losses = spliced_losses(
        language.model, probed.hooks[0], sequences, variants, cfg.splice_logits, progress
    )
    common = {"splice_seq": losses.seq, "splice_targets": losses.targets}
    kl = {name: {**common, "splice_kl": losses.kl[f"sae {name}"]} for name in saes}
    if probed.causal is False:
        return kl
    clean = {
        "splice_ce_clean": losses.ce_clean,
        "splice_ce_zero": losses.ce["zero"],
        "splice_ce_mean": losses.ce["mean"],
    }
    return {name: {**kl[name], **clean, "splice_ce": losses.ce[f"sae {name}"]} for name in saes}


def token_sequences(tokens: TokenTable, kept: Kept, special: list[int]) -> list[TokenSequence]:
    """Return the chosen sequences without padding; special tokens are not scored as targets."""
    out = []
    for seq in kept.sequences:
        ids = tokens.ids[seq, : int(tokens.lengths[seq])].long()
        target = ~torch.isin(ids, torch.tensor(special, dtype=torch.int64))
        out.append(TokenSequence(seq, ids, kept.mask(seq, len(ids)), target))
    return out


def _constant(mean: Float[Tensor, " d_in"]) -> Replace:
    return lambda x: mean.to(x.device).expand_as(x)


def _reconstruction(sae: SparseAutoencoder) -> Replace:
    return lambda x: sae(x.to(sae.W_dec.device)).to(x.device)
