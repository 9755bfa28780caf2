"""Fixtures written by sparsify itself, with the latents and reconstructions its own class gives.

pip install eai-sparsify==1.3.3      (in an environment of its own)
python benchmarks/interop_fixtures/make_sparsify.py
"""

import torch
from common import D_IN, D_SAE, K, folder, inputs, record, shake
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor


def make(name: str, seed: int, **fields) -> None:
    torch.manual_seed(seed)
    widths = {"num_latents": D_SAE, "k": K}
    coder = SparseCoder(D_IN, SparseCoderConfig(**(widths | fields)))
    shake(coder, seed)
    coder.save_to_disk(folder(name))
    coder = SparseCoder.load_from_disk(folder(name))

    def encode(x: Tensor) -> Tensor:
        found = coder.encode(x)
        return torch.zeros(len(x), coder.num_latents).scatter(1, found.top_indices, found.top_acts)

    whole = coder.W_skip is not None
    record(
        name,
        encode,
        lambda z: coder(inputs()).sae_out if whole else coder.decode(*z.topk(K, dim=1)),
    )


def main() -> None:
    make("sparsify-topk", 1)
    make("sparsify-groupmax", 2, activation="groupmax")
    make("sparsify-no-num-latents", 3, num_latents=0, expansion_factor=3)
    make("sparsify-free-norms", 4, normalize_decoder=False)
    make("sparsify-multi-topk", 5, multi_topk=True)
    make("sparsify-transcoder", 6, transcode=True)
    make("sparsify-skip", 7, skip_connection=True)
    make("sparsify-skip-transcoder", 8, skip_connection=True, transcode=True)


if __name__ == "__main__":
    main()
