"""The command table and the text of `wsae --help`: plain data, so that help needs no other module."""

import keyword
from typing import NamedTuple


class Command(NamedTuple):
    """One command; its code lives in `wsae.cli.<name>`."""

    name: str
    summary: str
    examples: tuple[str, ...]

    @property
    def module(self) -> str:
        """The module of its code: `wsae.cli.<name>`, with an underscore where the name is a word of Python."""
        return f"wsae.cli.{self.name}{'_' if keyword.iskeyword(self.name) else ''}"


COMMANDS = (
    Command(
        "demo",
        "the main job on built-in data: WSAE beside its plain twin, with a report",
        (
            "wsae demo",
            "wsae demo --vision",
            "wsae demo --model gpt2 --text notes.txt --hook h.6 --out runs/mine",
        ),
    ),
    Command(
        "theory",
        "every claim of the paper's theory, checked numerically, with counterexamples",
        ("wsae theory", 'wsae theory --only "Theorem 3"', "wsae theory --out theory"),
    ),
    Command(
        "toy",
        "toy models and families of SAEs over sparsity levels: do they recover the truth?",
        ("wsae toy", "wsae toy --sparsity 0.9 0.99 --activation relu topk --gamma variance whiten"),
    ),
    Command(
        "reproduce",
        "a figure or table of the paper measured again, its statement beside what was found",
        (
            "wsae reproduce figure3",
            "wsae reproduce figure2 --preset paper --out runs/paper",
            "wsae reproduce table1 --preset tiny",
        ),
    ),
    Command(
        "doctor",
        "before you spend hours: will this model, text and configuration work here?",
        (
            "wsae doctor gpt2 --hook h.6 --text notes.txt --expansion 16 --k 32",
            "wsae doctor acts.npy --d-sae 4096 --k 32",
        ),
    ),
    Command(
        "pretrain",
        "an image encoder by contrastive learning: NCL or SimCLR",
        (
            "wsae pretrain digits --preset tiny --out runs/digits",
            "wsae pretrain fashion_mnist.npz --preset small --method ncl --out runs/ncl",
        ),
    ),
    Command(
        "harvest",
        "activations of one or many hook points in one model pass, to a store",
        (
            'wsae harvest gpt2 --text notes.jsonl --hook "h.*" --tokens 1000000 --out acts',
            "wsae harvest microsoft/resnet-18 --images photos --hook pooler --out acts",
        ),
    ),
    Command(
        "train",
        "a family of SAEs from a store, arrays (.npy, .npz, .safetensors, .pt) or a live model",
        (
            "wsae train acts --out runs/first --expansion 8 --k 32 --gamma variance --alpha 1 0.5",
            "wsae train acts --out runs/grid --activation topk batch_topk --k 16 32 64",
            "wsae train gpt2 --text notes.txt --hook h.6 --out runs/live --gamma variance",
            "wsae train acts --out runs/first --resume",
        ),
    ),
    Command(
        "evaluate",
        "fidelity and monosemanticity of a run's SAEs on held-out tokens, with intervals",
        ("wsae evaluate runs/first",),
    ),
    Command(
        "interpret",
        "are the latents interpretable? scores with and without an LLM, beside their controls",
        (
            "wsae interpret runs/first --controls all",
            "wsae interpret runs/first --score detection --endpoint http://localhost:8000/v1 "
            "--model my-model --dry-run",
            "wsae interpret runs/first --agreement --endpoint local:HuggingFaceTB/SmolLM2-1.7B-Instruct",
        ),
    ),
    Command(
        "probe",
        "do a few latents tell classes apart? token tasks by rule, or text with labels of yours",
        (
            "wsae probe runs/first",
            "wsae probe runs/first --text topics.jsonl --label topic",
            "wsae probe runs/first --text bios.parquet --label profession --spurious gender",
        ),
    ),
    Command(
        "attribute",
        "which latents at which tokens of a prompt move a logit or the loss, with a check",
        (
            'wsae attribute --sae runs/first --member plain --prompt "The capital of France is"',
            'wsae attribute gpt2 --sae shared --prompt "When Mary and John went to the store, John gave milk to" '
            '--metric difference --answer " Mary" --against " John"',
        ),
    ),
    Command(
        "compare",
        "paired comparison of a run's members, or of several runs, with intervals",
        ("wsae compare runs/first", "wsae compare runs/first runs/second --json"),
    ),
    Command(
        "report",
        "one HTML file: results, figures and a browser of latents",
        ("wsae report runs/first --out first.html",),
    ),
    Command(
        "serve",
        "browse every latent of some runs in a browser: search, sort, compare, try a text",
        (
            "wsae serve runs/first",
            "wsae serve runs/first runs/second --port 8200 --open",
            "wsae serve runs/first --contexts 1000 --index-only",
        ),
    ),
    Command(
        "steer",
        "what a model writes while latents of an SAE are set, beside what it writes by itself",
        (
            'wsae steer --sae runs/first --member plain --set 1234=2x --prompt "The weather today"',
            "wsae steer gpt2 --sae downloads/sae --hook h.6 --add 77=5 --sweep 0 0.5 1 2 --prompt Once",
        ),
    ),
    Command(
        "export",
        "SAEs as SAELens, sparsify or dictionary_learning read them",
        (
            "wsae export runs/first --member variance-a1 --format saelens --out shared",
            "wsae export runs/first --all --format dictionary_learning --out shared",
        ),
    ),
    Command(
        "releases",
        "published SAEs by name, as SAELens names them",
        (
            "wsae releases --model gemma-2-2b",
            "wsae releases gemma-scope-2b-pt-res-canonical",
        ),
    ),
    Command(
        "import",
        "an SAE that another tool wrote or that is published, as a directory of ours",
        (
            "wsae import shared --out runs/theirs",
            "wsae import gemma-scope-2b-pt-res-canonical:layer_12/width_16k/canonical --out runs/gemma",
            "wsae import downloads/sae --format sparsify --out runs/theirs",
        ),
    ),
    Command(
        "push",
        "SAEs to the model hub, with a model card",
        (
            "wsae push runs/first somebody/saes --dry-run --out folder",
            "wsae push runs/first somebody/saes --member variance-a1 --private",
        ),
    ),
    Command(
        "publish",
        "an SAE's latents to Neuronpedia, or as SAEDashboard writes them",
        (
            "wsae publish runs/first --member plain --dry-run --out dashboards",
            "wsae publish runs/first --member plain --model-id gpt2-small --set res-mine",
        ),
    ),
    Command(
        "bench",
        "speed against the installed peers and against the machine's measured limit",
        ("wsae bench --quick", "wsae bench --size B --threads 1 2 --out bench"),
    ),
    Command(
        "completion",
        "a script that makes bash, zsh or fish complete the words of wsae",
        ("wsae completion bash", "wsae completion fish --out wsae.fish"),
    ),
)

