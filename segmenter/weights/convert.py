"""Weights of any kind -> our names and the configuration that they need, at the image and patch size asked for."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from segmenter.config import MAX_IMAGE_SIZE, MAX_PATCH_SIZE, ConfigError, ModelConfig
from segmenter.layers import resize_pos_embed
from segmenter.weights.live import compare, describe, is_rotary, unwrapped
from segmenter.weights.names import DEFAULTS, to_ours
from segmenter.weights.read import CheckpointError, listing
from segmenter.weights.recognise import (
    Recognised,
    State,
    architecture,
    check_plain,
    extra_tokens,
    feature,
    recognise,
    refuse,
    square,
)
from segmenter.weights.settings import normalization_of

HEAD_DIM = 64
_ROTARY_GRID = 16  # of DINOv3, if nothing tells another: it was trained on images of 256 pixels
# Width -> size of the heads in published encoders of it (so400m, ViT-Huge, -giant, -gigantic); no shape tells.
_UNCERTAIN_WIDTHS = {1152: 72, 1280: 80, 1408: 88, 1664: 104}


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
    statistics: tuple[Any, Any] | None = None,
    **fields: Any,
) -> Recognised:
    """Weights of any kind -> our names and the configuration that they need.

    Args:
        weights: a state dict, or a live model of timm or transformers, which is run once to compare. Not changed.
        kind: one of KINDS; None recognises it.
        n_cls, decoder: of the decoder to put on files that hold an encoder only; a whole model must agree with them.
            decoder: "mask_transformer" (the default), "linear", or a mapping as in variant.yml.
        image_size: pixels, one number or (height, width), to resize the position embedding to; None keeps that of the
            file. If nothing else tells the grid of the file and it can be no square, it is that of image_size.
        patch_size: resamples the patch embedding to another patch, an extension: the published models were never made
            this way. Fine-tuning afterwards is advised, above all from 16 to 8.
        grid: (rows, columns) of the position embedding in the file, over everything else that tells it.
        source_size: pixels that what lies beside the file (config.json) says its position embedding is for. If neither
            this nor a live model nor `grid` tells the grid, it is taken for square, which is then noted.
        statistics: (mean, standard deviation or None) of the input's channels, as what lies beside the file says.
        fields: of ModelConfig, over what the kind implies: normalization ("vit", or "deit" for distilled models and
            those since DeiT-III), norm_eps, pos_embed, pos_embed_mode, n_heads (width / 64), dropout, drop_path_rate.
            None counts as not given.
    Raises:
        CheckpointError: unknown names, features that our encoder has not, statistics of no known name, or arguments
            that contradict the file.
    """
    if unknown := [name for name in fields if name not in {f.name for f in dataclasses.fields(ModelConfig)}]:
        raise ConfigError(f"argument {listing(unknown)} is unknown")
    live = unwrapped(weights) if isinstance(weights, nn.Module) else None
    if live is not None:
        weights = {name: _on_cpu(tensor) for name, tensor in live.state_dict().items()}
    weights = {str(name): tensor for name, tensor in weights.items()}
    odd, found = feature(weights, is_rotary(live, fields)), {}
    if live is not None:
        found = describe(live, odd)
        source_size, live_grid = found.pop("source_size", source_size), found.pop("grid", None)
        statistics = found.pop("statistics", statistics)
        if None not in (grid, live_grid) and tuple(grid) != live_grid:
            raise CheckpointError(f"grid {tuple(grid)} was given, the live model's is {live_grid}")
        grid = live_grid or grid
    check_plain(weights)
    kind = recognise(weights, kind)
    if odd:
        raise refuse(f"these {kind} weights have", odd)
    state, implied, notes = to_ours(weights, kind, "rotary" in (found.get("pos_embed"), fields.get("pos_embed")))
    fields = {name: value for name, value in fields.items() if value is not None}
    if statistics is not None and "normalization" not in fields:
        found["normalization"] = normalization_of(*statistics)
    found = {**DEFAULTS[kind], **implied, **found, **fields}
    arch = architecture(state, found.get("pos_embed") == "rotary")
    if not arch["class_token"] and found.get("class_token", True):
        raise CheckpointError(f"these {kind} weights lack cls_token (a class token)")
    found.setdefault("final_norm", True)  # a norm that is missing by mistake is found missing
    has_decoder = "decoder" in arch
    n_cls, decoder = _decoder(arch, n_cls, decoder)
    found["pos_embed"] = found.get("pos_embed") or (None if kind == "timm" else "all")
    sizes = (grid, source_size, image_size, patch_size)
    grid, wanted, patch_size, found["pos_embed"] = _grids(state, arch, found["pos_embed"], *sizes, notes)
    _complete(found, arch, kind)
    size = {"patch_size": patch_size, "image_size": (wanted[0] * patch_size, wanted[1] * patch_size)}
    try:
        config = ModelConfig.from_dict({**arch, **found, **size, "n_cls": n_cls, "decoder": decoder})
    except ConfigError as error:
        raise CheckpointError(f"these {kind} weights do not make a Segmenter: {error}") from error
    difference = None
    if live is not None and not isinstance(getattr(live, "config", None), ModelConfig):
        old = {"patch_size": arch["patch_size"], "image_size": tuple(side * arch["patch_size"] for side in grid)}
        difference = compare(live, kind, state, dataclasses.replace(config, **old))
    _resize(state, arch["patch_size"], grid, config, notes)
    return Recognised(state, config, kind, has_decoder, notes, difference)


def _complete(found: dict[str, Any], arch: dict[str, Any], kind: str) -> None:
    """Adds to the fields that were found what nothing told."""
    if "n_heads" not in found:
        _check_width(arch["d_model"])
    found.setdefault("n_heads", arch["d_model"] // HEAD_DIM)
    found.setdefault("normalization", "deit" if arch["distilled"] else "vit")
    found.setdefault("backbone", f"vit_{kind}")


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
    if asked.get("batch_norm") and not found.get("batch_norm"):
        raise CheckpointError("a linear decoder with batch norm was asked for, the file holds one without")
    if n_cls not in (None, arch["n_cls"]):
        raise CheckpointError(f"{n_cls} classes were asked for, the file holds a model of {arch['n_cls']} classes")
    return arch["n_cls"], {**asked, **found}


def _grids(
    state: State,
    arch: dict[str, Any],
    having: str | None,
    grid: tuple[int, int] | None,
    source_size: Any,
    image_size: Any,
    patch_size: int | None,
    notes: list[str],
) -> tuple[tuple[int, int], tuple[int, int], int, str]:
    """(grid of the positions in `state`, grid asked for, patch size asked for, which tokens have positions), after
    checking all that is given.

    having: which tokens have positions, "all" or "patches"; None: nothing tells, both occur.
    """
    old, new = arch["patch_size"], arch["patch_size"] if patch_size is None else patch_size
    if type(new) is not int or not 1 <= new <= MAX_PATCH_SIZE:
        raise CheckpointError(f"patch_size {new!r:.40} must be an integer from 1 to {MAX_PATCH_SIZE}")
    wanted = None if image_size is None else _cells("image_size", image_size, new)
    if wanted is not None and (wanted[0] * new, wanted[1] * new) != _pair(image_size):
        nearest = " or ".join(str(n * new) for n in (wanted[0], wanted[0] + 1))
        raise CheckpointError(
            f"image_size {image_size} must be a multiple of the patch size {new}, such as {nearest} "
            "(in training it is crop_size)"
        )
    if grid is None and source_size is not None:
        grid = _cells("the image size in the configuration", source_size, old)
    elif grid is not None:
        grid = _cells("grid", grid, 1)
    if having == "rotary":  # any grid: that of the images it was trained on is told by what lies beside it
        return (grid := grid or wanted or (_ROTARY_GRID, _ROTARY_GRID)), wanted or grid, new, having
    told = grid is not None
    n_extra = sum(extra_tokens(state).values())
    grid, having = _reading(state["encoder.pos_embed"].shape[1], n_extra, grid, wanted, having)
    if not told and grid == wanted and square(grid[0] * grid[1]) != grid:
        notes.append(f"position embedding read as the {grid[0]} x {grid[1]} patches of image_size")
    elif not told and grid != wanted:
        notes.append(f"position embedding taken for a square of {grid[0]} x {grid[1]} patches, nothing tells its grid")
    return grid, wanted or grid, new, having


def _reading(
    tokens: int, n_extra: int, told: tuple[int, int] | None, wanted: tuple[int, int] | None, having: str | None
) -> tuple[tuple[int, int], str]:
    """(grid, which tokens have positions) of a position embedding of so many tokens.

    Args:
        told: the grid, from a source that knows it. wanted: the grid of the image size asked for, which is that of the
            file if it fits and no other reading is left.
        having: which tokens have positions. That it is patches alone is never guessed.
    Raises:
        CheckpointError: no reading, or two.
    """
    if having == "patches":
        n_extra = 0
    n_patches, either = tokens - n_extra, having is None and n_extra > 0
    layouts = {n_patches: having or "all"} | ({tokens: "patches"} if either else {})
    as_square = square(n_patches)
    if told is not None:
        if told[0] * told[1] not in layouts:
            raise CheckpointError(f"the position embedding has {n_patches} patches, which is no {told} grid")
        return told, layouts[told[0] * told[1]]
    fits = wanted is not None and wanted[0] * wanted[1] in layouts
    if as_square and fits and wanted != as_square:
        raise CheckpointError(
            f"the position embedding has {n_patches} patches: either a square of {as_square}, to be resized to "
            f"{wanted}, or already the {wanted} grid of image_size; give its grid"
        )
    if as_square:
        return as_square, layouts[n_patches]
    if fits:
        return wanted, layouts[wanted[0] * wanted[1]]
    if either and (other := square(tokens)):
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


def _resize(state: State, old: int, grid: tuple[int, int], config: ModelConfig, notes: list[str]) -> None:
    """Brings the embeddings in `state`, of patch size `old` and for `grid`, to those of `config`."""
    new, (height, width) = config.patch_size, config.image_size
    wanted = (height // new, width // new)
    if new != old:
        name = "encoder.patch_embed.proj.weight"
        state[name] = _resampled(state[name].float(), new)
        notes.insert(0, f"patch size {old} -> {new} by resampling the patch embedding (an extension; fine-tune it)")
    if wanted != grid and config.pos_embed != "rotary":
        positions, mode = state["encoder.pos_embed"].float(), config.pos_embed_mode
        n_extra = positions.shape[1] - grid[0] * grid[1]
        state["encoder.pos_embed"] = resize_pos_embed(positions, grid, wanted, n_extra, mode)
        notes.insert(0, f"position embedding resized from {grid} to {wanted} patches ({mode})")


def _resampled(weight: torch.Tensor, patch_size: int) -> torch.Tensor:
    """A patch embedding (d, 3, P, P) for another patch size, with the same answers on smooth images.

    By the pseudo-inverse of the resize (FlexiViT).
    """
    try:  # a broken torchvision makes timm raise other things than ImportError
        from timm.layers import resample_patch_embed
    except Exception as error:
        raise CheckpointError(
            f"changing the patch size needs timm (pip install timm), which cannot be imported ({error})"
        ) from error
    return resample_patch_embed(weight, [patch_size, patch_size])


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


def _check_width(d_model: int) -> None:
    if d_model % HEAD_DIM:
        raise CheckpointError(f"width {d_model} is no multiple of {HEAD_DIM}; give n_heads")
    if other := _UNCERTAIN_WIDTHS.get(d_model):
        raise CheckpointError(
            f"width {d_model} may have {d_model // HEAD_DIM} heads of {HEAD_DIM} or, as published encoders of this "
            f"width, {d_model // other} of {other}; give n_heads"
        )
