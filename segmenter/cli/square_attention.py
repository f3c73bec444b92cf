"""The published way of `segmenter attention --square`: maps of the top left square, a head at a time and as a grid."""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from segmenter.cli.errors import CommandError
from segmenter.cli.loading import choose_classes
from segmenter.files import writing_into
from segmenter.inference.images import normalize
from segmenter.model import Segmenter
from segmenter.visualize import attention_grid, enlarge, heat_colors, mark_patch, save_png


def write_square(args: argparse.Namespace, model: Segmenter, pixels: np.ndarray, device: torch.device) -> int:
    """Writes all pictures. Returns how many maps are in them."""
    layers, heads = _layers(args, model), _heads(args, model)
    P = model.patch_size
    pixels = square_input(pixels, min(model.encoder.patch_embed.image_size), P)
    queries = _queries(args, model, pixels.shape[0] // P)
    im = normalize(pixels, model.info.normalization)[None].to(device)
    if args.patch:
        pixels = mark_patch(pixels, *args.patch, P)

    output = Path(args.output)
    with writing_into(output):
        save_png(pixels, output / "input.png")
        for layer in layers:
            maps = attention_maps(model, im, args.part, layer)
            for name, query in queries.items():
                directory = output / f"{args.part[:3]}_layer{layer}" / name
                with writing_into(directory):
                    _write_maps(directory, maps[:, query].cpu().numpy(), heads, pixels, P)
    return len(layers) * len(queries) * len(heads)


def square_input(pixels: np.ndarray, image_size: int, patch_size: int) -> np.ndarray:
    """The top left square of an image, resized from its short side to `image_size`, then cut to whole patches."""
    short = min(pixels.shape[:2])
    size = (image_size, image_size)  # the kept square alone: all of a long thin image could fill the memory
    square = Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR, box=(0, 0, short, short))
    side = image_size - image_size % patch_size
    return np.array(square)[:side, :side]


def attention_maps(model: Segmenter, im: torch.Tensor, part: str, layer: int) -> torch.Tensor:
    """Attention to the patches, in images: (heads, queries, gh, gw).

    Queries are those of the model: in the encoder CLS, DIST if distilled, then the patches; in the decoder the
    patches, then the classes.
    """
    n_patches = (im.shape[-2] // model.patch_size) * (im.shape[-1] // model.patch_size)
    with torch.inference_mode():
        if part == "encoder":
            attention = model.get_attention_map_enc(im, layer)[0, :, :, -n_patches:]
        else:
            attention = model.get_attention_map_dec(im, layer)[0, :, :, :n_patches]
    return attention.unflatten(2, (im.shape[-2] // model.patch_size, im.shape[-1] // model.patch_size)).float()


def _write_maps(directory: Path, maps: np.ndarray, heads: list[int], pixels: np.ndarray, patch_size: int) -> None:
    tiles = [("input", pixels)]
    for head in heads:
        tile = enlarge(heat_colors(maps[head]), patch_size)
        save_png(tile, directory / f"head{head}.png")
        tiles.append((f"head {head}   max {maps[head].max():.2g}", tile))
    save_png(attention_grid(tiles), directory / "grid.png")


def _layers(args: argparse.Namespace, model: Segmenter) -> list[int]:
    blocks = getattr(getattr(model, args.part), "blocks", None)
    if not blocks:
        raise CommandError("the linear decoder has no attention; use --part encoder")
    return chosen("--layer", args.layer, len(blocks))


def _heads(args: argparse.Namespace, model: Segmenter) -> list[int]:
    return chosen("--head", args.head, getattr(model, args.part).blocks[0].attn.heads)


def chosen(name: str, value: tuple[int, ...] | str | None, n: int) -> list[int]:
    """The layers or heads that an option says, all n if "all" or nothing. Raises CommandError beyond."""
    if value is None or isinstance(value, str):
        return list(range(n))
    for number in value:
        if number >= n:
            raise CommandError(f"{name} {number} is out of range: this model has 0..{n - 1}")
    return list(value)


def _queries(args: argparse.Namespace, model: Segmenter, grid: int) -> dict[str, int]:
    """Folder name -> index of the query in `attention_maps`."""
    if args.patch:
        x, y = args.patch
        if x >= grid or y >= grid:
            raise CommandError(f"--patch {x} {y} is out of range: the image has {grid} x {grid} patches, from 0")
        first = model.encoder.n_extra_tokens if args.part == "encoder" else 0
        return {f"patch_{x}_{y}": first + grid * y + x}
    if args.part == "encoder":
        if args.cls != "all":
            raise CommandError(f"the encoder knows no classes: --cls alone, or --part decoder --cls {args.cls}")
        if not hasattr(model.encoder, "cls_token"):
            raise CommandError("this model's encoder has no class token: give --patch, or --part decoder")
        return {"cls": 0}
    wanted = range(model.n_cls) if args.cls == "all" else [_class_id(args.cls, model)]
    return {f"cls_{c}": grid * grid + c for c in wanted}


def _class_id(text: str, model: Segmenter) -> int:
    names = [name.casefold() for name in choose_classes(None, model).names]
    if text.casefold() in names:
        return names.index(text.casefold())
    if text.isdecimal() and int(text) < model.n_cls:
        return int(text)
    raise CommandError(f"--cls {text}: no class of this model; give an id in 0..{model.n_cls - 1} or a name")
