"""The notebook toy_world.ipynb as it is written; `make notebooks` runs it and keeps the outputs."""

# %% [markdown]
# # A toy world: can a sparse autoencoder find what is there?
#
# A sparse autoencoder (SAE) is trained to *reconstruct* activations. We use it to find *features*. Those are two different things, and on a
# language model nobody can check the second, because nobody knows the features. So we begin in a world that we made ourselves.
#
# You will see
#
# 1. a world in which 64 features share 20 dimensions, and an SAE that finds most of them;
# 2. a reweighted SAE (WSAE) beside its plain twin, in a world where the weights can do nothing and in one where they hurt;
# 3. worlds in which an SAE reconstructs almost perfectly and finds nothing;
# 4. the theory's closed form, and why a perfect reconstruction does not single it out.
#
# Everything runs in about a minute on two cores, and gives the same numbers each time.

# %%
import os

import matplotlib.pyplot as plt
import torch

import wsae
from wsae.theory.geometry import digons, random_unit, simplex
from wsae.theory.losses import closed_form, grid, ground_truth_loss, sae_loss
from wsae.toy.config import FeatureConfig
from wsae.toy.world import World

SMALL = bool(os.environ.get("WSAE_NOTEBOOK_SMALL"))  # the test suite runs it small
ROWS = 2_000 if SMALL else 50_000
TOKENS = 4_096 if SMALL else 400_000
plt.rcParams.update({"figure.dpi": 80, "axes.spines.top": False, "axes.spines.right": False})

# %% [markdown]
# ## 1. A world with known features
#
# A feature is a direction. We draw 64 random directions in 20 dimensions: the columns of a matrix `W_p`. In each sample a feature is off with
# probability 0.95 (the *sparsity*), else uniform between 0 and 1. What a model would show us is the mixture, `x_p = W_p x`. Far more features than dimensions: this is
# *superposition*.

# %%
W_p = random_unit(20, 64, seed=0)  # [d_in, n_features], unit columns
world = World(W_p, FeatureConfig(n_features=64, sparsity=0.95))
x, x_p = world.sample(ROWS, seed=1)  # features [rows, 64], activations [rows, 20]

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.2))
left.bar(range(64), x[3].tolist(), color="tab:blue")
left.set(title="one sample: its features x ...", xlabel="feature")
right.bar(range(20), x_p[3].tolist(), color="tab:grey")
right.set(title="... and what we get to see, x_p", xlabel="dimension")
plt.tight_layout()
plt.show()

# %% [markdown]
# From the grey bars alone, which blue bars were up? One sample does not say. Many samples together can, if features are rare.
#
# ## 2. Plain SAE and WSAE, trained side by side
#
# The two see the same batches and start from the same weights, so a difference between them is due to the loss weights and nothing else. The WSAE weights the
# error of dimension i by `gamma_i = variance_i ^ alpha`. Top-k keeps the `k` largest latents of each sample; here 3 features are active on average, so `k=3`.

# %%
MEMBERS = {
    "plain": wsae.Member(k=3, d_sae=64, lr=3e-3),
    "variance, alpha 1": wsae.Member(gamma="variance", alpha=1.0, k=3, d_sae=64, lr=3e-3),
    "variance, alpha -0.5": wsae.Member(gamma="variance", alpha=-0.5, k=3, d_sae=64, lr=3e-3),
}


def train(world, members=MEMBERS):
    """Train a family on samples of a world; return SAEs by name."""
    _, acts = world.sample(ROWS, seed=1)
    family = wsae.fit_family(acts, list(members.values()), tokens=TOKENS, batch_size=1024)
    return dict(zip(members, family.saes, strict=True))


saes = train(world)
print({name: f"{sae.gamma.min():.3f} to {sae.gamma.max():.3f}" for name, sae in saes.items()})

