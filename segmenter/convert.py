"""Weights of other projects -> ours: names, and the architecture read off the shapes.

Kinds of weights; all become the names of the published Segmenter, `encoder.*` and, for whole models, `decoder.*`:

    segmenter   the published checkpoints and ours
    mmseg       Segmenter of mmsegmentation, or only its pretrained ViT (with and without `backbone.`)
    timm        ViT and DeiT of timm and facebookresearch/deit, as a state dict or a live model
    npz         ViT of google-research/vision_transformer ("augreg", JAX)
    hf          ViT and DeiT of Hugging Face transformers, as stored on the hub and as held in memory by version 5
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from segmenter.checkpoint import CheckpointError, listing
from segmenter.config import ConfigError, ModelConfig
from segmenter.foreign import DEFAULTS, KINDS, State, hugging_face_fields, live_timm, recognise, to_ours
from segmenter.layers import resize_pos_embed

__all__ = ["KINDS", "Converted", "architecture", "change_patch_size", "convert", "recognise"]
HEAD_DIM = 64


@dataclass
class Converted:
    """A state dict under our names and what it was made from.

    Attributes:
        state: `encoder.*` and, if `has_decoder`, `decoder.*`.
        config: the architecture. Without a decoder in the file, its decoder and n_cls are those asked for.
        kind: one of KINDS. has_decoder: the file holds a whole segmentation model.
        notes: what was added, dropped or changed, for people.
    """

    state: State
    config: ModelConfig
    kind: str
    has_decoder: bool
    notes: list[str] = field(default_factory=list)


def convert(
    weights: Mapping[str, torch.Tensor] | nn.Module,
    *,
    kind: str | None = None,
    n_cls: int | None = None,
    decoder: str | Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    grid: tuple[int, int] | None = None,
    **fields: Any,
) -> Converted:
    """Weights of any kind -> our names and the configuration that they need.

    Args:
        weights: a state dict, or a live model of timm or transformers. Not changed.
        kind: one of KINDS; None recognises it.
        n_cls, decoder: of the decoder to put on files that hold an encoder only; a whole model must agree with them.
            decoder: "mask_transformer" (the default), "linear", or a mapping as in variant.yml.
        image_size: pixels to resize the position embedding to; None keeps that of the file.
        patch_size: resamples the patch embedding to another patch (an extension, see `change_patch_size`).
        grid: (rows, columns) of the position embedding in the file; None takes it for square.
        fields: of ModelConfig, over what the kind implies: normalization ("vit", or "deit" for distilled models),
            norm_eps, pos_embed_mode, n_heads (width / 64), dropout, drop_path_rate. None counts as not given.
    Raises:
        CheckpointError: unknown names, features that a plain ViT has not, or arguments that contradict the file.
    """
    if unknown := [name for name in fields if name not in {f.name for f in dataclasses.fields(ModelConfig)}]:
        raise ConfigError(f"argument {listing(unknown)} is unknown")
    found: dict[str, Any] = {}
    if isinstance(weights, nn.Module):
        if hasattr(weights, "blocks"):
            weights, found = live_timm(weights)
        else:
            described = getattr(weights, "config", None)
            found = hugging_face_fields(described.to_dict()) if hasattr(described, "to_dict") else {}
            weights = weights.state_dict()
    kind = kind or recognise(weights)
    if kind not in KINDS:
        what = "weights of no known kind" if kind is None else f"kind {kind!r} is unknown"
        names = listing([str(name) for name in weights])
        raise CheckpointError(f"{what} (choose one of {', '.join(KINDS)}); the names in the file: {names}")
    state, implied, notes = to_ours(weights, kind)
    found = {**DEFAULTS[kind], **implied, **found, **{k: v for k, v in fields.items() if v is not None}}
    arch = architecture(state)
    arch_decoder = arch.pop("decoder", None)
    has_decoder = arch_decoder is not None
    if has_decoder:
        _check_agreement(arch, arch_decoder, n_cls, decoder)
        n_cls, decoder = arch["n_cls"], {**(decoder if isinstance(decoder, Mapping) else {}), **arch_decoder}
    elif n_cls is None:
        raise CheckpointError(
            "a pretrained backbone, not a segmentation checkpoint: the file has no decoder; "
            "give n_cls to put a decoder with random weights on it"
        )
    if isinstance(decoder, str) or decoder is None:
        decoder = {"name": decoder or "mask_transformer"}
    decoder = {"name": "mask_transformer", **decoder}
    if grid is not None:
        arch["image_size"] = (grid[0] * arch["patch_size"], grid[1] * arch["patch_size"])
    _fit_grid(state, arch, image_size, patch_size, found["pos_embed_mode"], notes)
    if "n_heads" not in found and arch["d_model"] % HEAD_DIM:
        raise CheckpointError(f"width {arch['d_model']} is no multiple of {HEAD_DIM}; give n_heads")
    found.setdefault("n_heads", arch["d_model"] // HEAD_DIM)
    found.setdefault("normalization", "deit" if arch["distilled"] else "vit")
    found.setdefault("backbone", f"vit_{kind}")
    try:
        config = ModelConfig.from_dict({**arch, **found, "n_cls": n_cls, "decoder": dict(decoder)})
    except ConfigError as error:
        raise CheckpointError(f"these {kind} weights do not make a Segmenter: {error}") from error
    return Converted(state, config, kind, has_decoder, notes)


def architecture(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the shapes under our names tell, as fields of ModelConfig.

    `image_size` is there only for a square position embedding, `n_cls` and `decoder` only if the decoder is.

    Raises:
        CheckpointError: tensors that no Segmenter has.
    """
    try:
        patch, positions = state["encoder.patch_embed.proj.weight"], state["encoder.pos_embed"]
    except KeyError as error:
        raise CheckpointError(f"the weights lack {error.args[0]}") from error
    if patch.ndim != 4 or patch.shape[1] != 3 or patch.shape[2] != patch.shape[3] or 0 in patch.shape:
        raise CheckpointError(f"the patch embedding must be (d, 3, P, P), found {tuple(patch.shape)}")
    distilled = "encoder.dist_token" in state
    if positions.ndim != 3 or positions.shape[1] <= 1 + distilled:
        raise CheckpointError(f"the position embedding must be (1, tokens, d), found {tuple(positions.shape)}")
    arch: dict[str, Any] = {
        "patch_size": patch.shape[2],
        "d_model": patch.shape[0],
        "n_layers": _n_blocks(state, "encoder"),
        "distilled": distilled,
    }
    n_patches = positions.shape[1] - 1 - distilled
    side = round(n_patches**0.5)
    if side * side == n_patches:
        arch["image_size"] = (side * arch["patch_size"], side * arch["patch_size"])
    if "decoder.head.weight" in state:
        arch |= {"n_cls": state["decoder.head.weight"].shape[0], "decoder": {"name": "linear"}}
    elif "decoder.cls_emb" in state and state["decoder.cls_emb"].ndim == 3:
        decoder = {"name": "mask_transformer", "n_layers": _n_blocks(state, "decoder")}
        arch |= {"n_cls": state["decoder.cls_emb"].shape[1], "decoder": decoder}
    fc1 = state.get("encoder.blocks.0.mlp.fc1.bias")
    if fc1 is not None and fc1.shape[0] != 4 * arch["d_model"]:
        raise CheckpointError(f"the MLP is {fc1.shape[0]} wide; the Segmenter encoder has 4 x {arch['d_model']}")
    return arch


