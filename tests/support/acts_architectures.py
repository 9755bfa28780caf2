"""A tiny model of every architecture that hooks are tried in, its blocks, and ids for it."""

import functools

import torch
import transformers
from torch import nn

from wsae.acts.capture import tokens
from wsae.acts.hookpoints import HookPoint, probe

SMALL = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
USUAL = {**SMALL, "intermediate_size": 32}
GROUPED = {**USUAL, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
MODELS = {
    "llama": lambda t: t.LlamaForCausalLM(t.LlamaConfig(**GROUPED)),
    "gemma2": lambda t: t.Gemma2ForCausalLM(t.Gemma2Config(**HEADS)),
    "qwen3": lambda t: t.Qwen3ForCausalLM(t.Qwen3Config(**HEADS)),
    "mixtral": lambda t: t.MixtralForCausalLM(t.MixtralConfig(**GROUPED, num_local_experts=4)),
    "gpt2": lambda t: t.GPT2LMHeadModel(
        t.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2)
    ),
    "gpt_neo": lambda t: t.GPTNeoForCausalLM(
        t.GPTNeoConfig(
            vocab_size=64,
            hidden_size=16,
            num_layers=2,
            num_heads=2,
            attention_types=[[["global", "local"], 1]],
            max_position_embeddings=16,
            window_size=4,
        )
    ),
    "gptj": lambda t: t.GPTJForCausalLM(
        t.GPTJConfig(vocab_size=64, n_positions=16, n_embd=16, n_layer=2, n_head=2, rotary_dim=4)
    ),
    "neox": lambda t: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**USUAL)),
    "opt": lambda t: t.OPTForCausalLM(
        t.OPTConfig(**SMALL, ffn_dim=32, word_embed_proj_dim=16, max_position_embeddings=16)
    ),
    "bloom": lambda t: t.BloomForCausalLM(
        t.BloomConfig(vocab_size=64, hidden_size=16, n_layer=2, n_head=2)
    ),
    "falcon": lambda t: t.FalconForCausalLM(t.FalconConfig(**SMALL)),
    "bert": lambda t: t.BertForMaskedLM(t.BertConfig(**USUAL, max_position_embeddings=16)),
    "electra": lambda t: t.ElectraForPreTraining(
        t.ElectraConfig(**USUAL, embedding_size=16, max_position_embeddings=16)
    ),
    "roberta": lambda t: t.RobertaForMaskedLM(t.RobertaConfig(**USUAL, max_position_embeddings=18)),
    "xlnet": lambda t: t.XLNetLMHeadModel(
        t.XLNetConfig(vocab_size=64, d_model=16, n_layer=2, n_head=2, d_inner=32)
    ),
    "mamba": lambda t: t.MambaForCausalLM(
        t.MambaConfig(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=4)
    ),
    "reformer": lambda t: t.ReformerModelWithLMHead(
        t.ReformerConfig(
            vocab_size=64,
            is_decoder=True,
            hidden_size=16,
            attention_head_size=8,
            num_attention_heads=2,
            feed_forward_size=32,
            attn_layers=["local", "lsh"],
            axial_pos_shape=(8, 8),
            axial_pos_embds_dim=(8, 8),
            local_attn_chunk_length=8,
            lsh_attn_chunk_length=8,
            num_buckets=4,
        )
    ),
    "gemma3": lambda t: t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            text_config=HEADS,
            vision_config={
                **{key: n for key, n in USUAL.items() if key != "vocab_size"},
                **{"num_hidden_layers": 3, "image_size": 28, "patch_size": 14},
            },
            mm_tokens_per_image=4,
        )
    ),
}
BLOCKS = {
    **dict.fromkeys(("gpt2", "gpt_neo", "gptj", "bloom", "falcon"), "h.0"),
    **dict.fromkeys(("bert", "electra", "roberta", "xlnet"), "layer.0"),
}
"""Where the first block is, of those that have it elsewhere than at `layers.0`."""


@functools.cache
def tiny(kind: str) -> nn.Module:
    """Return the frozen model of an architecture, made once."""
    torch.manual_seed(0)
    return MODELS[kind](transformers).eval().requires_grad_(False)


def hook_of(kind: str, pattern: str, seq_len: int | None = 12) -> HookPoint:
    """Return the one hook point that the pattern names in it."""
    (hook,) = probe(tiny(kind), [pattern], tokens(seq_len)).hooks
    return hook


def few_ids(batch=4, seq=9) -> torch.Tensor:
    """Return random ids that all of them have."""
    return torch.randint(6, 60, (batch, seq), generator=torch.Generator().manual_seed(0))
