"""SAEBench's evaluations that need no network, on SAEs of ours: `meta_structure` and, with a local model, `core`.

    pip install -e . sae-bench==0.6.0       (an environment of its own: it pins older libraries)
    python benchmarks/saebench.py RUN --hook layers.9 --members plain variance-a1 --out DIR \
        [--model DIR --text FILE.jsonl.gz]

`meta_structure` trains a small batch Top-k SAE on the decoder's rows and reports the share of their variance it
explains. `core` splices reconstructions into the model: cross-entropy and KL with, without and ablated, explained
variance, L0. Its model is a TransformerLens one; `--model` is a directory with a Llama-like Hugging Face model, whose
weights are carried over and whose residual stream at the hook is compared with the original's before any scoring.
"""

import argparse
import gzip
import json
import sys
from pathlib import Path

import torch
from torch import nn

from wsae import SAE
from wsae.interop import SAEBenchSAE
from wsae.interop.saes import about_member


def meta_structure(saes: list[tuple[str, nn.Module]], out: Path) -> dict[str, float]:
    from sae_bench.evals.meta_structure.eval_config import MetaStructureEvalConfig
    from sae_bench.evals.meta_structure.main import run_eval

    config = MetaStructureEvalConfig(model_name="", autocast=False)
    return run_eval(config, saes, "cpu", str(out / "meta_structure"), force_rerun=True)


def hooked_llama(folder: Path) -> tuple[nn.Module, nn.Module]:
    """Return a TransformerLens model with the weights of a Llama-like one, and the original."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions import convert_llama_weights
    from transformers import AutoModelForCausalLM, AutoTokenizer

    original = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    hf = original.config
    rope = getattr(hf, "rope_parameters", None) or {"rope_theta": getattr(hf, "rope_theta", 10_000)}
    cfg = HookedTransformerConfig(
        model_name=folder.name,
        d_model=hf.hidden_size,
        d_head=hf.hidden_size // hf.num_attention_heads,
        n_heads=hf.num_attention_heads,
        n_key_value_heads=hf.num_key_value_heads,
        d_mlp=hf.intermediate_size,
        n_layers=hf.num_hidden_layers,
        n_ctx=1024,
        eps=hf.rms_norm_eps,
        d_vocab=hf.vocab_size,
        act_fn=hf.hidden_act,
        normalization_type="RMS",
        positional_embedding_type="rotary",
        rotary_adjacent_pairs=False,
        rotary_dim=hf.hidden_size // hf.num_attention_heads,
        rotary_base=int(rope["rope_theta"]),
        final_rms=True,
        gated_mlp=True,
        original_architecture="LlamaForCausalLM",
        default_prepend_bos=False,
        device="cpu",
        dtype=torch.float32,
    )
    model = HookedTransformer(cfg, tokenizer)
    state = convert_llama_weights(original, cfg)
    model.load_and_process_state_dict(
        state,
        fold_ln=False,
        center_writing_weights=False,
        center_unembed=False,
        fold_value_biases=False,
        refactor_factored_attn_matrices=False,
    )
    return model.eval(), original


@torch.no_grad()
def compare_streams(
    model: nn.Module, original: nn.Module, text: str, hook: str, layer: int
) -> float:
    """Return the largest difference of the residual stream at the hook over its largest value."""
    ids = model.tokenizer(text, return_tensors="pt")["input_ids"][:, :128]
    _, cache = model.run_with_cache(ids, names_filter=[hook], return_type=None)
    there = original(ids, output_hidden_states=True).hidden_states[layer + 1]
    return float((cache[hook] - there).abs().max() / there.abs().max())


def core(saes: list[tuple[str, SAEBenchSAE]], args: argparse.Namespace) -> dict[str, dict]:
    from datasets import Dataset
    from sae_bench.evals.core.eval_config import CoreEvalConfig
    from sae_bench.evals.core.main import run_evals
    from sae_lens.training.activations_store import ActivationsStore

    model, original = hooked_llama(args.model)
    with gzip.open(args.text, "rt") as file:
        texts = [
            json.loads(line)["text"] for line, _ in zip(file, range(args.documents), strict=False)
        ]
    cfg = saes[0][1].cfg
    gap = compare_streams(model, original, texts[0], cfg.hook_name, cfg.hook_layer)
    print(
        f"residual stream at {cfg.hook_name}: TransformerLens against transformers {gap:.1e}",
        flush=True,
    )
    assert gap < 1e-3
    data = Dataset.from_dict({"text": texts})
    found = {}
    for name, sae in saes:
        config = CoreEvalConfig(
            model_name="local",
            batch_size_prompts=8,
            n_eval_reconstruction_batches=args.batches,
            n_eval_sparsity_variance_batches=args.batches,
            exclude_special_tokens_from_reconstruction=True,
            context_size=128,
            compute_kl=True,
            compute_ce_loss=True,
            compute_l2_norms=True,
            compute_sparsity_metrics=True,
            compute_variance_metrics=True,
        )
        store = ActivationsStore(
            model=model,
            dataset=data,
            streaming=False,
            hook_name=cfg.hook_name,
            hook_head_index=None,
            context_size=128,
            d_in=cfg.d_in,
            n_batches_in_buffer=8,
            total_training_tokens=10**6,
            store_batch_size_prompts=8,
            train_batch_size_tokens=4096,
            prepend_bos=False,
            normalize_activations="none",
            sequence_separator_token="eos",
            device=torch.device("cpu"),
            dtype="float32",
        )
        tokenizer = model.tokenizer
        skipped = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
        found[name], _ = run_evals(sae, store, model, config, ignore_tokens=skipped)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--hook", default="layers.9")
    parser.add_argument("--members", nargs="+", default=["plain"])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--documents", type=int, default=2000)
    parser.add_argument("--batches", type=int, default=4)
    args = parser.parse_args()
    saes = [
        (
            member,
            SAEBenchSAE(
                SAE.load(args.run / "members" / args.hook / member),
                about_member(args.run, args.hook, member),
            ),
        )
        for member in args.members
    ]
    args.out.mkdir(parents=True, exist_ok=True)
    results = {"meta_structure": meta_structure(saes, args.out)}
    print(json.dumps(results, indent=1), flush=True)
    if args.model is not None:
        results["core"] = core(saes, args)
    (args.out / "saebench.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