def change_patch_size(state: State, patch_size: int, grid: tuple[int, int] | None = None) -> State:
    """The same encoder for another patch size. An extension: the published models were never made this way.

    The patch embedding is resampled so that its answers on smooth images stay the same (pseudo-inverse of the
    resize, from FlexiViT, as `timm.layers.resample_patch_embed` does it); the position embedding is resized to `grid`
    (rows, columns) with bicubic interpolation. Fine-tuning afterwards is advised, above all from 16 to 8.

    Args:
        state: names as ours; square position embedding. patch_size: the new one. grid: None keeps the grid.
    Returns:
        A new state dict that shares the unchanged tensors.
    """
    try:  # a broken torchvision makes timm raise other things than ImportError
        from timm.layers import resample_patch_embed
    except Exception as error:
        raise CheckpointError(f"changing the patch size needs timm, which cannot be imported ({error})") from error
    name = "encoder.patch_embed.proj.weight"
    state = {**state, name: resample_patch_embed(state[name].float(), [patch_size, patch_size])}
    if grid is not None:
        n_extra = 2 if "encoder.dist_token" in state else 1
        state["encoder.pos_embed"] = resize_pos_embed(state["encoder.pos_embed"], None, grid, n_extra, "bicubic")
    return state


def _check_agreement(
    arch: dict[str, Any], found: dict[str, Any], n_cls: int | None, decoder: str | Mapping[str, Any] | None
) -> None:
    asked = decoder if isinstance(decoder, str) or decoder is None else decoder.get("name")
    if asked not in (None, found["name"]):
        raise CheckpointError(f"decoder {asked!r} was asked for, the file holds a {found['name']} decoder")
    if n_cls not in (None, arch["n_cls"]):
        raise CheckpointError(f"{n_cls} classes were asked for, the file holds a model of {arch['n_cls']} classes")


def _fit_grid(
    state: State,
    arch: dict[str, Any],
    image_size: int | tuple[int, int] | None,
    patch_size: int | None,
    mode: str,
    notes: list[str],
) -> None:
    """Sets arch["image_size"] and arch["patch_size"] as asked for, and the embeddings in `state` to match."""
    old, new = arch["patch_size"], patch_size or arch["patch_size"]
    if new != old:
        state.update(change_patch_size(state, new))
        notes.append(f"patch size {old} -> {new} by resampling the patch embedding (an extension; fine-tune it)")
    n_extra = 1 + arch["distilled"]
    n_patches = state["encoder.pos_embed"].shape[1] - n_extra
    grid = tuple(side // old for side in arch["image_size"]) if "image_size" in arch else None
    if grid is not None and grid[0] * grid[1] != n_patches:
        raise CheckpointError(f"the position embedding has {n_patches} patches, which is no {grid} grid")
    if image_size is None:
        if grid is None:
            raise CheckpointError(f"the position embedding has {n_patches} patches, no square; give its grid")
        wanted = grid
    else:
        size = tuple(image_size) if isinstance(image_size, tuple | list) else (image_size, image_size)
        if len(size) != 2 or any(side < new or side % new for side in size):
            raise CheckpointError(f"image_size {image_size} must be a multiple of the patch size {new}")
        wanted = (size[0] // new, size[1] // new)
    if grid is None and wanted[0] * wanted[1] != n_patches:
        raise CheckpointError(
            f"the position embedding has {n_patches} patches, neither a square nor the {wanted} grid of image_size"
        )
    if grid is not None and wanted != grid:
        state["encoder.pos_embed"] = resize_pos_embed(state["encoder.pos_embed"].float(), grid, wanted, n_extra, mode)
        notes.append(f"position embedding resized from {grid} to {wanted} patches ({mode})")
    arch["patch_size"], arch["image_size"] = new, (wanted[0] * new, wanted[1] * new)


def _n_blocks(state: Mapping[str, torch.Tensor], part: str) -> int:
    found = (re.match(rf"{part}\.blocks\.(\d+)\.", name) for name in state)
    return len({int(match[1]) for match in found if match})
