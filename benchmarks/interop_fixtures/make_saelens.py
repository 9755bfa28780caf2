"""Fixtures written by SAELens itself, with the latents and reconstructions its own classes give.

pip install sae-lens==6.54.12        (in an environment of its own)
python benchmarks/interop_fixtures/make_saelens.py
"""

import torch
from common import D_IN, D_SAE, K, folder, inputs, record, shake
from sae_lens import SAE
from sae_lens.registry import get_sae_class, get_sae_training_class
from sae_lens.saes.sae import TrainStepInput

D_OUT = 5
"""Of transcoders."""
WIDTHS = {"d_in": D_IN, "d_sae": D_SAE, "dtype": "float32", "device": "cpu"}


def inference(name: str, architecture: str, seed: int, **fields) -> None:
    """Save an inference SAE and record what `SAE.load_from_disk` makes of the folder."""
    kind, config = get_sae_class(architecture)
    torch.manual_seed(seed)
    sae = kind(config(**WIDTHS, **fields))
    shake(sae, seed)
    if "jumprelu" in architecture:
        with torch.no_grad():
            sae.threshold.copy_(torch.rand(D_SAE) * 1.5)
            sae.threshold[0], sae.threshold[1] = 0.0, -0.5
    sae.cfg.metadata.model_name = "tiny"
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    sae.cfg.metadata.context_size = 64
    sae.cfg.metadata.prepend_bos = True
    if "transcoder" in architecture:
        sae.cfg.metadata.hook_name_out = "blocks.3.hook_mlp_out"
    sae.save_model(folder(name))
    check(name)


def trained(name: str, architecture: str, seed: int, steps: int = 60, **fields) -> None:
    """Train a few steps with SAELens' own class and save its inference SAE, as its runner does."""
    kind, config = get_sae_training_class(architecture)
    torch.manual_seed(seed)
    sae = kind(config(**WIDTHS, **fields))
    shake(sae, seed, 0.1)
    optimizer = torch.optim.Adam(sae.parameters(), lr=1e-2)
    for step in range(steps):
        given = TrainStepInput(inputs(step), {}, None, step, False)
        optimizer.zero_grad()
        sae.training_forward_pass(given).loss.backward()
        optimizer.step()
    sae.cfg.metadata.model_name = "tiny"
    sae.cfg.metadata.hook_name = "blocks.3.hook_resid_post"
    sae.save_inference_model(folder(name))
    check(name)


def check(name: str) -> None:
    sae = SAE.load_from_disk(folder(name))
    transcoder = "transcoder" in sae.cfg.architecture()
    record(name, sae.encode, lambda z: sae(inputs()) if transcoder else sae.decode(z))


def main() -> None:
    inference("saelens-topk", "topk", 1, k=K)
    inference("saelens-topk-rescale", "topk", 2, k=K, rescale_acts_by_decoder_norm=True)
    inference("saelens-topk-no-b-dec", "topk", 3, k=K, apply_b_dec_to_input=False)
    inference("saelens-topk-bf16", "topk", 4, k=K)
    inference("saelens-jumprelu", "jumprelu", 5)
    inference("saelens-jumprelu-no-b-dec", "jumprelu", 6, apply_b_dec_to_input=False)
    inference("saelens-standard", "standard", 7)
    inference("saelens-standard-no-b-dec", "standard", 8, apply_b_dec_to_input=False)
    inference("saelens-gated", "gated", 9)
    inference("saelens-matching-pursuit", "matching_pursuit", 10)
    inference("saelens-layer-norm", "topk", 11, k=K, normalize_activations="layer_norm")
    rescale = {"normalize_activations": "constant_norm_rescale", "apply_b_dec_to_input": False}
    inference("saelens-norm-rescale", "jumprelu", 14, **rescale)
    gives = {"d_out": D_OUT, "apply_b_dec_to_input": False}
    inference("saelens-transcoder", "transcoder", 14, **gives)
    inference("saelens-skip-transcoder", "skip_transcoder", 15, **gives)
    inference("saelens-jumprelu-transcoder", "jumprelu_transcoder", 16, **gives)
    inference("saelens-jumprelu-skip-transcoder", "jumprelu_skip_transcoder", 17, **gives)
    trained("saelens-batchtopk", "batchtopk", 12, k=float(K))
    trained("saelens-topk-trained", "topk", 13, k=K)
    halve("saelens-topk-bf16")


def halve(name: str) -> None:
    """Store a folder in bf16; what is recorded is those weights in fp32 (`SAE.load_from_disk(dtype="float32")`)."""
    sae = SAE.load_from_disk(folder(name)).to(dtype=torch.bfloat16)
    sae.save_model(folder(name))
    wide = SAE.load_from_disk(folder(name), dtype="float32")
    record(name, wide.encode, wide.decode)


if __name__ == "__main__":
    main()
