"""The notebook language_model.ipynb as it is written; `make notebooks` runs it and keeps the outputs."""

# %% [markdown]
# # A language model: a weighted SAE beside its plain twin
#
# SmolLM2-135M, a small language model, reads public-domain text. We keep what comes out of its tenth block, train a plain SAE and a
# weighted one (WSAE) on it, measure both on documents that neither saw, and look at what some latents fire on. Model
# and text come with the installation: no network, no GPU.
#
# It is `wsae demo` made small enough to sit through, step by step. Numbers of a run this short (a few tens of thousands of
# tokens; real ones take hundreds of millions) say how the parts work, not how good SAEs are.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import wsae
from wsae.acts.config import HarvestConfig
from wsae.acts.harvest import harvest
from wsae.acts.source import StoreSource
from wsae.core.files import read_json
from wsae.evals.config import EvalConfig
from wsae.evals.run import evaluate_run
from wsae.train.config import TrainConfig
from wsae.train.run import train_run

SMALL = bool(os.environ.get("WSAE_NOTEBOOK_SMALL"))  # the test suite runs it small, on a tiny model
MODEL = os.environ.get("WSAE_NOTEBOOK_MODEL", "builtin")
HOOK = "layers.1" if SMALL else "layers.9"
work = Path(tempfile.mkdtemp(prefix="wsae-notebook-"))

# %% [markdown]
# ## 1. Harvest
#
# One pass of the model over the text, the block's output written to a checksummed store. Held out for evaluation are whole
# *documents*, not tokens. Tokens that would distort every statistic are left out and counted: the first position of a
# sequence, special tokens, and tokens whose norm is far from all others (attention sinks).

# %%
cfg = HarvestConfig(
    model=MODEL,
    hooks=(HOOK,),
    tokens=2_000 if SMALL else 16_000,
    heldout_tokens=500 if SMALL else 4_000,
    seq_len=64 if SMALL else 128,
)
source = StoreSource(harvest(cfg, work / "store").path)
stats = source.stats()[HOOK]
print("training rows:", source.n_rows, "of width", len(stats.kept.variance))

# %% [markdown]
# ## 2. Which dimensions would the weights follow?
#
# The paper sets gamma_i = s_i ^ alpha with s_i the variance of dimension i. Before training on that, look at the variances. In
# the residual stream of a language model they are anything but alike:

# %%
variance = np.sort(stats.kept.variance.numpy())[::-1]
share = {alpha: variance ** (2 * alpha) / (variance ** (2 * alpha)).sum() for alpha in (1.0, 0.5)}
print("largest variances over the median:", np.round(variance[:5] / np.median(variance), 0))
for alpha, s in share.items():
    print(f"alpha {alpha}: three dimensions carry {s[:3].sum():.0%} of the loss's weight,",
          f"it sees {1 / (s**2).sum():.0f} of {len(s)} dimensions")  # fmt: skip

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.loglog(np.arange(1, len(variance) + 1), variance / np.median(variance))
ax.set_xlabel("dimension, by variance")
ax.set_ylabel("variance / median")
ax.set_title("A few outlier dimensions tower over the rest", fontsize=10)
plt.show()

# %% [markdown]
# At alpha = 1 the loss nearly forgets most of the space. Three ways out: a smaller alpha, `robust="winsor"` (clip the proxy at a
# quantile) and `robust="drop"` (leave the outliers out of the loss).
#
# ## 3. Train a family
#
# All members see the same batches from the same start, so what differs between them is what the weights did.

# %%
shape = {"k": 32, "d_sae": 256 if SMALL else 1152, "lr": 3e-3}
members = (
    wsae.Member(**shape),
    wsae.Member(gamma="variance", alpha=1.0, **shape),
    wsae.Member(gamma="variance", alpha=0.5, **shape),
)
train = TrainConfig(members=members, tokens=source.n_rows * 4, batch_size=512, seed=0)
run = train_run(train, source, work / "run").path
print("members:", ", ".join(train.names()))

