"""`segmenter attention`: where tokens attend to, drawn over the whole image, and as numbers."""

import argparse
import dataclasses
import re
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from segmenter.analysis.maps import AttentionMaps, attention, point_name
from segmenter.analysis.subject import AnalysisError
from segmenter.cli.errors import DEVICE, OK, SOME_FAILED, CommandError
from segmenter.cli.loading import choose_device, errors_of_loading, load, loading_options, warn_unless_trained
from segmenter.cli.output import out
from segmenter.cli.square_attention import chosen, write_square
from segmenter.errors import is_out_of_memory
from segmenter.files import write_atomically, writing_into
from segmenter.inference.images import ImageError, read_image
from segmenter.inference.segment import window_of
from segmenter.inference.windows import window_anchors
from segmenter.model import Segmenter
from segmenter.visualize import attention_grid, frame_patch, heat_map, save_png, shrunk, with_color_bar
from segmenter.weights.load import load_any
from segmenter.weights.read import CheckpointError

_WHOLE = {  # options for whole images alone, with their defaults
    **dict.fromkeys(("point", "classes", "size", "window_size", "window_stride")),
    **dict.fromkeys(("rollout", "npz"), False),
    **{"view": "overlay", "alpha": 0.6, "dtype": "float32"},
}
_TILE = 480  # pixels of the longer side of a picture in a grid


@dataclasses.dataclass(frozen=True)
class Look:
    """What one query attends to.

    Attributes:
        maps: with those of other queries. number: of this one in them. name: in pixels of the whole image.
        window: (left, top) of the window that it was looked at in; None: the whole image.
    """

    maps: AttentionMaps
    number: int
    name: str
    window: tuple[int, int] | None

    @property
    def file_name(self) -> str:
        return re.sub(r"[^\w.+-]+", "_", self.name.strip())

    def framed(self, image: np.ndarray) -> np.ndarray:
        """An image with the query's patch framed, if it is one."""
        patch = self.maps.patches[self.number]
        return image if patch is None else frame_patch(image, *patch, self.maps.patch_size)


def run(args: argparse.Namespace) -> int:
    _check(args)
    try:
        pixels = read_image(args.image)
    except ImageError as error:
        raise CommandError(str(error), SOME_FAILED) from error
    device = choose_device(args.device)
    model = _load(args, device)
    count = write_square(args, model, pixels, device) if args.square else _write(args, _looks(args, model, pixels))
    out(f"attention maps: {count} -> {args.output}")
    return OK


def _check(args: argparse.Namespace) -> None:
    """Raises CommandError for options that do not go together."""
    if args.square:
        if not (args.cls or args.patch):
            raise CommandError("--square: one of the arguments --cls --patch is required")
        given = [name for name, default in _WHOLE.items() if getattr(args, name) != default]
        if given or args.head == "mean":
            option = f"--{given[0].replace('classes', 'class').replace('_', '-')}" if given else "--head mean"
            raise CommandError(f"{option} is for whole images; leave it or --square away")
        return
    if args.patch:
        raise CommandError("--patch counts the patches of --square; in a whole image say --point X Y, in pixels")
    if args.cls not in (None, "all"):
        if args.part == "encoder":
            raise CommandError(f"the encoder knows no classes: --class {args.cls} looks from the patches of a class")
        args.classes = [*(args.classes or []), args.cls]
    elif args.cls and (args.point or args.classes):
        raise CommandError("--cls looks from class tokens alone; leave it or --point and --class away")
    if (args.window_size or args.window_stride) and (not args.point or args.classes):
        raise CommandError("--window-size looks within the window around a point: give it with --point alone")
    if args.size and (args.window_size or args.window_stride):
        raise CommandError("--size is for whole images; leave it or --window-size away")
    if args.rollout and args.head not in (None, "mean"):
        raise CommandError("a rollout is of the mean over heads; leave --head away")


def _load(args: argparse.Namespace, device: torch.device) -> Segmenter:
    """The model. An encoder that has no decoder, which the attention of an encoder does not need, gets some."""
    if args.part == "decoder" or args.classes or args.n_cls:
        return load(args, device)
    with errors_of_loading():
        try:
            model = load_any(args.model, impl=args.impl, device=device, **loading_options(args))
        except CheckpointError as error:
            if "give n_cls" not in str(error):
                raise
            options = {**loading_options(args), "n_cls": 1, "decoder": "linear"}
            return load_any(args.model, impl=args.impl, device=device, **options)
    warn_unless_trained(model.info.weights)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# Looking