# %% [markdown]
# The directions are random, so the variances of the 20 dimensions differ a little by accident, and gamma with them.
#
# ### How well were the features recovered?
#
# `wsae.recovery` compares an SAE with the truth, on samples it has never seen. Three numbers, and for each the value that says "nothing":
#
# | score | meaning | nothing |
# |---|---|---|
# | `fvu` | share of the activations' variance that is not reconstructed | 1 |
# | `mcc_direction` | each feature gets its own latent: mean cosine of the pairs' directions | `mcc_direction_chance`, the same for random directions |
# | `mcc_code` | the same pairs: mean correlation of feature and latent over samples | about 0.3 here |


# %%
def score(world, saes):
    """Print the scores of SAEs on fresh samples; return the full results by name."""
    x, acts = world.sample(8192 if not SMALL else 512, seed=2)
    print(f"{'':<22}{'fvu':>8}{'direction':>11}{'(chance)':>10}{'code':>8}")
    found = {}
    for name, sae in saes.items():
        found[name] = wsae.recovery(sae, x, acts, world.W_p)
        s = found[name].scores
        print(
            f"{name:<22}{s['fvu']:>8.3f}{s['mcc_direction']:>11.3f}"
            f"{s['mcc_direction_chance']:>10.3f}{s['mcc_code']:>8.3f}"
        )
    return found


found = score(world, saes)

# %% [markdown]
# Most features were found: directions match far better than chance. And the three SAEs are much alike, as they must be when gamma is nearly flat.
#
# A picture of the same thing: the cosine of every feature with every latent, latents ordered so that each feature's own one is on the diagonal.

# %%
order = found["plain"].assignment["direction"]
cosine = saes["plain"].W_dec.detach()[order] @ world.W_p / world.W_p.norm(dim=0)
plt.figure(figsize=(4.2, 3.6))
plt.imshow(cosine.abs().numpy(), cmap="Blues", vmin=0, vmax=1)
plt.colorbar(label="|cosine|")
plt.xlabel("feature")
plt.ylabel("its latent")
plt.show()

# %% [markdown]
# ## 3. A world in which the weights matter
#
# Activations of real models are uneven: some dimensions are ten times as large as others. Let us scale the 20 dimensions from 0.3 to 3. Nothing
# else changes; the same 64 features are there to be found.

# %%
scales = torch.logspace(-0.5, 0.5, 20)[torch.randperm(20, generator=torch.manual_seed(0))]
uneven = World(scales[:, None] * W_p, FeatureConfig(n_features=64, sparsity=0.95))
uneven_saes = train(uneven)
print(
    {name: f"{s.gamma.min():.3f} to {s.gamma.max():.3f}" for name, s in uneven_saes.items()}, "\n"
)
_ = score(uneven, uneven_saes)

# %% [markdown]
# Here the weights do something. Weighting large dimensions up (the paper's rule, alpha 1) makes the SAE care for a few dimensions only, and it recovers fewer
# features. Evening the dimensions out (alpha -0.5) is no gain here either. Which way it goes depends on the kind of SAE; ten worlds, five kinds and five rules are compared in
# [the reproduction](../../docs/reproduction.md#which-saes-recover-features-and-do-weights-help). The lesson is not a rule but a habit: **train the plain twin, and look**.
#
# ## 4. Fidelity is not recovery
#
# Now the same experiment at other sparsities. `k` follows the mean number of active features, as a kind oracle would choose it.

# %%
LEVELS = (0.98, 0.7) if SMALL else (0.98, 0.95, 0.9, 0.7)
fvu, direction, chance = [], [], []
for sparsity in LEVELS:
    level = World(W_p, FeatureConfig(n_features=64, sparsity=sparsity))
    k = max(1, round(64 * (1 - sparsity)))
    (sae,) = train(level, {"plain": wsae.Member(k=k, d_sae=64, lr=3e-3)}).values()
    x, acts = level.sample(512 if SMALL else 8192, seed=2)
    scores = wsae.recovery(sae, x, acts, level.W_p).scores
    fvu.append(scores["fvu"])
    direction.append(scores["mcc_direction"])
    chance.append(scores["mcc_direction_chance"])

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
active = [64 * (1 - s) for s in LEVELS]
left.plot(active, fvu, "o-", color="tab:grey")
left.set(title="unexplained variance (fvu)", xlabel="features active per sample", ylim=0)
right.plot(active, direction, "o-", label="trained SAE")
right.plot(active, chance, "k--", label="random directions")
right.set(
    title="are the directions the true ones?", xlabel="features active per sample", ylim=(0, 1)
)
right.legend()
plt.tight_layout()
plt.show()
print("fvu      ", [round(v, 3) for v in fvu])
print("direction", [round(v, 3) for v in direction])

