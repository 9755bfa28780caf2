"""How each peer is driven: the calls of its own trainer on one batch. Needs torch and the peer; loaded by path.

Warm-up and decay of the learning rate are off everywhere (a warm-up of 1000 steps would leave a short run at rate 0);
all else is the library's default. wsae is not imported: the peers live in an environment of their own.
"""

import contextlib
import importlib
import itertools
import sys
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

MODULES = {
    "eai-sparsify": ("sparsify.config", "sparsify.sparse_coder", "sparsify.sign_sgd"),
    "dictionary-learning": ("dictionary_learning.trainers",),
    "sae-lens": ("sae_lens.config", "sae_lens.training.sae_trainer"),
    "overcomplete": ("overcomplete.sae", "overcomplete.sae.train"),
}


def load(job: Any) -> list[ModuleType]:
    """Import the job's library."""
    if job.library == "overcomplete":
        _without_vision()
    if job.settings.get("optimizer") == "signum":
        importlib.import_module("schedulefree")
    names = list(MODULES[job.library])
    if job.library == "sae-lens":
        names.append(f"sae_lens.saes.{job.settings.get('sae', 'topk')}_sae")
    if job.settings.get("trainer") == "matryoshka":  # not among the names of its package
        names = ["dictionary_learning.trainers.matryoshka_batch_top_k"]
    return [importlib.import_module(name) for name in names]


def make(job: Any, modules: list[ModuleType], _x: Tensor) -> Any:
    """Return the subject: `lr`, `step(i, x)` and `reconstruct(x) -> (x_hat, latents that fired)`."""
    kinds = {
        "eai-sparsify": Sparsify,
        "dictionary-learning": DictionaryLearning,
        "sae-lens": SAELens,
        "overcomplete": Overcomplete,
    }
    return kinds[job.library](job, *modules)


def device(job: Any) -> str:
    """Return where a job trains: `wsae bench` measures CPUs, `benchmarks/gpu.py` says another device."""
    return getattr(job, "device", "cpu")


def autocast(job: Any) -> Any:
    """Return bf16 autocast for a bf16 job, else nothing."""
    if job.dtype == "bfloat16":
        return torch.autocast(device(job), dtype=torch.bfloat16)
    return contextlib.nullcontext()


class Sparsify:
    """SparseCoder under SignSGD with ScheduleFree (its default) or Adam, as its Trainer's hook and loop call them.

    The bf16 autocast that its forward carries is for CUDA alone; here the same is switched on for the CPU.
    """

    def __init__(self, job: Any, config: Any, coder: Any, sign: Any) -> None:
        torch.set_float32_matmul_precision("high")  # as Trainer.fit does
        self.job = job
        torch.manual_seed(job.seed)
        activation = job.settings.get("activation", "topk")
        multi = job.settings.get("multi_topk", False)
        cfg = config.SparseCoderConfig(
            activation=activation, num_latents=job.d_sae, k=job.k, multi_topk=multi
        )
        self.sae = coder.SparseCoder(job.d_in, cfg, device(job), dtype=torch.float32)
        adam = job.settings["optimizer"] == "adam"
        self.lr = job.lr or (2e-4 if adam else 5e-3) / (job.d_sae / 2**14) ** 0.5
        self.optimizer: Any
        if adam:
            self.optimizer = torch.optim.Adam(self.sae.parameters(), lr=self.lr)
        else:
            wrapper = importlib.import_module("schedulefree").ScheduleFreeWrapper
            self.optimizer = wrapper(sign.SignSGD(self.sae.parameters(), self.lr), momentum=0.95)
            self.optimizer.train()
        self.since_fired = torch.zeros(job.d_sae, dtype=torch.long, device=device(job))
        self.fired = torch.zeros(job.d_sae, dtype=torch.bool, device=device(job))

    def step(self, i: int, x: Tensor) -> None:
        """Trainer's hook, then its optimiser step and its count of dead latents."""
        sae = self.sae
        if i == 0:
            sae.b_dec.data = x.mean(0)
        sae.set_decoder_norm_to_unit_norm()
        variance = (x - x.mean(0)).pow(2).sum()
        with autocast(self.job):
            out = sae(x=x, y=x, dead_mask=None, total_variance=variance)
        self.fired[out.latent_indices.flatten()] = True
        float(out.fvu.detach())
        (out.fvu + 0.0 * out.auxk_loss + out.multi_topk_fvu / 8).backward()
        sae.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since_fired += len(x)
        self.since_fired[self.fired] = 0
        self.fired.zero_()

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        """The forward pass at the weights its checkpoint would hold."""
        if hasattr(self.optimizer, "eval"):
            self.optimizer.eval()
        code = self.sae.encode(x)  # of its own k, also where a wider one is trained
        return self.sae(x).sae_out, int((code.top_acts > 0).sum())


FRACTIONS = (1 / 32, 2 / 32, 4 / 32, 8 / 32, 17 / 32)
"""Shares of the latents that each level of a Matryoshka SAE adds."""


