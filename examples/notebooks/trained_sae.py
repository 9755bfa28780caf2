"""The notebook trained_sae.ipynb as it is written; `make notebooks` runs it and keeps the outputs."""

# %% [markdown]
# # An SAE of your own: from the demo's run to a steered model
#
# `wsae demo` trains a weighted SAE (WSAE) beside its plain twin and measures both. This notebook runs it with less text, looks
# through what came out, picks a latent of the weighted member that the plain one does not have, steers with it, and asks
# both members which latents brought about the same prediction.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import wsae
from wsae.acts.language import load_language
from wsae.acts.source import StoreSource
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.serve.index import Asked, Index, find
from wsae.studies.demo import run_demo
from wsae.studies.demo_config import DemoConfig
from wsae.use.attribute import LogitDifference, attribute
from wsae.use.config import SteerConfig
from wsae.use.steer import AskedEdit, Prompt, steer

SMALL = bool(os.environ.get("WSAE_NOTEBOOK_SMALL"))  # the test suite runs it small, on a tiny model
MODEL = os.environ.get("WSAE_NOTEBOOK_MODEL", "builtin")
HOOK = "layers.1" if SMALL else "layers.9"
os.chdir(tempfile.mkdtemp(prefix="wsae-notebook-"))

# %% [markdown]
# ## 1. The demo, made small
#
# In a shell: `wsae demo --tokens 24000 --heldout-tokens 12000 --alpha 0.5 --expansion 4 --out demo`. With its defaults it
# takes some minutes and 300,000 tokens; a run this short shows how the parts work, not how good SAEs are.

# %%
demo = DemoConfig(
    model=MODEL,
    hook=HOOK,
    tokens=1_200 if SMALL else 24_000,
    heldout_tokens=1_300 if SMALL else 12_000,
    passes=4,
    expansion=4,
    k=8 if SMALL else 32,
    alpha=(0.5,),
    splice_tokens=0,
    n_latents=20,
)
result = run_demo(demo, Path("demo"))
for name, member in result["hooks"][HOOK]["members"].items():
    fvu = member["metrics"]["fvu"]
    print(f"{name:<15} plain FVU {fvu['value']:.3f} [{fvu['low']:.3f}, {fvu['high']:.3f}]")

# %% [markdown]
# ## 2. Browse both members
#
# `wsae serve demo/run` shows every latent of every member. Each latent of the weighted member is matched with the plain
# twin's latent that points most nearly the same way: where even that one points elsewhere, the weights found something new,
# or something that training this short had not settled.

# %%
run = wsae.Run("demo/run")
source = StoreSource(Path("demo/store"))
path, _ = ensure_index(run.path, None, IndexConfig(logits=20), lambda _: source)
index = Index(path)
plain, weighted = (next(m for m in index.members if m.plain is kind) for kind in (True, False))
for member in (plain, weighted):
    print(f"{member.name:<15} {member.alive:,} of {member.size:,} latents fire on held-out text")
keys = [weighted.key(i) for i in range(weighted.size)]
cosines = np.array([n["match"] or 0.0 for n in map(index.numbers(keys).get, keys)])

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.hist(cosines, bins=40)
ax.set_xlabel(f"cosine with the plain twin's nearest latent ({weighted.name})")
ax.set_ylabel("latents")
plt.show()


def passage(context, width=8):
    """Return a context on one line, its strongest token in brackets."""
    tokens, at = list(context["tokens"]), context["peak"]
    tokens[at] = f"[{tokens[at].strip()}]"
    return " ".join("".join(tokens[max(0, at - width) : at + 4]).split())


def show(key, n=3):
    """Print a latent's numbers and contexts."""
    member, number = index.owner(key)
    numbers = index.numbers([key])[key]
    print(
        f"{member.name}, latent {number}: on {numbers['density']:.2%} of tokens, match {numbers['match'] or 0:.2f}"
    )
    for context in index.record(key).get("contexts", [])[:n]:
        print("   ", passage(context))


# %% [markdown]
# ## 3. Find a latent that the plain twin does not have
#
# Among the weighted member's latents that fire on 0.1 % to 5 % of the tokens and match the plain twin by less than 0.5,
# the one with the strongest activation. Beside it, the plain latent it is matched with.

# %%
low, high, below = (0.0, 1.0, 1.1) if SMALL else (0.001, 0.05, 0.5)
new = find(
    index,
    weighted,
    Asked(sort="max", down=True, low={"density": low}, high={"density": high, "match": below}),
)
print(f"{new.total} latents fit")
key = next(k for k in new.keys if index.record(k).get("contexts"))
latent = index.owner(key)[1]
show(key)
_, twin = index.state(key)
if twin is not None:
    show(twin)

# %% [markdown]
# ## 4. Steer with it
#
# Set to twice its largest activation, at every token and every token that is written.

# %%
language = load_language(MODEL)
saes = run.saes[HOOK]
largest = index.numbers([key])[key]["max"]
steered = steer(
    language,
    {HOOK: saes[weighted.name]},
    "the cat sat" if SMALL else "The first thing to know is",
    [AskedEdit("set", latent, 1.0, of_peak=True)],
    (1.0, 2.0, 4.0),
    {str(latent): largest},
    SteerConfig(new_tokens=5 if SMALL else 24),
)
for one in steered.continuations:
    name = "as it is" if one.strength is None else f"{one.strength:g} x largest"
    print(f"{name:<12}{one.cross_entropy:6.2f} nats  {' '.join(one.text.split())}")

# %% [markdown]
# ## 5. The same question to both members
#
# Why does the model go on as it does, and not with its second choice? The difference of the two logits is split into
# effects of latents, once with each member's SAE at the hook; what an SAE leaves unexplained has an effect too. Effects
# are by the gradient, near to what taking one latent away does ("true"). Together they need not come to what taking all
# away does, which stands last: so far away the model is not linear.

# %%
text = "the cat sat on a mat and the" if SMALL else "The President of the United States of"
prompt = Prompt.of(language, text)
first, second = language.model(input_ids=prompt.ids).logits[0, -1].topk(2).indices.tolist()
decode = language.tokenizer.decode
print(f"{text!r} goes on with {decode([first])!r}, not {decode([second])!r}")
for member in (plain, weighted):
    found = attribute(
        language.model,
        {HOOK: saes[member.name]},
        prompt.ids[0],
        LogitDifference(first, second),
        verify=5,
    )
    at = found.hooks[HOOK]
    print(f"\n{member.name}: difference {found.value:.2f}; latents {at.total - sum(at.errors):+.2f}, errors "
          f"{sum(at.errors):+.2f}; together {at.total:.2f} of {at.change:.2f}")  # fmt: skip
    for one in found.verified:
        effect = one.predicted
        label = index.lines([member.key(effect.latent)])[member.key(effect.latent)][1] or "-"
        token = repr(decode([found.ids[effect.position]]))
        print(
            f"  {token:<12} latent {effect.latent:>5} {effect.effect:+.3f}, true {one.true:+.3f}: {label[:60]}"
        )

# %% [markdown]
# ## What to take from this
#
# - A run of your own and somebody else's SAE are used in the same way: an index to look through, an edit, a question.
# - A latent without a twin is a candidate, not a finding: another seed of the plain SAE would miss some latents too.
# - What the SAE leaves unexplained is part of every answer; a run this short leaves much.
#
# Next: `wsae demo` at full length, [steering and attribution](../../docs/use.md), and
# [the same with a published SAE](published_sae.ipynb).