def _looks(args: argparse.Namespace, model: Segmenter, pixels: np.ndarray) -> list[Look]:
    blocks = getattr(getattr(model, args.part), "blocks", None)
    if not blocks:
        raise CommandError("the linear decoder has no attention; use --part encoder")
    layers = chosen("--layer", args.layer, len(blocks))
    if args.rollout and args.layer is None:
        layers = layers[-1:]
    n_layers = max(layers) + 1 if args.rollout else len(layers)
    options = {"part": args.part, "layers": layers, "rollout": args.rollout, "size": args.size, "dtype": args.dtype}
    parts = _windows(args, model, pixels) if args.window_size or args.window_stride else [(None, pixels, args.point)]
    looks = []
    with tqdm(total=n_layers * len(parts), unit="layer", file=sys.stderr, disable=None) as bar:
        options["progress"] = lambda layer: bar.update()
        for window, part, points in parts:
            try:
                maps = attention(model, part, points=points, classes=args.classes, **options)
            except AnalysisError as error:
                raise CommandError(str(error)) from error
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                text = "not enough memory; use a smaller --size or --window-size, --dtype, or --device cpu"
                raise CommandError(text, DEVICE) from error
            names = maps.queries if window is None else [point_name(*args.point[len(looks)])]
            looks += [Look(maps, number, name, window) for number, name in enumerate(names)]
    return list({look.name: look for look in looks}.values())  # what was asked for twice is drawn once


def _windows(args: argparse.Namespace, model: Segmenter, pixels: np.ndarray) -> list[tuple]:
    """For each point ((left, top), the window around it, [the point in it])."""
    size, stride = window_of(model, args.window_size, args.window_stride)
    found = []
    for point in args.point:
        corner = []
        for length, at in zip(pixels.shape[1::-1], point, strict=True):
            if not 0 <= at < length:
                height, width = pixels.shape[:2]
                raise CommandError(f"{point_name(*point)} is outside the image of {width} x {height} pixels")
            try:
                anchors = window_anchors(length, size, stride)
            except ValueError as error:
                raise CommandError(f"{error}; use another --window-size or --window-stride") from error
            corner.append(min(anchors, key=lambda start: abs(start + size / 2 - at)))
        left, top = corner
        inside = (point[0] - left, point[1] - top)
        found.append(((left, top), pixels[top : top + size, left : left + size], [inside]))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def _write(args: argparse.Namespace, looks: list[Look]) -> int:
    """Writes all pictures, and the numbers if asked for. Returns how many maps."""
    output, count, seen = Path(args.output), 0, looks[0].maps.pixels
    heads = [] if args.head in (None, "mean") else chosen("--head", args.head, looks[0].maps.maps.shape[2])
    with writing_into(output):
        if looks[0].window is None:
            for look in looks:
                seen = look.framed(seen)
            save_png(seen, output / "input.png")
        for look in looks:
            for layer, values in zip(look.maps.layers, look.maps.maps[:, look.number].numpy(), strict=True):
                part = look.maps.part[:3]
                folder = output / (
                    f"{part}_rollout{layer}" if args.rollout else f"{part}_layer{layer}/{look.file_name}"
                )
                with writing_into(folder):
                    if args.rollout:
                        save_png(_picture(args, look, values[0]), folder / f"{look.file_name}.png")
                    else:
                        _write_heads(args, look, folder, values, heads)
                count += max(1, len(heads))
        if args.npz:
            _write_numbers(output / "attention.npz", looks)
    return count


def _write_heads(args: argparse.Namespace, look: Look, folder: Path, values: np.ndarray, heads: list[int]) -> None:
    """The mean of all heads, or each of `heads` and a grid of them; values: (heads, rows, columns)."""
    if not heads:
        save_png(_picture(args, look, values.mean(0)), folder / "mean.png")
        return
    tiles = [("image", shrunk(look.framed(look.maps.pixels), _TILE))]
    for head in heads:
        save_png(_picture(args, look, values[head]), folder / f"head{head}.png")
        text = f"head {head}   max {values[head].max():.2g}"
        tiles.append((text, shrunk(_colors(args, look, values[head]), _TILE)))
    save_png(attention_grid(tiles), folder / "grid.png")


def _colors(args: argparse.Namespace, look: Look, values: np.ndarray) -> np.ndarray:
    heat = args.view == "heat"
    alpha = 1.0 if heat else args.alpha
    return look.framed(heat_map(values, look.maps.patch_size, look.maps.pixels, alpha, smooth=not heat))


def _picture(args: argparse.Namespace, look: Look, values: np.ndarray) -> np.ndarray:
    return with_color_bar(_colors(args, look, values), float(values.max()), "share")


def _write_numbers(path: Path, looks: list[Look]) -> None:
    """An .npz: maps and others as of `AttentionMaps`, and what they are of."""
    first = looks[0].maps
    arrays = {
        "maps": np.stack([look.maps.maps[:, look.number].numpy() for look in looks], 1),
        "others": np.stack([look.maps.others[:, look.number].numpy() for look in looks], 1),
        "layers": np.array(first.layers),
        "queries": np.array([look.name for look in looks]),
        "patches": np.array([look.maps.patches[look.number] or (-1, -1) for look in looks]),  # row, column
        "windows": np.array([look.window or (0, 0) for look in looks]),  # left, top
        "patch_size": np.array(first.patch_size),
        "image_size": np.array(first.pixels.shape[:2]),  # height, width of the image, or of a window
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))
