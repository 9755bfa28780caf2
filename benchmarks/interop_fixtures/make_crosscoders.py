"""Fixtures written by the fork of dictionary_learning that has crosscoders, with what its own classes give.

    pip install git+https://github.com/jkminder/dictionary_learning      (in an environment of its own)
    python benchmarks/interop_fixtures/make_crosscoders.py

Files are those of `save_pretrained`, without its README.md. An SAE's inputs are two sources of half the width.
"""

import torch
from common import D_IN, D_SAE, OUT, K, folder, record, shake
from dictionary_learning.dictionary import BatchTopKCrossCoder, CrossCoder
from torch import Tensor

SHAPE = (D_IN // 2, D_SAE, 2)


def make(name: str, kind: type[CrossCoder], seed: int, **options: object) -> None:
    coder = kind(*SHAPE, target_rms=3.0, **options)
    shake(coder, seed)
    if isinstance(coder, BatchTopKCrossCoder):
        coder.threshold.fill_(0.8)
    coder.save_pretrained(folder(name))
    (OUT / name / "README.md").unlink(missing_ok=True)
    loaded = kind.from_pretrained(str(OUT / name), from_hub=True)

    def encode(x: Tensor) -> Tensor:
        return loaded.get_activations(x.view(-1, 2, D_IN // 2))

    record(name, encode, lambda z: loaded.decode(z / loaded.get_code_normalization()).flatten(1))


def main() -> None:
    torch.manual_seed(0)
    make("crosscoder-relu", CrossCoder, 1)
    moments = {"activation_mean": torch.randn(2, 3), "activation_std": torch.rand(2, 3) + 0.5}
    make("crosscoder-batchtopk", BatchTopKCrossCoder, 2, k=K)
    make("crosscoder-normalised", BatchTopKCrossCoder, 3, k=K, code_normalization="SAE", **moments)
    make("crosscoder-mixed", BatchTopKCrossCoder, 4, k=K, code_normalization="MIXED")
    make("crosscoder-decoupled", BatchTopKCrossCoder, 5, k=K, code_normalization="DECOUPLED")


if __name__ == "__main__":
    main()
