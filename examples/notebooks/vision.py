"""The notebook vision.ipynb as it is written; `make notebooks` runs it and keeps the outputs."""

# %% [markdown]
# # Images: do latents mean one class?
#
# With text one has to ask somebody (or a language model) what a latent means. With labelled images one can count: of the images on which
# a latent fires, how many are of one class? We pretrain a small encoder on scikit-learn's 1,797 handwritten digits *without* using
# their classes, train SAEs on what it makes of them, and only then bring the classes in, to score.
#
# It is `wsae demo --vision`, shortened. No network, no GPU.

# %%
import base64
import io
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt

from wsae.acts.config import ImageHarvestConfig, ImagesConfig
from wsae.acts.images.harvest import Gallery, harvest_images
from wsae.acts.images.sets import open_images
from wsae.acts.source import StoreSource
from wsae.api import Member
from wsae.core.files import read_json
from wsae.evals.classes import labels_of, score_run
from wsae.evals.config import ClassesConfig, EvalConfig
from wsae.evals.run import evaluate_run
from wsae.train.config import TrainConfig
from wsae.train.run import train_run
from wsae.vision.config import preset
from wsae.vision.pretrain import pretrain

SMALL = bool(os.environ.get("WSAE_NOTEBOOK_SMALL"))  # the test suite runs it small
work = Path(tempfile.mkdtemp(prefix="wsae-notebook-"))
digits = ImagesConfig(path="digits")
images = open_images(digits)

# %% [markdown]
# ## 1. Pretrain an encoder
#
# Non-negative contrastive learning: two random views of an image should get similar codes, views of different images dissimilar ones, and
# the codes are made non-negative, so that some of their dimensions come to mean one thing. The probes below are taken on held-out
# images and compare with the same probe on raw pixels: what did pretraining add?

# %%
cfg = preset("tiny", images=digits, epochs=1 if SMALL else 8, seed=0)
pretrained = pretrain(cfg, images, work / "pretrain")
for name, probe in pretrained.info["probes"].items():
    print(f"{name:<12}{probe['accuracy']:.1%} of {probe['test']} held-out images")

# %% [markdown]
# On digits this small, and after so short a pretraining, raw pixels still do better: the encoder serves as an example, and is no good one to
# use. On Fashion-MNIST the same recipe overtakes the pixels. Do not read much into the first figure: this seed has 84 % with PyTorch on two
# threads and 89 % on one, which adds in another order, and eight seeds on one thread have 81 to 89 %.
#
# ## 2. Harvest, and train a family
#
# A row of the store is an image's embedding. Two weighted members beside the plain SAE: one follows the *semantic consistency* of each
# embedding dimension (Section 5.2.2 of the paper; this one does look at the training images' classes), one its variance.

# %%
harvest = ImageHarvestConfig(
    model=str(pretrained.path), images=digits, heldout_fraction=cfg.heldout_fraction, seed=0
)
source = StoreSource(harvest_images(harvest, work / "store").path)
shape = {"k": 8, "d_sae": 32 if SMALL else 256, "lr": 3e-3}
members = (
    Member(**shape),
    Member(gamma="consistency", alpha=1.0, **shape),
    Member(gamma="variance", alpha=1.0, **shape),
)
passes = 2 if SMALL else 40
train = TrainConfig(members=members, tokens=source.n_rows * passes, batch_size=128, seed=0)
run = train_run(train, source, work / "run").path
print(source.n_rows, "training images;", "members:", ", ".join(train.names()))

# %% [markdown]
# ## 3. Score latents against classes
#
# How often is the most frequent class right among the images a latent fires on? The raw share flatters: a latent that fires on a single
# image has 100 %. `consistency_corrected` needs enough images per latent and measures from chance (classes shuffled) to 1, so a latent that
# knows nothing has 0, however rare or dense. The controls say what needs no training at all.

# %%
evaluation = EvalConfig(splice_tokens=0, n_latents=60, n_contexts=8, draws=200)
record = evaluate_run(run, source, evaluation, Gallery(images))
labels = labels_of(source)
scored = score_run(
    run, source, labels, ClassesConfig(n_top=10, min_support=10, groups=10, draws=200)
)
(hook,) = scored["hooks"]
scored = scored["hooks"][hook]

