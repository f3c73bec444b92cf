"""Live models of timm, transformers and others: what only they tell, and whether the conversion does what they do."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from segmenter.config import ModelConfig
from segmenter.errors import cause
from segmenter.model import create_vit
from segmenter.weights.build import load_state
from segmenter.weights.read import CheckpointError
from segmenter.weights.recognise import State, refuse
from segmenter.weights.settings import hugging_face_fields

TOLERANCE = 1e-4  # of the norm of all tokens; rounding stays below 1e-5, the approximate GELU alone makes more
_PLAIN_CONFIG = ("backbone", "n_heads", "normalization", "dropout", "drop_path_rate", "norm_eps")
_POSITIONS = ("pos_embed", "pos_embed_mode", "pos_embed_check", "rope_theta")
_WRAPPERS = (["module"], ["_orig_mod"])  # DataParallel, AveragedModel; torch.compile
_DINOV3 = "RotaryEmbeddingDinoV3"  # its rotary positions in timm
_FEATURES = {  # attributes of a model, or of an attention, that no weight need tell of
    "rope": "rotary positions",
    "rel_pos_bias": "relative positions",
    "shared_rel_pos": "relative positions",
    "rel_pos": "relative positions",
    "gate": "gated attention",
    "lambda_init": "differential attention",
}


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside what trainers put around it."""
    while list(model._modules) in _WRAPPERS:
        model = next(iter(model._modules.values()))
    return model


def is_rotary(model: nn.Module | None, fields: Mapping[str, Any]) -> bool:
    """Whether a live model, or what is said of weights, has the rotary positions of DINOv3."""
    return fields.get("pos_embed") == "rotary" or type(getattr(model, "rope", None)).__name__ == _DINOV3