class DictionaryLearning:
    """A trainer's `update`, in autocast as `trainSAE` does on CUDA; warm-up of the penalty is off too."""

    CLASSES = {
        "top_k": "TopKTrainer",
        "batch_top_k": "BatchTopKTrainer",
        "matryoshka": "MatryoshkaBatchTopKTrainer",
        "standard": "StandardTrainer",
        "gated": "GatedSAETrainer",
        "jumprelu": "JumpReluTrainer",
    }

    def __init__(self, job: Any, trainers: Any) -> None:
        which = job.settings["trainer"]
        self.job, self.by_k = job, which in ("top_k", "batch_top_k", "matryoshka")
        own: dict[str, Any] = {"k": job.k, "lr": job.lr} if self.by_k else {}
        if not self.by_k:
            own = {"sparsity_warmup_steps": None, **({"lr": job.lr} if job.lr else {})}
        if which == "matryoshka":
            own["group_fractions"] = list(FRACTIONS)
        self.trainer = getattr(trainers, self.CLASSES[which])(
            steps=job.steps,
            activation_dim=job.d_in,
            dict_size=job.d_sae,
            layer=0,
            lm_name="bench",
            warmup_steps=0,
            seed=job.seed,
            device="cpu",
            **own,
        )
        self.lr = self.trainer.lr

    def step(self, i: int, x: Tensor) -> None:
        """One update."""
        with autocast(self.job):
            self.trainer.update(i, x)

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        """Its forward pass, batch Top-k over the batch: its threshold is not learned before step 1000."""
        ae = self.trainer.ae
        z = ae.encode(x, use_threshold=False) if self.by_k else ae.encode(x)
        return ae.decode(z), int((z > 0).sum())


class SAELens:
    """`SAETrainer.step` on a training SAE; bf16 is its own `autocast=True`.

    With sparse activations the rescaling by decoder norms is off: its backward fails on a CPU.
    """

    CLASSES = {
        "topk": "TopKTrainingSAE",
        "batchtopk": "BatchTopKTrainingSAE",
        "matryoshka_batchtopk": "MatryoshkaBatchTopKTrainingSAE",
        "standard": "StandardTrainingSAE",
        "gated": "GatedTrainingSAE",
        "jumprelu": "JumpReLUTrainingSAE",
    }

    def __init__(self, job: Any, config: Any, training: Any, saes: Any) -> None:
        which = job.settings.get("sae", "topk")
        own: dict[str, Any] = {"k": job.k} if which.endswith("topk") else {}
        if job.settings.get("sparse"):
            own |= {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False}
        if which == "matryoshka_batchtopk":
            ends = itertools.accumulate(FRACTIONS)
            own["matryoshka_widths"] = [round(job.d_sae * end) for end in ends]
        name = self.CLASSES[which]
        torch.manual_seed(job.seed)
        self.sae = getattr(saes, name)(
            getattr(saes, f"{name}Config")(d_in=job.d_in, d_sae=job.d_sae, **own)
        )
        rate = {"lr": job.lr} if job.lr else {}
        run = config.SAETrainerConfig(
            total_training_samples=job.batch * job.steps,
            train_batch_size_samples=job.batch,
            autocast=job.dtype == "bfloat16",
            device="cpu",
            **rate,
        )
        run.lr_end = run.lr / 10  # its runner sets this; the constant schedule never reads it
        self.lr = run.lr
        self.trainer = training.SAETrainer(cfg=run, sae=self.sae, data_provider=iter(()))

    def step(self, i: int, x: Tensor) -> None:
        """What `fit` does with a batch."""
        self.trainer.maybe_reset_sparsity()
        self.trainer.step(x)
        self.trainer.n_training_steps = i + 1

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        """Its forward pass."""
        z = self.sae.encode(x)
        x_hat = self.sae.decode(z)
        return x_hat, int(((z.to_dense() if z.is_sparse else z) > 0).sum())


class Overcomplete:
    """`train_sae`, one batch a call, with the Adam and the squared error of its README; bf16 is `train_sae_amp`."""

    def __init__(self, job: Any, sae: Any, training: Any) -> None:
        torch.manual_seed(job.seed)
        self.model = sae.TopKSAE(job.d_in, nb_concepts=job.d_sae, top_k=job.k, device="cpu")
        self.lr = job.lr or 5e-4
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=self.lr)
        low = job.dtype == "bfloat16"
        self.train = training.train_sae_amp if low else training.train_sae

    def step(self, _step: int, x: Tensor) -> None:
        """One epoch of one batch."""
        batches = [(x,)]
        self.train(self.model, batches, _squared_error, self.optimizer, nb_epochs=1, device="cpu")

    def reconstruct(self, x: Tensor) -> tuple[Tensor, int]:
        """Its forward pass with the dictionary it would save."""
        self.model.eval()
        _, z, x_hat = self.model(x)
        return x_hat, int((z > 0).sum())


def _squared_error(x: Tensor, x_hat: Tensor, *_: object) -> Tensor:
    return (x - x_hat).square().mean()


def _without_vision() -> None:
    """Stand in for overcomplete's vision models and plots: they need torchvision and an old matplotlib."""
    for name in ("overcomplete.models", "overcomplete.visualization"):
        sys.modules[name] = _Anything(name)


class _Anything(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return object
