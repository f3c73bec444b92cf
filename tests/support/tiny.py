"""Small seeded models for tests."""

import torch

from segmenter.config import ModelConfig
from segmenter.model import Segmenter, create_segmenter


def tiny_config(**overrides) -> ModelConfig:
    """Two layers of width 64, patch 16, 5 classes, mask transformer."""
    kwargs = {
        "backbone": "tiny", "image_size": (64, 64), "patch_size": 16, "d_model": 64, "n_heads": 1, "n_layers": 2,
        "n_cls": 5, "drop_path_rate": 0.0, "decoder": {"name": "mask_transformer", "n_layers": 1},
    }  # fmt: skip
    return ModelConfig.from_dict({**kwargs, **overrides})


def tiny_model(seed: int = 0, **overrides) -> Segmenter:
    """`tiny_config` with weights that give varied masks: every parameter random, norms and biases included."""
    model = create_segmenter(tiny_config(**overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name and "weight" in name else 0.1 * noise)
    size = model.config.image_size[0]
    model.info.window_size = model.info.window_stride = size
    return model.eval()
