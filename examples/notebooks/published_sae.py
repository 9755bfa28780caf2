"""The notebook published_sae.ipynb as it is written; `make notebooks` runs it and keeps the outputs."""

# %% [markdown]
# # Somebody else's SAE: browse it, steer with it, ask it why
#
# An SAE comes as its authors published it, here as SAELens saves one. We open it, measure it on text of our own, look
# for a latent that means something, let it change what the model writes, and ask which latents brought about a
# prediction. Model and text come with the installation: no network, no GPU.
#
# With a network, `wsae.SAE.from_pretrained("gpt2-small-res-jb", "blocks.8.hook_resid_pre")` fetches a published one by
# the name that SAELens gives it (`wsae releases` lists them), and all below is the same.

# %%
import os
import shutil
import tempfile
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt

import wsae
from wsae.acts.config import HarvestConfig
from wsae.acts.harvest import harvest
from wsae.acts.language import load_language
from wsae.acts.source import StoreSource
from wsae.cli.main import main
from wsae.core.files import read_json
from wsae.interop import Provenance, load, save
from wsae.serve.build import ensure_index
from wsae.serve.config import IndexConfig
from wsae.serve.index import Asked, Index, find
from wsae.train.config import TrainConfig
from wsae.train.run import train_run
from wsae.use.attribute import Logit, attribute
from wsae.use.config import SteerConfig
from wsae.use.steer import AskedEdit, Prompt, steer

SMALL = bool(os.environ.get("WSAE_NOTEBOOK_SMALL"))  # the test suite runs it small, on a tiny model
MODEL = os.environ.get("WSAE_NOTEBOOK_MODEL", "builtin")
HOOK = "layers.1" if SMALL else "layers.9"
os.chdir(tempfile.mkdtemp(prefix="wsae-notebook-"))

# %% [markdown]
# ## 0. A folder as somebody would have published it
#
# There is no network here, so this cell plays the author: it trains a small SAE on block 9 of SmolLM2-135M and saves it
# with SAELens' file names, SAELens' config, and TransformerLens' name of the hook. Nothing else is left in the folder.

# %%
harvested = HarvestConfig(
    model=MODEL,
    hooks=(HOOK,),
    tokens=2_000 if SMALL else 24_000,
    heldout_tokens=500 if SMALL else 12_000,
    seq_len=64 if SMALL else 128,
)
source = StoreSource(harvest(harvested, Path("store")).path)
member = wsae.Member(k=8 if SMALL else 32, d_sae=64 if SMALL else 2304, lr=3e-3)
training = TrainConfig(members=(member,), tokens=source.n_rows * 4, batch_size=512)
author = wsae.Run(train_run(training, source, Path("author")).path)
save(author.saes[HOOK]["plain"], Path("export"), "saelens", Provenance(model=MODEL, hook=HOOK))

downloaded = Path("downloaded")
downloaded.mkdir()
for name in ("cfg.json", "sae_weights.safetensors"):
    shutil.copy(Path("export", name), downloaded)
    print(f"{name:<26}{(downloaded / name).stat().st_size:>12,} bytes")
cfg = read_json(downloaded / "cfg.json")
print({key: cfg[key] for key in ("architecture", "d_in", "d_sae")}, cfg["metadata"]["hook_name"])

# %% [markdown]
# ## 1. Open it, and see whether it is any good here
#
# `load` reads the folder and says what it was; `Run.of_sae` makes it a run of one member, so that all that works on a run
# works on it. In a shell: `wsae import downloaded --out theirs`.

# %%
found = load(downloaded)
run = wsae.Run.of_sae(found.sae, "theirs", found.about)
print(
    f"{found.format}: {found.sae.cfg.d_sae:,} latents on {found.about.hook} of {found.about.model}"
)
assert main(["evaluate", "theirs", "--source", "store", "--splice-tokens", "512"]) == 0

# %% [markdown]
# ## 2. Browse it
#
# `wsae serve theirs` shows every latent in a browser. What it shows lies in an index, which can be asked from Python too:
# lists, searches, and all that is known of a latent.

# %%
path, _ = ensure_index(run.path, None, IndexConfig(logits=20), lambda _: source)
index = Index(path)
(theirs,) = index.members
print(f"{theirs.alive:,} of {theirs.size:,} latents fire on held-out text")


def line(key):
    """Return a latent in one line."""
    density = index.numbers([key])[key]["density"]
    return f"latent {index.owner(key)[1]:>5}, on {density:7.2%} of tokens: {index.lines([key])[key][1] or '-'}"


print("\nthe densest:")
for key in find(index, theirs, Asked(sort="density", down=True)).keys[:5]:
    print("  ", line(key))
word = "the" if SMALL else "war"
matching = find(index, theirs, Asked(query=word, sort="max", down=True))
print(f"\n{matching.total} latents have {word!r} in their contexts, among them:")
for key in matching.keys[:5]:
    print("  ", line(key))

# %% [markdown]
# ## 3. Find a latent worth a second look
#
# By a rule, not by eye: of the latents that fire on at most 1 % of the tokens, the one whose ten strongest contexts peak
# most often on the same word of six letters and more; among equals the one that promotes tokens most.


# %%
def peaks(record):
    """Return the words at the peaks of a latent's strongest contexts, counted."""
    words = (c["tokens"][c["peak"]].strip().lower() for c in record["contexts"][:10])
    return Counter(word for word in words if len(word) >= (1 if SMALL else 6))