# %% [markdown]
# Read the two panels together. As more features are active at once, the reconstruction gets *better*, since more latents may speak, and the directions fall to
# those of chance. **An SAE with almost no error may have found nothing.** On real activations you see only the left panel.
#
# ## 5. What theory says
#
# The paper's theory studies a tied SAE without biases: `W_dec = W_enc^T`. Its closed form is `W_m = W_p^T`: each latent reads its own feature's direction. Is that what training
# finds? Take the simplest superposition, two *digons*: four features in two dimensions, as two opposite pairs. All expectations below are exact sums, not samples.

# %%
W = digons(2)  # columns: e1, -e1, e2, -e2
features, probability = grid(4, sparsity=0.5, levels=4)  # every value of four iid features
loss_at_truth = float(sae_loss(closed_form(W), W, features, probability))
print(f"loss of the closed form: {loss_at_truth:.1e}")

angles = torch.linspace(0, torch.pi / 2, 61, dtype=torch.float64)
reconstruction, truth = [], []
for angle in angles:
    c, s = float(angle.cos()), float(angle.sin())
    turned = closed_form(W) @ torch.tensor([[c, -s], [s, c]], dtype=torch.float64)
    reconstruction.append(float(sae_loss(turned, W, features, probability)))
    truth.append(float(ground_truth_loss(turned, W, features, probability)))

plt.figure(figsize=(5.6, 2.8))
plt.plot(angles.rad2deg().tolist(), reconstruction, label="reconstruction loss")
plt.plot(angles.rad2deg().tolist(), truth, label="distance from the true features")
plt.xlabel("all latents turned by this angle (degrees)")
plt.legend()
plt.show()

# %% [markdown]
# The reconstruction loss is zero at *every* angle; only at 0 and 90 degrees are the latents features. The closed form is a minimiser, one among a continuum, and training has no reason
# to choose it. What brings the features back is a constraint on the code, like the Top-k above.
#
# And where features interfere more, the closed form is not even a minimiser. Three features in two dimensions, at 120 degrees, each 0 or 1 with equal probability:

# %%
triangle = simplex(3)
features, probability = grid(3, sparsity=0.5, levels=1)  # its one level is 1/2 ...
features = 2 * features  # ... and ours is to be 1
for scale in (1.0, 1.2**0.5):
    loss = float(sae_loss(scale * closed_form(triangle), triangle, features, probability))
    print(f"loss of {scale:.3f} x W_p^T: {loss:.6f}")
print(f"(by hand: 3/32 = {3 / 32:.6f}, 3/40 = {3 / 40:.6f})")

# %% [markdown]
# A larger scale undoes part of the *shrinking* that interference causes, so it reconstructs better. `wsae theory` checks all 40 claims of the paper this way and says which hold, which hold under a further
# condition, and which have a counterexample ([theory](../../docs/theory.md)).
#
# ## To take away
#
# - Compare with chance. 0.5 is not half way to 1 when random directions get 0.5.
# - Reconstruction error says how faithful an SAE is, not whether its latents are features.
# - Loss weights can only matter where dimensions differ, and then for better or worse: keep the plain twin.
#
# Next: [a language model](language_model.ipynb), where the truth is not known. Change this world yourself: `FeatureConfig` has unequal frequencies, correlated and hierarchical features; `wsae toy` runs many worlds at once.