_ABOUT = """\
Train sparse autoencoders (SAEs) on a model's activations, a reweighted one (WSAE)
beside its plain twin on the same batches, and measure with intervals what the
weights changed."""

_COMMON = """\
Every command takes:
  --help            its own flags, with defaults and examples
  --json            print the result as JSON on stdout, and nothing else there
  --seed N          one seed decides everything random
  --device NAME     cpu, cuda, cuda:1, mps; default: the fastest one here
  --out PATH        where its result goes
  --config FILE     flags from a YAML or JSON file, below those given here and above
                    the defaults; --print-config shows such a file
  --debug           show the traceback of an error

Exit codes: 0 done; 1 a check failed or something broke; 2 bad input, nothing
written; 130 interrupted."""

_FLOW = tuple(command.examples[0] for command in COMMANDS)


def names() -> tuple[str, ...]:
    """Return the commands' names in the order help shows them."""
    return tuple(command.name for command in COMMANDS)


def find(name: str) -> Command | None:
    """Return the command called `name`, or None."""
    return next((command for command in COMMANDS if command.name == name), None)


def help_text() -> str:
    """Return the text of `wsae --help`."""
    rows = "\n".join(f"  {command.name:<11} {command.summary}" for command in COMMANDS)
    flow = "\n".join(f"  {line}" for line in _FLOW)
    return (
        f"usage: wsae COMMAND [FLAGS]\n\n{_ABOUT}\n\nCommands:\n{rows}\n\n{_COMMON}\n\n"
        f"Examples, in the order of the work:\n{flow}\n"
    )
