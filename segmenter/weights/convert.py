"""Weights of other projects -> ours: names, and the architecture read off the shapes.

Kinds of weights; all become the names of the published Segmenter, `encoder.*` and, for whole models, `decoder.*`:

    segmenter   the published checkpoints and ours
    mmseg       Segmenter of mmsegmentation, or only its pretrained ViT (with and without `backbone.`)
    timm        ViT and DeiT of timm and facebookresearch/deit, as a state dict or a live model
    npz         ViT of google-research/vision_transformer ("augreg", JAX)
    hf          ViT and DeiT of Hugging Face transformers, as stored on the hub and as held in memory by version 5
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn as nn

from segmenter.config import MAX_IMAGE_SIZE, MAX_PATCH_SIZE, ConfigError, ModelConfig
from segmenter.layers import resize_pos_embed
from segmenter.weights.live import compare, describe, unwrapped
from segmenter.weights.names import (
    DEFAULTS,
    KINDS,
    UNCERTAIN_WIDTHS,
    State,
    check_dimensions,
    check_plain,
    feature,
    recognise,
    to_ours,
)
from segmenter.weights.read import CheckpointError, listing

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
        difference: from the tokens of the live model it was made from, as a share of their norm (see `live.compare`);
            None if there was nothing to compare with.
    """

    state: State
    config: ModelConfig
    kind: str
    has_decoder: bool
    notes: list[str] = field(default_factory=list)
    difference: float | None = None