def describe(model: nn.Module, odd: str | None) -> dict[str, Any]:
    """What only the live model tells: fields of ModelConfig, `grid`, (rows, columns) of its positions, `statistics`.

    Args:
        odd: what `recognise.feature` found in the names of its weights.
    Raises:
        CheckpointError: it is no plain ViT.
    """
    config = getattr(model, "config", None)
    if isinstance(config, ModelConfig):  # a Segmenter
        kept = {name: getattr(config, name) for name in (*_PLAIN_CONFIG, *_POSITIONS)}
        return {**kept, "grid": tuple(side // config.patch_size for side in config.image_size)}
    if odd:
        raise refuse(f"{type(model).__name__} has", odd)
    if hasattr(model, "blocks"):
        return _timm(model)
    return hugging_face_fields(config.to_dict()) if hasattr(config, "to_dict") else {}


def compare(model: nn.Module, kind: str, state: State, config: ModelConfig) -> float | None:
    """How far the tokens of the converted encoder are from the live model's own, as a share of their norm.

    Both run once in float32 on the CPU, on noise of the encoder's own image size; the model is copied for it.

    Args:
        kind: of the live model. state: its weights under our names. config: of them, at their own sizes.
    Returns:
        None for a model that says nowhere how to get its tokens, or has none that are finite.
    Raises:
        CheckpointError: the tokens differ beyond rounding, or the model cannot run.
    """
    if type(model).forward is nn.Module.forward or kind == "mmseg":
        return None
    with torch.device("meta"):
        ours = create_vit(config, impl="eager").eval()
    weights = {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")}
    load_state(ours, weights, type(model).__name__)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, *config.image_size, generator=generator, device="cpu")
    with torch.no_grad(), torch.random.fork_rng(devices=[]), torch.autocast("cpu", enabled=False):
        try:
            theirs = _tokens(copy.deepcopy(model).to("cpu", torch.float32).eval(), image)
        except Exception as error:  # any code may run here
            raise CheckpointError(
                f"{type(model).__name__} does not run on an image of {config.image_size}, so that the conversion "
                f"cannot be compared with it ({cause(error)})"
            ) from error
        found = ours(image, return_features=True)
    if theirs.shape != found.shape:
        raise CheckpointError(
            f"{type(model).__name__} is no plain ViT: it gives tokens of shape {tuple(theirs.shape)}, a plain one with "
            f"its weights {tuple(found.shape)}"
        )
    if not bool(torch.isfinite(theirs).all()):
        return None
    difference = ((found - theirs).norm() / theirs.norm().clamp(min=1e-30)).item()
    if not difference <= TOLERANCE:
        raise CheckpointError(
            f"{type(model).__name__} is no plain ViT: its tokens are {difference:.0e} of their norm away from those of "
            "a plain one with its weights"
        )
    return difference


def _timm(model: nn.Module) -> dict[str, Any]:
    try:
        block = model.blocks[0]
        eps = getattr(model.norm, "eps", getattr(block.norm1, "eps", None))  # no norm: that is told by the names
        heads, acts = block.attn.num_heads, [b.mlp.act for b in model.blocks]
    except (AttributeError, IndexError, TypeError) as error:
        raise CheckpointError(f"{type(model).__name__} is no plain VisionTransformer of timm ({error})") from error
    rotary = is_rotary(model, {})
    for name, what in _FEATURES.items():
        if rotary and name == "rope":
            continue
        if any(getattr(part, name, None) is not None for part in (model, block, block.attn)):
            raise refuse(f"{type(model).__name__} has", what)
    if any(isinstance(act, nn.SiLU) for act in acts):
        raise refuse(f"{type(model).__name__} has", "a gated MLP (SwiGLU)")
    if not all(isinstance(act, nn.GELU) and act.approximate == "none" for act in acts):
        raise CheckpointError(f"the MLP uses {type(acts[0]).__name__}; the Segmenter encoder needs the exact GELU")
    fields = {"n_heads": heads, "norm_eps": eps, "grid": _grid(getattr(model, "patch_embed", None))}
    fields |= {"class_token": getattr(model, "cls_token", None) is not None, "final_norm": hasattr(model.norm, "eps")}
    if rotary:
        fields |= {"pos_embed": "rotary", "rope_theta": model.rope.temperature}
    elif (patches_only := getattr(model, "no_embed_class", None)) is not None:
        fields["pos_embed"] = "patches" if patches_only else "all"
    trained = getattr(model, "pretrained_cfg", None) or {}
    if trained.get("mean") is not None:
        fields["statistics"] = (trained["mean"], trained.get("std"))
    return {name: value for name, value in fields.items() if value is not None}


def _grid(patch_embed: nn.Module | None) -> tuple[int, int] | None:
    """As timm says it; as the code of DINO, DINOv2 and MAE does; None if it does not say."""
    names = ("grid_size", "patches_resolution")
    grid = next((value for name in names if (value := getattr(patch_embed, name, None)) is not None), None)
    if grid is None and getattr(patch_embed, "img_size", None) is not None:
        size, patch = (
            value if isinstance(value, tuple | list) else (value, value)
            for value in (patch_embed.img_size, patch_embed.patch_size)
        )
        grid = (size[0] // patch[0], size[1] // patch[1])
    return None if grid is None else tuple(grid)


def _tokens(model: nn.Module, image: torch.Tensor) -> torch.Tensor:
    """All tokens after the last norm, (1, tokens, d)."""
    if hasattr(model, "forward_features"):
        tokens = model.forward_features(image)
        if isinstance(tokens, dict):  # facebookresearch/dinov2
            none = tokens["x_norm_patchtokens"][:, :0]
            registers = tokens.get("x_norm_regtokens", tokens.get("x_storage_tokens", none))  # DINOv2, DINOv3
            parts = (tokens["x_norm_clstoken"][:, None], registers, tokens["x_norm_patchtokens"])
            tokens = torch.cat(parts, dim=1)
        return tokens
    if hasattr(model, "get_intermediate_layers"):  # facebookresearch/dino
        return model.get_intermediate_layers(image, 1)[0]
    if hasattr(model, "encoder") and hasattr(model, "decoder"):  # the published Segmenter
        return model.encoder(image, return_features=True)
    if hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation("eager")  # flash attention runs on no CPU
    more: dict[str, Any] = {}
    if getattr(getattr(model, "config", None), "model_type", None) == "vit_mae":  # leaves patches out, turns the order
        model.config.mask_ratio = 0.0
        n_patches = model.base_model.embeddings.patch_embeddings.num_patches
        more["noise"] = torch.arange(n_patches, dtype=torch.float32, device="cpu")[None]
    body = model if hasattr(model, "embeddings") else getattr(model, "base_model", model)
    return body(pixel_values=image, **more).last_hidden_state