print(
    f"{'':<22}{'FVU':>7}   {'above chance, 95 % over latents':<34}{'as NCL counts':<15}latents alive"
)
for name, found in {**scored["members"], **scored["controls"]}.items():
    c, raw = found["scores"]["consistency_corrected"], found["scores"]["consistency_ncl"]["value"]
    fvu = record["hooks"][hook]["members"].get(name, {}).get("metrics", {}).get("fvu")
    shown = f"{c['value']:.3f} [{c['low']:.3f}, {c['high']:.3f}]" if c["value"] is not None else "-"
    error = f"{fvu['value']:.3f}" if fvu else ""
    print(f"{name:<22}{error:>7}   {shown:<34}{raw:<15.3f}{found['coverage']['alive']:.0%}")

# %% [markdown]
# Read the table from below. `shuffled`, the plain SAE scored against permuted classes, must be 0 above chance, and is, while the raw share
# gives it more than two fifths: that is how much of a raw share is no merit at all. Then the random SAE: directions nobody trained, with as
# few latents active, and not behind any trained SAE. The embedding itself already gathers each class in one place, so *any* sparse direction in it is
# fairly consistent; an SAE has learned something only by what it has beyond that. Whoever reports the trained SAE alone
# reports mostly the encoder.
#
# Do the weights help? The difference to the plain twin, with its interval:

# %%
for line in scored["comparisons"]:
    if (
        line["metric"] == "consistency_corrected"
        and line["b"] == "plain"
        and line["a"] in train.names()
    ):
        bounds = f"[{line['low']:+.3f}, {line['high']:+.3f}]"
        print(f"{line['a']:<15} minus plain, {line['over']:<10} {line['difference']:+.3f} {bounds}")

# %% [markdown]
# `over` says what is compared: all latents, pairs matched by direction, latents of equal density, and so on
# ([metrics](../../docs/metrics.md#latents-against-classes)). Where the interval holds 0 this run cannot tell. And do not pick the winner
# from a dozen intervals at 95 %: one or so misses 0 by luck alone. With 359 held-out images and one seed no more can be said; the full
# experiment, on Fashion-MNIST with several seeds, found that weighting by consistency helps where single dimensions mean
# something (the non-negative projections) and does nothing on the embeddings used here:
# [what we measured](../../docs/reproduction.md).
#
# ## 4. Look at latents
#
# A contact sheet: a row per latent of the plain SAE, its eight strongest held-out images from left to right. Latents are taken in equal
# steps from the rarest to the densest, so that it shows the poor ones too.

# %%
contexts = read_json(run / "evaluation" / "contexts.json")[hook]["plain"]
pictures = read_json(run / "evaluation" / "thumbnails.json")
full = sorted((c for c in contexts if len(c["contexts"]) >= 8), key=lambda c: c["density"])
rows = [full[i * (len(full) - 1) // 7] for i in range(8)] if full else []
if rows:
    fig, axes = plt.subplots(len(rows), 8, figsize=(5.2, 5.6), layout="constrained")
    for latent, line in zip(rows, axes, strict=True):
        for context, ax in zip(latent["contexts"], line, strict=False):
            pixels = plt.imread(io.BytesIO(base64.b64decode(pictures[str(context["seq"])])))
            ax.imshow(pixels, cmap="gray_r" if pixels.ndim == 2 else None)
            ax.set_xticks([])
            ax.set_yticks([])
        label = f"latent {latent['latent']}\n{latent['density']:.0%}"
        line[0].set_ylabel(label, rotation=0, ha="right", va="center", fontsize=8)
    plt.show()

# %% [markdown]
# ## What to take from this
#
# - Score against classes only above chance, and beside a random SAE: raw consistency rewards rare latents and good encoders.
# - The same three lines (harvest, train, score) serve your own backbone: `wsae harvest MODEL --images FOLDER --hook pooler`, see
#   [images](../../docs/how-to.md#images).
# - `wsae demo --vision` does it at full length and writes a report in which every latent has its images.