candidates = []
for number in range(theirs.size):
    key = theirs.key(number)
    record = index.record(key)
    rare = 0 < index.numbers([key])[key]["density"] <= (1.0 if SMALL else 0.01)
    if rare and len(record.get("contexts", ())) >= (1 if SMALL else 10) and peaks(record):
        (word, count), *_ = peaks(record).most_common(1)
        logits = index.packed(key)[1]
        candidates.append((count, logits[0][1] if logits else 0.0, number, word))
_, _, latent, word = max(candidates)
key = theirs.key(latent)


def passage(context, width=8):
    """Return a context on one line, its strongest token in brackets."""
    tokens, at = list(context["tokens"]), context["peak"]
    tokens[at] = f"[{tokens[at].strip()}]"
    return " ".join("".join(tokens[max(0, at - width) : at + 4]).split())


print(line(key))
for context in index.record(key)["contexts"][:5]:
    print("   ", passage(context))
up = index.packed(key)[1][:8]
texts = index.tokens([token for token, _ in up])
print("promotes", ", ".join(repr(texts[token]) for token, _ in up))

# %% [markdown]
# ## 4. Steer with it
#
# The latent is set to a multiple of its largest activation at every token, also of what is being written; the rest of the
# activation stays as it is. Beside each text: its cross-entropy under the model left alone (how odd it finds this) and
# how many of its words' pairs are different (1: nothing repeated).

# %%
language = load_language(MODEL)
sae = wsae.Run("theirs").saes[run.members and next(iter(run.members))]["sae"]
largest = index.numbers([key])[key]["max"]
strengths = (0.5, 1.0, 2.0, 4.0)
steered = steer(
    language,
    {HOOK: sae},
    "the cat sat" if SMALL else "I went to the market and",
    [AskedEdit("set", latent, 1.0, of_peak=True)],
    strengths,
    {str(latent): largest},
    SteerConfig(new_tokens=5 if SMALL else 24),
)
for one in steered.continuations:
    name = "as it is" if one.strength is None else f"{one.strength:g} x largest"
    print(f"{name:<12}{one.cross_entropy:6.2f} nats  {' '.join(one.text.split())}")

fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
lines = steered.continuations[1:]
ax.plot(strengths, [one.cross_entropy for one in lines], "o-", label="cross-entropy, nats a token")
ax.axhline(steered.continuations[0].cross_entropy, ls=":", color="grey", label="as it is")
ax.set_xscale("log", base=2)
ax.set_xlabel(f"latent {latent}, times its largest activation")
ax.legend()
plt.show()

# %% [markdown]
# ## 5. Ask it why
#
# The model reads the latent's strongest context up to the token it peaks on. Which latents, at which tokens, brought about
# what it says next? What a latent writes times the logit's gradient is its effect, and what the SAE does not explain has
# one alike. Two checks stand beside them. For the largest, what the logit does lose when that latent alone is set to 0 at
# that token: this is what a gradient is near to. And what the logit loses when the SAE's bias takes the place of all rows:
# that far the model is not linear, and the effects do not add up to it (those of `method="integrated"` do).

# %%
context = index.record(key)["contexts"][0]
text = "".join(context["tokens"][: context["peak"] + 1])
prompt = Prompt.of(language, text)
logits = language.model(input_ids=prompt.ids).logits[0, -1]
answer = int(logits.argmax())
result = attribute(language.model, {HOOK: sae}, prompt.ids[0], Logit(answer), verify=12)
decode = language.tokenizer.decode
print(f"...{' '.join(text.split())[-60:]!r} goes on with {decode([answer])!r}")
at = result.hooks[HOOK]
print(f"logit {result.value:.2f}; without the rows {result.value - at.change:.2f}; "
      f"effects of {at.active} latents and the errors add up to {at.total:.2f} of {at.change:.2f}")  # fmt: skip
print(f"\n{'token':<14}{'latent':>7}{'predicted':>11}{'true':>8}")
for one in result.verified:
    effect = one.predicted
    shown = repr(decode([result.ids[effect.position]]))
    print(f"{shown:<14}{effect.latent:>7}{effect.effect:>+11.3f}{one.true:>+8.3f}")
own = [one.effect for one in at.effects if one.latent == latent]
print(
    f"\ncorrelation of predicted and true: {result.correlation or 0.0:.2f}; latent {latent} in all: {sum(own):+.3f}"
)

fig, ax = plt.subplots(figsize=(4, 4), layout="constrained")
ax.scatter([o.predicted.effect for o in result.verified], [o.true for o in result.verified])
ax.axline((0, 0), slope=1, ls=":", color="grey")
ax.set_xlabel("predicted effect on the logit")
ax.set_ylabel("true effect")
plt.show()

# %% [markdown]
# ## What to take from this
#
# - A folder of another tool is opened by `wsae import`, a published SAE by its name; after `wsae evaluate` all else works.
# - A latent's contexts say when it fires, the tokens it promotes what it may do, steering what it does. They need not agree.
# - Believe an attribution as far as its check: the correlation stands beside it, and so does what the SAE does not explain.
#
# Next: [the same with an SAE of your own](trained_sae.ipynb), and [how to use SAEs](../../docs/use.md).
