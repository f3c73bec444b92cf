"""Pretrained encoders of other projects, tiny and random, that `load_any` makes encoders of ours of."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn as nn

IMAGENET = ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
TIMM = {"pretrained": False, "depth": 2, "embed_dim": 64, "num_heads": 2, "num_classes": 0, "dynamic_img_size": True}
HF = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
# name -> (library, what makes it, patch size, arguments); images of 4 x 4 patches
BACKBONES = {
    "DINOv2": ("timm", "vit_small_patch14_dinov2", 14, {}),
    "DINOv2 with registers": ("timm", "vit_small_patch14_reg4_dinov2", 14, {}),
    "DeiT-III": ("timm", "deit3_small_patch16_224", 16, {}),
    "registers, mean of patches": ("timm", "vit_betwixt_patch16_reg4_gap_256", 16, {}),
    "mean of patches": ("timm", "vit_medium_patch16_gap_256", 16, {}),
    "positions of registers": ("timm", "vit_small_patch16_224", 16, {"reg_tokens": 3}),
    "Hugging Face ViT": ("transformers", "ViT", 16, {}),
    "Hugging Face DeiT": ("transformers", "DeiT", 16, {}),
    "Hugging Face DINOv2": ("transformers", "Dinov2", 14, {}),
    "Hugging Face DINOv2 with registers": ("transformers", "Dinov2WithRegisters", 14, {}),
    "DINOv3": ("timm", "vit_small_patch16_dinov3", 16, {}),
    "DINOv3, biases": ("timm", "vit_small_patch16_dinov3_qkvb", 16, {}),
    "Hugging Face DINOv3": ("transformers", "DINOv3ViT", 16, {"num_register_tokens": 3}),
}  # fmt: skip


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """In evaluation mode with every parameter random: LayerScale (1e-5 at first) and norms too."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=generator)
            p.copy_(noise * p.shape[-1] ** -0.5 if p.ndim > 1 else 0.3 * noise + ("bias" not in name))
    return model.eval()


def backbone(name: str) -> nn.Module:
    """Of BACKBONES. Skips the test if its library is missing."""
    library, made, patch, more = BACKBONES[name]
    pytest.importorskip(library, exc_type=Exception)
    if library == "timm":
        return randomised(importlib.import_module("timm").create_model(made, img_size=4 * patch, **{**TIMM, **more}))
    transformers = importlib.import_module("transformers")
    config = getattr(transformers, f"{made}Config")(**HF, patch_size=patch, image_size=4 * patch, **more)
    return randomised(getattr(transformers, f"{made}Model")(config))


def write_folder(name: str, model: nn.Module, folder: Path, mean: Any = IMAGENET[0], std: Any = IMAGENET[1]) -> Path:
    """What the hub has of it: weights, and the JSON files beside them."""
    if BACKBONES[name][0] == "transformers":
        model.save_pretrained(folder)
        text = json.dumps({"image_mean": mean, "image_std": std})
        (folder / "preprocessor_config.json").write_text(text)
        return folder
    from safetensors.torch import save_file

    folder.mkdir(exist_ok=True)
    save_file(model.state_dict(), folder / "model.safetensors")
    side = 4 * BACKBONES[name][2]
    content = {"architecture": BACKBONES[name][1], "model_args": {"num_heads": 2}}
    content["pretrained_cfg"] = {"input_size": [3, side, side], "mean": mean, "std": std}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def features(model: nn.Module, im: torch.Tensor) -> torch.Tensor:
    """All tokens after the last norm, by the library itself; im may have any size that is a multiple of the patch."""
    if hasattr(model, "forward_features"):
        return model.forward_features(im)
    more: dict[str, Any] = {"interpolate_pos_encoding": True} if model.config.model_type in ("vit", "deit") else {}
    return model(pixel_values=im, **more).last_hidden_state
