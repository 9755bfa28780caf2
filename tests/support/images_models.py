"""Tiny vision models built from their configs, saved as the hub's library saves real ones."""

import json
from pathlib import Path

import torch
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    ResNetConfig,
    ResNetModel,
    ViTConfig,
    ViTModel,
)

SIZE, WIDTH = 32, 16
_SMALL = {
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "image_size": SIZE,
    "patch_size": 8,
}
_NORMAL = {"do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "image_std": [0.2, 0.3, 0.25]}
_CROP = {"do_center_crop": True, "crop_size": {"height": SIZE, "width": SIZE}}
PROCESSORS = {
    "resnet": {
        "feature_extractor_type": "ConvNextFeatureExtractor",  # as microsoft/resnet-18 has it
        "size": SIZE,
        "crop_pct": 0.875,
        "resample": 3,
    },
    "vit": {"image_processor_type": "ViTImageProcessor", "size": SIZE, "resample": 2},
    "clip": {"image_processor_type": "CLIPImageProcessor", "size": SIZE, "resample": 3, **_CROP},
    "clip_vision": {"image_processor_type": "CLIPImageProcessor", "size": SIZE, **_CROP},
    "dinov2": {
        "image_processor_type": "BitImageProcessor",
        "size": {"shortest_edge": 40},
        "resample": 3,
        **_CROP,
    },
}


def make_vision(path: Path, kind: str) -> str:
    """Save a model of a kind with seeded weights and its processor's config; return its path."""
    torch.manual_seed(0)
    resnet = {"embedding_size": 8, "hidden_sizes": [8, WIDTH], "depths": [1, 1]}
    make = {
        "resnet": lambda: ResNetModel(ResNetConfig(**resnet, layer_type="basic")),
        "vit": lambda: ViTModel(ViTConfig(**_SMALL)),
        "clip": lambda: CLIPModel(CLIPConfig(vision_config=_SMALL, text_config=_text())),
        "clip_vision": lambda: CLIPVisionModel(CLIPVisionConfig(**_SMALL)),
        "dinov2": lambda: Dinov2Model(Dinov2Config(**_SMALL, mlp_ratio=2)),
    }
    make[kind]().save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(_NORMAL | PROCESSORS[kind]))
    return str(path)


def _text() -> dict[str, int]:
    return {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "intermediate_size": 8,
        "vocab_size": 16,
    }