def convert(
    weights: Mapping[str, torch.Tensor] | nn.Module,
    *,
    kind: str | None = None,
    n_cls: int | None = None,
    decoder: str | Mapping[str, Any] | None = None,
    image_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    grid: tuple[int, int] | None = None,
    source_size: int | tuple[int, int] | None = None,
    **fields: Any,
) -> Converted:
    """Weights of any kind -> our names and the configuration that they need.

    Args:
        weights: a state dict, or a live model of timm or transformers, which is run once to compare. Not changed.
        kind: one of KINDS; None recognises it.
        n_cls, decoder: of the decoder to put on files that hold an encoder only; a whole model must agree with them.
            decoder: "mask_transformer" (the default), "linear", or a mapping as in variant.yml.
        image_size: pixels, one number or (height, width), to resize the position embedding to; None keeps that of the
            file. If nothing else tells the grid of the file and it can be no square, it is that of image_size.
        patch_size: resamples the patch embedding to another patch (an extension, see `change_patch_size`).
        grid: (rows, columns) of the position embedding in the file, over everything else that tells it.
        source_size: pixels that what lies beside the file (config.json) says its position embedding is for. If neither
            this nor a live model nor `grid` tells the grid, it is taken for square, which is then noted.
        fields: of ModelConfig, over what the kind implies: normalization ("vit", or "deit" for distilled models),
            norm_eps, pos_embed_mode, n_heads (width / 64), dropout, drop_path_rate. None counts as not given.
    Raises:
        CheckpointError: unknown names, features that a plain ViT has not, or arguments that contradict the file.
    """
    if unknown := [name for name in fields if name not in {f.name for f in dataclasses.fields(ModelConfig)}]:
        raise ConfigError(f"argument {listing(unknown)} is unknown")
    live = unwrapped(weights) if isinstance(weights, nn.Module) else None
    found: dict[str, Any] = {}
    if live is not None:
        found = describe(live)
        weights = {name: _on_cpu(tensor) for name, tensor in live.state_dict().items()}
        source_size, own_grid = found.pop("source_size", source_size), found.pop("grid", None)
        if None not in (grid, own_grid) and tuple(grid) != own_grid:
            raise CheckpointError(f"grid {tuple(grid)} was given, the live model's is {own_grid}")
        grid = own_grid or grid
    weights = {str(name): tensor for name, tensor in weights.items()}
    check_plain(weights)
    kind = _known_kind(kind or recognise(weights), weights)
    state, implied, notes = to_ours(weights, kind)
    found = {**DEFAULTS[kind], **implied, **found, **{k: v for k, v in fields.items() if v is not None}}
    arch = architecture(state)
    has_decoder = "decoder" in arch
    n_cls, decoder = _decoder(arch, n_cls, decoder)
    grid, wanted, patch_size = _grids(state, arch, kind, grid, source_size, image_size, patch_size, notes)
    if "n_heads" not in found:
        _check_width(arch["d_model"])
    found.setdefault("n_heads", arch["d_model"] // HEAD_DIM)
    found.setdefault("normalization", "deit" if arch["distilled"] else "vit")
    found.setdefault("backbone", f"vit_{kind}")
    size = {"patch_size": patch_size, "image_size": (wanted[0] * patch_size, wanted[1] * patch_size)}
    try:
        config = ModelConfig.from_dict({**arch, **found, **size, "n_cls": n_cls, "decoder": decoder})
    except ConfigError as error:
        raise CheckpointError(f"these {kind} weights do not make a Segmenter: {error}") from error
    difference = None
    if live is not None and not isinstance(getattr(live, "config", None), ModelConfig):
        own = {"image_size": (grid[0] * arch["patch_size"], grid[1] * arch["patch_size"])}
        own |= {name: arch[name] for name in ("patch_size", "n_layers", "d_model", "distilled")}
        own |= {"d_ff": 4 * config.d_model, "n_heads": config.n_heads, "norm_eps": config.norm_eps}
        difference = compare(live, kind, state, own)
    _resize(state, arch["patch_size"], patch_size, grid, wanted, config, notes)
    return Converted(state, config, kind, has_decoder, notes, difference)


def architecture(state: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """What the shapes under our names tell, as fields of ModelConfig.

    `image_size` is there only for a square position embedding, `n_cls` and `decoder` only if the decoder is.

    Raises:
        CheckpointError: tensors that no Segmenter has.
    """
    for name in ("encoder.patch_embed.proj.weight", "encoder.pos_embed"):
        if name not in state:
            raise CheckpointError(f"the weights lack {name}")
    patch, positions = state["encoder.patch_embed.proj.weight"], state["encoder.pos_embed"]
    if patch.ndim != 4 or patch.shape[1] != 3 or patch.shape[2] != patch.shape[3] or 0 in patch.shape:
        raise CheckpointError(f"the patch embedding must be (d, 3, P, P), found {tuple(patch.shape)}")
    distilled = "encoder.dist_token" in state
    tokens = positions.shape[1] if positions.ndim == 3 else 0
    if tokens <= 1 + distilled or (positions.shape[0], positions.shape[2]) != (1, patch.shape[0]):
        raise CheckpointError(f"the position embedding must be (1, tokens, d), found {tuple(positions.shape)}")
    check_dimensions(state)
    arch: dict[str, Any] = {
        "patch_size": patch.shape[2],
        "d_model": patch.shape[0],
        "n_layers": n_blocks(state, "encoder"),
        "distilled": distilled,
    }
    if square := _square(tokens - 1 - distilled):
        arch["image_size"] = (square[0] * arch["patch_size"], square[1] * arch["patch_size"])
    if "decoder.head.weight" in state:
        arch |= {"n_cls": state["decoder.head.weight"].shape[0], "decoder": {"name": "linear"}}
    elif "decoder.cls_emb" in state:
        decoder = {"name": "mask_transformer", "n_layers": n_blocks(state, "decoder")}
        arch |= {"n_cls": state["decoder.cls_emb"].shape[1], "decoder": decoder}
    fc1 = state.get("encoder.blocks.0.mlp.fc1.bias")
    if fc1 is not None and fc1.shape[0] != 4 * arch["d_model"]:
        raise CheckpointError(f"the MLP is {fc1.shape[0]} wide; the Segmenter encoder has 4 x {arch['d_model']}")
    fc2 = state.get("encoder.blocks.0.mlp.fc2.weight")
    if fc1 is not None and fc2 is not None and fc2.shape[1] * 2 == fc1.shape[0]:
        raise CheckpointError("a gated MLP (GLU): fc2 takes half of what fc1 gives; the Segmenter encoder has none")
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


def _known_kind(kind: str | None, weights: Mapping[str, torch.Tensor]) -> str:
    if kind in KINDS:
        return kind
    what = "weights of no known kind" if kind is None else f"kind {kind!r} is unknown"
    odd = feature(weights) if kind is None else None
    raise CheckpointError(
        f"{what} (choose one of {', '.join(KINDS)}){f'; they have {odd}' if odd else ''}; "
        f"the names in the file: {listing(list(weights)) or 'none'}"
    )


def _decoder(
    arch: dict[str, Any], n_cls: int | None, decoder: str | Mapping[str, Any] | None
) -> tuple[int, dict[str, Any]]:
    """(n_cls, decoder) of the file, which must agree with what is asked for; as asked for if the file has none."""
    asked = {"name": decoder} if isinstance(decoder, str) else dict(decoder or {})
    if "decoder" not in arch:
        if n_cls is None:
            raise CheckpointError(
                "a pretrained backbone, not a segmentation checkpoint: the file has no decoder; "
                "give n_cls to put a decoder with random weights on it"
            )
        return n_cls, {"name": "mask_transformer", **asked}
    found = arch["decoder"]
    if asked.get("name") not in (None, found["name"]):
        raise CheckpointError(f"decoder {asked['name']!r} was asked for, the file holds a {found['name']} decoder")
    if n_cls not in (None, arch["n_cls"]):
        raise CheckpointError(f"{n_cls} classes were asked for, the file holds a model of {arch['n_cls']} classes")
    return arch["n_cls"], {**asked, **found}


def _grids(
    state: State,
    arch: dict[str, Any],
    kind: str,
    grid: tuple[int, int] | None,
    source_size: Any,
    image_size: Any,
    patch_size: int | None,
    notes: list[str],
) -> tuple[tuple[int, int], tuple[int, int], int]:
    """(grid of the positions in `state`, grid asked for, patch size asked for), after checking all that is given.

    Positions of patches only, which some timm models have, get zeros for the class token in `state`.
    """
    old, new = arch["patch_size"], arch["patch_size"] if patch_size is None else patch_size
    if type(new) is not int or not 1 <= new <= MAX_PATCH_SIZE:
        raise CheckpointError(f"patch_size {new!r:.40} must be an integer from 1 to {MAX_PATCH_SIZE}")
    wanted = None if image_size is None else _cells("image_size", image_size, new)
    if wanted is not None and (wanted[0] * new, wanted[1] * new) != _pair(image_size):
        raise CheckpointError(f"image_size {image_size} must be a multiple of the patch size {new}")
    if grid is None and source_size is not None:
        grid = _cells("the image size in the configuration", source_size, old)
    elif grid is not None:
        grid = _cells("grid", grid, 1)
    positions, n_extra = state["encoder.pos_embed"], 1 + arch["distilled"]
    told = grid is not None
    grid, has_extra = _reading(positions.shape[1], n_extra, grid, wanted, patches_only=kind == "timm")
    if not has_extra:
        state["encoder.pos_embed"] = torch.cat([positions.new_zeros(1, n_extra, positions.shape[2]), positions], dim=1)
        notes.append("position embedding of patches only: zeros added for the class token")
    if not told and grid == wanted and _square(grid[0] * grid[1]) != grid:
        notes.append(f"position embedding read as the {grid[0]} x {grid[1]} patches of image_size")
    elif not told and grid != wanted:
        notes.append(f"position embedding taken for a square of {grid[0]} x {grid[1]} patches, nothing tells its grid")
    return grid, wanted or grid, new


def _reading(
    tokens: int, n_extra: int, told: tuple[int, int] | None, wanted: tuple[int, int] | None, patches_only: bool
) -> tuple[tuple[int, int], bool]:
    """(grid, whether there are positions for the class tokens too) of a position embedding of so many tokens.

    Args:
        told: the grid, from a source that knows it. wanted: the grid of the image size asked for, which is that of the
            file if it fits and no other reading is left.
        patches_only: the layout without positions for the class tokens occurs. It is never guessed.
    Raises:
        CheckpointError: no reading, or two.
    """
    n_patches = tokens - n_extra
    layouts = {n_patches: True, tokens: False} if patches_only else {n_patches: True}
    square = _square(n_patches)
    if told is not None:
        if told[0] * told[1] not in layouts:
            raise CheckpointError(f"the position embedding has {n_patches} patches, which is no {told} grid")
        return told, layouts[told[0] * told[1]]
    fits = wanted is not None and wanted[0] * wanted[1] in layouts
    if square and fits and wanted != square:
        raise CheckpointError(
            f"the position embedding has {n_patches} patches: either a square of {square}, to be resized to {wanted}, "
            f"or already the {wanted} grid of image_size; give its grid"
        )
    if square:
        return square, True
    if fits:
        return wanted, layouts[wanted[0] * wanted[1]]
    if patches_only and (other := _square(tokens)):
        raise CheckpointError(
            f"the position embedding has {tokens} tokens: either {n_patches} patches and {n_extra} of the class token, "
            f"which is no square, or a square of {other} patches without the class token; give its grid"
        )
    if wanted is None:
        raise CheckpointError(f"the position embedding has {n_patches} patches, no square; give its grid")
    raise CheckpointError(
        f"the position embedding has {n_patches} patches, neither a square nor the {wanted} grid of image_size; "
        "give its grid"
    )


def _resize(
    state: State,
    old: int,
    new: int,
    grid: tuple[int, int],
    wanted: tuple[int, int],
    config: ModelConfig,
    notes: list[str],
) -> None:
    """Brings the embeddings in `state` to the patch size and the grid asked for."""
    if new != old:
        state.update(change_patch_size(state, new))
        notes.insert(0, f"patch size {old} -> {new} by resampling the patch embedding (an extension; fine-tune it)")
    if wanted != grid:
        positions, mode = state["encoder.pos_embed"].float(), config.pos_embed_mode
        state["encoder.pos_embed"] = resize_pos_embed(positions, grid, wanted, 1 + config.distilled, mode)
        notes.insert(0, f"position embedding resized from {grid} to {wanted} patches ({mode})")


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, torch.Tensor) and not value.is_meta else value


def _pair(value: Any) -> tuple[Any, Any] | None:
    pair = tuple(value) if isinstance(value, tuple | list) else (value, value)
    return pair if len(pair) == 2 else None


def _cells(name: str, size: Any, patch: int) -> tuple[int, int]:
    """How many whole patches `size`, one number or (height, width), holds in each direction."""
    pair = _pair(size)
    if pair is None or not all(isinstance(side, int) and patch <= side <= MAX_IMAGE_SIZE for side in pair):
        raise CheckpointError(
            f"{name} {size!r:.80} must be one integer or two, from {patch} (the patch size) to {MAX_IMAGE_SIZE}"
        )
    return pair[0] // patch, pair[1] // patch


def _square(n: int) -> tuple[int, int] | None:
    side = math.isqrt(max(n, 0))
    return (side, side) if side and side * side == n else None


def _check_width(d_model: int) -> None:
    if d_model % HEAD_DIM:
        raise CheckpointError(f"width {d_model} is no multiple of {HEAD_DIM}; give n_heads")
    if other := UNCERTAIN_WIDTHS.get(d_model):
        raise CheckpointError(
            f"width {d_model} may have {d_model // HEAD_DIM} heads of {HEAD_DIM} or, as published encoders of this "
            f"width, {d_model // other} of {other}; give n_heads"
        )


def n_blocks(state: Mapping[str, torch.Tensor], part: str) -> int:
    """Transformer layers that "encoder" or "decoder" has in a state dict of our names."""
    found = (re.match(rf"{part}\.blocks\.(\d{{1,4}})\.", str(name)) for name in state)
    return len({int(match[1]) for match in found if match})
