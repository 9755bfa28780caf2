"""One peer, from token ids to a trained SAE; `benchmarks/end_to_end.py --peers-python` starts it.

    pip install torch==2.13.0 && pip install eai-sparsify==1.3.3 sae-lens==6.54.12   (an environment of its own)
    python benchmarks/end_to_end_peer.py sparsify job.json

Only torch and the peer are imported, nothing of wsae. Each peer runs its own trainer on the model's directory: sparsify
`Trainer.fit`, SAELens `LanguageModelSAETrainingRunner.run`. They get ready token ids (their own tokenising is not
charged) whose first token of each sequence is a special one, so that all drop the same rows. Prints one JSON line.
"""

import argparse
import importlib.metadata
import json
import os
import resource
import sys
import tempfile
import time
from pathlib import Path


def fvu(x, x_hat) -> float:
    """Return sum ||x - x_hat||^2 / sum ||x - mean||^2 over held-out rows [rows, d_in], in float64."""
    x, x_hat = x.double(), x_hat.double()
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


def peak_mebibytes() -> float:
    """Return this process's peak resident memory (getrusage would count the parent's before the start)."""
    status = Path("/proc/self/status")
    if not status.exists():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # macOS counts bytes
    (line,) = (s for s in status.read_text().splitlines() if s.startswith("VmHWM:"))
    return int(line.split()[1]) / 1024


def dataset(job: dict):
    import numpy as np
    from datasets import Dataset

    return Dataset.from_dict({"input_ids": np.load(job["ids"]).tolist()}).with_format("torch")


def sparsify(job: dict, scratch: str):
    """Return (train, reconstruct) of sparsify's Trainer; its `cut` variant gives it the model's first layers only.

    The Trainer always runs the whole model it is given; its own command line loads it without the language head.
    """
    import torch
    from sparsify import SparseCoderConfig, TrainConfig, Trainer
    from transformers import AutoModel

    low = job["dtype"] == "bfloat16"
    cut = {"num_hidden_layers": job["layer"] + 1} if job["side"] == "sparsify-cut" else {}
    dtype = torch.bfloat16 if low else torch.float32
    model = AutoModel.from_pretrained(job["model"], dtype=dtype, **cut).eval()
    cfg = TrainConfig(
        SparseCoderConfig(num_latents=job["d_sae"], k=job["k"]),
        batch_size=job["batch"] // job["seq_len"],
        optimizer="adam",
        lr=job["lr"],
        lr_warmup_steps=0,
        exclude_tokens=job["special"],
        hookpoints=[f"layers.{job['layer']}"],
        log_to_wandb=False,
        save_dir=scratch,
        save_every=10**9,
    )
    trainer = Trainer(cfg, dataset(job), model)

    def train() -> int:
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            trainer.fit()
        return trainer.global_step * cfg.batch_size * (job["seq_len"] - 1)

    return train, lambda x: next(iter(trainer.saes.values()))(x).sae_out


def saelens(job: dict, scratch: str):  # noqa: ARG001
    """Return (train, reconstruct) of SAELens' runner on the Hugging Face model, which it stops after the hook's layer.

    The faster of its two Top-k routes on a CPU is taken: sparse activations in float32 (its decoder-norm rescaling
    fails there, so it is off), autocast in bfloat16.
    """
    import torch
    from sae_lens import (
        LanguageModelSAERunnerConfig,
        LanguageModelSAETrainingRunner,
        LoggingConfig,
        TopKTrainingSAEConfig,
    )

    low = job["dtype"] == "bfloat16"
    sae = TopKTrainingSAEConfig(
        d_in=job["d_in"],
        d_sae=job["d_sae"],
        k=job["k"],
        use_sparse_activations=not low,
        rescale_acts_by_decoder_norm=low,
    )
    cfg = LanguageModelSAERunnerConfig(
        sae=sae,
        model_class_name="AutoModelForCausalLM",
        model_name=job["model"],
        model_from_pretrained_kwargs={"dtype": torch.bfloat16 if low else torch.float32},
        hook_name=f"model.layers.{job['layer']}",
        dataset_path="in memory",
        streaming=False,
        context_size=job["seq_len"],
        store_batch_size_prompts=job["batch"] // job["seq_len"],
        train_batch_size_tokens=job["batch"],
        training_tokens=job["tokens"],
        exclude_special_tokens=job["special"],
        lr=job["lr"],
        autocast=low,
        prepend_bos=False,
        logger=LoggingConfig(log_to_wandb=False),
        checkpoint_path=None,
        output_path=None,
        verbose=False,
    )
    runner = LanguageModelSAETrainingRunner(cfg, override_dataset=dataset(job))

    def train() -> int:
        runner.run()
        return job["tokens"] // job["batch"] * job["batch"]

    return train, lambda x: runner.sae(x)


SIDES = {"sparsify": sparsify, "sparsify-cut": sparsify, "saelens": saelens}


def run(job: dict) -> dict[str, object]:
    """Train, then measure the SAE; the clock starts when the parent started this process."""
    import numpy as np
    import torch

    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        train, reconstruct = SIDES[job["side"]](job, scratch)
        ready = time.time()
        tokens = train()
        done = time.time()
    peak = peak_mebibytes()
    x = torch.from_numpy(np.load(job["heldout"]))
    with torch.no_grad():
        x_hat = torch.cat([reconstruct(part).float() for part in x.split(1024)])
    package = {"saelens": "sae-lens"}.get(job["side"], "eai-sparsify")
    return {
        "startup_s": ready - job["started"],
        "train_s": done - ready,
        "tokens": tokens,
        "peak_mib": peak,
        "fvu": fvu(x, x_hat),
        "version": importlib.metadata.version(package),
        "torch": torch.__version__,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("side", choices=list(SIDES))
    parser.add_argument("job", help="a JSON file that end_to_end.py writes")
    args = parser.parse_args()
    answers = os.fdopen(os.dup(1), "w")  # the libraries print; their words go to stderr
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    job = json.loads(Path(args.job).read_text(encoding="utf-8"))
    print(json.dumps(run(job | {"side": args.side})), file=answers, flush=True)


if __name__ == "__main__":
    main()
