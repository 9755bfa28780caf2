"""Fixtures written by dictionary_learning itself, with the latents and reconstructions its own classes give.

    pip install dictionary-learning==0.1.0      (in an environment of its own)
    python benchmarks/interop_fixtures/make_dictionary_learning.py

Files are laid out as its `trainSAE` does: ae.pt is the state dict, config.json holds trainer and buffer.
"""

import json

import torch
from common import D_IN, D_SAE, K, folder, record, shake
from dictionary_learning.dictionary import (
    AutoEncoder,
    AutoEncoderNew,
    GatedAutoEncoder,
    JumpReluAutoEncoder,
)
from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
from dictionary_learning.trainers.top_k import AutoEncoderTopK
from dictionary_learning.utils import load_dictionary
from torch import nn


def make(name: str, module: nn.Module, seed: int, size: float = 0.3, k: int | None = None) -> None:
    shake(module, seed, size)
    if isinstance(module, JumpReluAutoEncoder):
        module.threshold.data = torch.rand(D_SAE) * 1.5
    trainer = {"dict_class": type(module).__name__, "activation_dim": D_IN, "dict_size": D_SAE}
    trainer |= {
        "trainer_class": "Trainer",
        "layer": 3,
        "lm_name": "tiny",
        "submodule_name": "resid",
    }
    trainer |= {} if k is None else {"k": k}
    torch.save(module.state_dict(), folder(name) / "ae.pt")
    text = json.dumps({"trainer": trainer, "buffer": {"ctx_len": 64}}, indent=1)
    (folder(name) / "config.json").write_text(text + "\n")
    loaded, _ = load_dictionary(str(folder(name)), "cpu")
    record(name, loaded.encode, loaded.decode)


def main() -> None:
    torch.manual_seed(0)
    make("dl-topk", AutoEncoderTopK(D_IN, D_SAE, K), 1, k=K)
    with_threshold = AutoEncoderTopK(D_IN, D_SAE, K)
    with_threshold.threshold.fill_(1.25)
    make("dl-topk-threshold", with_threshold, 2, k=K)
    batch = BatchTopKSAE(D_IN, D_SAE, K)
    batch.threshold.fill_(1.5)
    make("dl-batchtopk", batch, 3, k=K)
    make("dl-batchtopk-no-threshold", BatchTopKSAE(D_IN, D_SAE, K), 4, k=K)
    make("dl-relu", AutoEncoder(D_IN, D_SAE), 5)
    unit = AutoEncoder(D_IN, D_SAE)
    shake(unit, 6)
    unit.decoder.weight.data /= unit.decoder.weight.data.norm(dim=0)
    make("dl-relu-unit", unit, 6, size=0.0)
    make("dl-relu-new", AutoEncoderNew(D_IN, D_SAE), 7)
    make("dl-jumprelu", JumpReluAutoEncoder(D_IN, D_SAE), 8)
    make("dl-gated", GatedAutoEncoder(D_IN, D_SAE), 9)
    make("dl-matryoshka", MatryoshkaBatchTopKSAE(D_IN, D_SAE, K, [6, 10]), 10, k=K)


if __name__ == "__main__":
    main()