# %% [markdown]
# ## 4. Measure
#
# On the held-out documents, with 95 % intervals by bootstrap over sequences. Two errors, always both: the *plain* FVU weighs every dimension
# alike, and is the one to compare members by. The *weighted* FVU is what each member was asked to minimise; every member
# looks good under its own. The random SAE is the floor: directions that nobody trained.

# %%
evaluation = EvalConfig(splice_tokens=0, n_latents=20 if SMALL else 200, n_contexts=4, draws=500)
record = evaluate_run(run, source, evaluation)["hooks"][HOOK]
rows = {name: member["metrics"] for name, member in record["members"].items()}
print(f"{'':<16}{'plain FVU':<24}{'weighted FVU':<14}{'dead':>6}{'dense':>8}")
for name, m in rows.items():
    interval = f"{m['fvu']['value']:.3f} [{m['fvu']['low']:.3f}, {m['fvu']['high']:.3f}]"
    weighted = (m.get("fvu_weighted") or {}).get("value")
    rest = [(m.get(key) or {}).get("value") for key in ("dead_frac", "dense_frac")]
    shown = ["-" if v is None else f"{v:.3f}" for v in (weighted, *rest)]
    print(f"{name:<16}{interval:<24}{shown[0]:<14}{shown[1]:>6}{shown[2]:>8}")

# %% [markdown]
# Differences are *paired*: the same sequences are drawn for both members, which removes most of the noise.

# %%
for line in record["comparisons"]:
    if (
        line["metric"] in ("fvu", "dead_frac", "decoder_cosine_max_mean")
        and line["a"] in train.names()
    ):
        bounds = f"[{line['low']:+.4f}, {line['high']:+.4f}]"
        print(
            f"{line['a']:<15} minus {line['b']:<6} {line['metric']:<24} {line['difference']:+.4f} {bounds}"
        )

# %% [markdown]
# ## 5. Look at latents
#
# Numbers do not say what a latent means. Here are latents of the plain SAE with the text they fire on most strongly, the strongest
# token in brackets, chosen by a rule and not by eye: at the quarters of the range of densities.

# %%
contexts = read_json(run / "evaluation" / "contexts.json")[HOOK]


def passage(context):
    """Return a context on one line, its strongest token in brackets."""
    tokens = list(context["tokens"])
    at = context["peak"]
    tokens[at] = f"[{tokens[at].strip()}]"
    return " ".join("".join(tokens[max(0, at - 8) : at + 4]).split())


def show(latents, n=3):
    """Print latents with their strongest contexts."""
    for latent in latents:
        print(f"latent {latent['latent']}, active on {latent['density']:.2%} of tokens")
        for context in latent["contexts"][:n]:
            print("   ", passage(context))


plain = sorted(contexts["plain"], key=lambda latent: latent["density"])
show([plain[len(plain) * quarter // 4] for quarter in (1, 2, 3)])

# %% [markdown]
# Each latent of a weighted member is matched with the latent of the plain twin that points most nearly the same way. High
# cosines mean that the weights left a latent alone; low ones, that it went elsewhere (or that the plain twin, trained for
# so short a time, had not settled either).

# %%
for name in train.names()[1:]:
    matched = [latent["match"]["cosine"] for latent in contexts[name] if latent["match"]]
    print(f"{name}: cosine with the matched plain latent, median {np.median(matched):.2f},",
          f"above 0.9: {np.mean(np.array(matched) > 0.9):.0%}")  # fmt: skip
closest = max(
    contexts["variance-a0.5"], key=lambda latent: (latent["match"] or {"cosine": 0})["cosine"]
)
show([closest])
print("its plain twin:", closest["match"])

# %% [markdown]
# ## What to take from this
#
# - A few outlier dimensions decide what alpha = 1 means on a residual stream: look at the variances first.
# - Read plain and weighted FVU together; a low weighted FVU alone says only that training did what it was told.
# - Whether latents are easier to *interpret* is another question, answered by `wsae interpret` with controls beside every score. Over
#   six blocks of this model and 93 SAEs the answer was no: [what we measured](../../docs/reproduction.md).
#
# Next: `wsae demo` (the same at full length, with a report that opens in a browser), and [how to](../../docs/how-to.md) use your
# own model and text.
