"""Exports: a file that turns uint8 images into labels, for programs that do not have this package.

The file holds everything from bytes to labels: normalisation, padding, network, upsampling, argmax. Batch, height and
width stay free. It is written beside its destination, loaded again, compared with the model at several sizes, and only
then put in place. Nothing of the `onnx` family and no compiler is imported before it is needed.
"""

import contextlib
import math
import os
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from segmenter.export.formats import FORMATS, LOADERS, OPSET, WRITERS, as_export_error, check_path, require
from segmenter.export.program import OUTPUTS, ExportError, Size, check_exportable, eager_twin, trace
from segmenter.files import directory_beside, flush, locked, remove_leftovers
from segmenter.inference.images import normalize
from segmenter.inference.precision import DTYPES
from segmenter.kernels.reference import label_dtype
from segmenter.model import Segmenter

__all__ = [
    "FORMATS",
    "OPSET",
    "OUTPUTS",
    "Agreement",
    "ExportError",
    "ExportReport",
    "check_file",
    "default_check_sizes",
    "export_model",
]

_TURN = 60  # seconds that two files wait to be put in place, while another process writes into the folder
TOLERANCE = 1e-4  # largest difference in float32, in units of the largest score: what the project promises everywhere


@dataclass
class Agreement:
    """How a written file compares with the model for one batch.

    Attributes:
        shape: (B, H, W) of the images.
        error: of logits and masks the largest difference; of labels the largest shortfall, which is how far the
            model's score of the file's label lies below the model's best score at that pixel. In units of the model's
            largest score.
        limit: what `error` may be.
        same: fraction of pixels (of masks: cells) with the model's label. seen: number of different labels there.
    """

    shape: tuple[int, int, int]
    error: float
    limit: float
    same: float
    seen: int


@dataclass
class ExportReport:
    """What `export_model` wrote; str() of it is for people.

    Attributes:
        path, format, output: as asked for. files: names of what was written, `path` first. size_mb: of all, in 10^6
            bytes. seconds: for everything. dtype: of the network. device: what the file runs on.
        inputs, outputs: name -> shape and dtype. dynamic: what is free and within which limits.
        agreement: one entry a batch that was compared.
    """

    path: str
    format: str
    output: str
    files: list[str]
    size_mb: float
    seconds: float
    dtype: str
    device: str
    inputs: dict[str, str]
    outputs: dict[str, str]
    dynamic: str
    agreement: list[Agreement]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.format}, {self.size_mb:.1f} MB, {self.dtype}, {self.device}"]
        if len(self.files) > 1:
            lines.append(f"  files    {', '.join(self.files)} (keep them together)")
        lines += [f"  input    {name} {text}" for name, text in self.inputs.items()]
        lines += [f"  output   {name} {text}" for name, text in self.outputs.items()]
        lines.append(f"  dynamic  {self.dynamic}")
        what = "shortfall" if self.output == "labels" else "error"
        for row in self.agreement:
            B, H, W = row.shape
            lines.append(
                f"  checked  {B} x {H}x{W}: {100 * row.same:.3f} % of labels equal ({row.seen} classes seen), "
                f"largest {what} {row.error:.1e}, allowed {row.limit:.0e}"
            )
        return "\n".join(lines)


def export_model(
    model: Segmenter,
    path: str | os.PathLike,
    format: str,
    *,
    output: str = "labels",
    dtype: str | torch.dtype | None = None,
    check_sizes: Sequence[Size] | None = None,
    progress: Callable[[str], None] | None = None,
) -> ExportReport:
    """Writes a model, from uint8 pixels to labels, to one file, and checks that the file computes the same.

    What goes in and comes out: see `Pipeline`. Batch, height and width are free: see `trace`. The image is labelled
    whole, at its own size: there are no sliding windows, and an image smaller than a window is not enlarged. All
    (n_cls, H, W) scores of a batch may lie in memory at once.

    Args:
        model: a `Segmenter` in evaluation mode, of any implementation. It is not changed.
        path: the file to write, .pt2 or .onnx as the format needs. One that is there is replaced at the end.
        format: "torch" (torch.export, any device of PyTorch with the model's operators), "onnx" (opset OPSET; weights
            beyond 2 GB go to a second file, path + ".data") or "aoti" (machine code by AOTInductor for the device
            where the model is; needs a C++ compiler). An "aoti" file trusts its caller: pixels that are not uint8, not
            contiguous or not of 3 channels give wrong labels and no error, unless AOTI_RUNTIME_CHECK_INPUTS=1 is in
            the environment of the program that loads it.
        output: one of OUTPUTS.
        dtype: type of the network: "float32", "bfloat16", "float16", by default that of the model. Scores are float32.
        check_sizes: (H, W) to compare at, by default those of `default_check_sizes`. Batches of 1 and 2 take turns.
        progress: called with a line of text before each long step.
    Raises:
        TypeError, RuntimeError, ValueError: the model or an argument cannot be used; see `check_exportable`.
        ExportError: packages are missing, the export failed, or the file disagrees with the model; nothing is written.
        OSError: the file cannot be written.
    """
    began, say = time.perf_counter(), progress or (lambda text: None)
    path = check_path(path, format)
    check_exportable(model)
    parameter = next(model.parameters())
    dtype = _resolve(format, output, parameter.dtype if dtype is None else dtype)
    sizes = default_check_sizes(model) if check_sizes is None else [(int(h), int(w)) for h, w in check_sizes]
    _check_sizes(sizes, model.patch_size)
    require(format)
    say(f"tracing the model for {format}")
    with as_export_error("the model cannot be traced"):
        program = trace(model, output, dtype)
    remove_leftovers(path.parent)
    with directory_beside(path) as directory:
        new = directory / path.name
        say("compiling, which takes minutes" if format == "aoti" else "writing")
        with as_export_error(f"the model could not be written as {format}"):
            WRITERS[format](program, new, output)
        say(f"comparing the file with the model at {', '.join(f'{h}x{w}' for h, w in sizes)}")
        agreement = check_file(new, format, model, output, dtype, sizes)
        files = [new, *sorted(file for file in directory.iterdir() if file != new)]
        size_mb = sum(file.stat().st_size for file in files) / 1e6
        _move(files, path)
    inputs, outputs = _described(model, output)
    least = model.patch_size + 1
    dynamic = f"batch >= 1, height >= {least}, width >= {least}, no multiple needed"
    device = "any device with an ONNX runtime" if format == "onnx" else str(parameter.device)
    seconds = time.perf_counter() - began
    names = [file.name for file in files]
    kind = str(dtype).removeprefix("torch.")
    return ExportReport(
        str(path), format, output, names, size_mb, seconds, kind, device, inputs, outputs, dynamic, agreement
    )


def default_check_sizes(model: Segmenter) -> list[Size]:
    """(H, W) to compare at: the window; one that is neither square nor a multiple of the patch; and, if there is one,
    one with as many tokens as the position embedding in another grid, which pos_embed_check is about."""
    P, side = model.patch_size, max(model.info.window_size, 2 * model.patch_size)
    odd = [max(n + 1 if n % P == 0 else n, P + 1) for n in (3 * side // 4, side + P // 2)]
    gh, gw = model.encoder.patch_embed.grid_size
    same = [(gh // 2 * P, gw * 2 * P)] if gh % 2 == 0 and gh > 2 else []
    return [(side, side), (odd[0], odd[1]), *same]


def check_file(
    path: str | os.PathLike,
    format: str,
    model: Segmenter,
    output: str,
    dtype: torch.dtype,
    sizes: Sequence[Size],
) -> list[Agreement]:
    """Loads a written file and compares it with the model on seeded images, in batches of 1 and 2 by turns.

    The model's side shares nothing with the file's: images pass `segmenter.inference.images.normalize` and
    `Segmenter.masks`, in the implementation that the model has, in float32 (a model in a half type is copied to it). A
    file in float32 may be off by TOLERANCE; one in a half type by twice what eager PyTorch loses in that type.

    Args:
        path, format, output: of the file. dtype: of its network. sizes: (H, W).
    Raises:
        ExportError: it cannot be loaded or run, or it disagrees.
    """
    with as_export_error(f"the {format} file that was written cannot be loaded"):
        run = LOADERS[format](path, next(model.parameters()).device)
    full = model if next(model.parameters()).dtype == torch.float32 else eager_twin(model, torch.float32)
    rounded = None if dtype == torch.float32 else eager_twin(model, dtype)
    rows = []
    for i, (H, W) in enumerate(sizes):
        pixels = _images(1 + i % 2, H, W, seed=i)
        with _exact_products(), torch.inference_mode():
            with as_export_error(f"the {format} file that was written fails at {H}x{W}"):
                got = run(pixels).cpu()
            scores, limit = _scores(full, pixels, output), TOLERANCE
            if rounded is not None:
                # what eager PyTorch loses in this type; adding up in another order may lose as much again
                lost = (_scores(rounded, pixels, output) - scores).abs().max() / scores.abs().max()
                limit = max(2 * lost.item(), 4 * torch.finfo(dtype).eps)
            if not (scores.isfinite().all() and math.isfinite(limit)):  # a limit without end would allow anything
                raise ExportError("the model's scores are not finite; in float16 try bfloat16 or float32")
            rows.append(_compare(got, scores, output, limit, (1 + i % 2, H, W)))
    if output == "labels" and max(row.seen for row in rows) == 1:
        text = "the model gives all of the check's images one label, so that they agree says little; check the logits"
        warnings.warn(text, stacklevel=3)
    return rows


def _scores(model: Segmenter, pixels: torch.Tensor, output: str) -> torch.Tensor:
    """What "masks", else "logits", should be: float32 on the CPU."""
    parameter = next(model.parameters())
    im = torch.stack([normalize(image.numpy(), model.info.normalization) for image in pixels])
    scores = model.masks(im.to(parameter.device, parameter.dtype)).float().cpu()
    if output == "masks":
        return scores
    size = [n * model.patch_size for n in scores.shape[2:]]
    scores = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    return scores[..., : pixels.shape[1], : pixels.shape[2]]


def _compare(
    got: torch.Tensor, scores: torch.Tensor, output: str, limit: float, batch: tuple[int, int, int]
) -> Agreement:
    name = f"{batch[0]} x {batch[1]}x{batch[2]}"
    shape = scores[:, 0].shape if output == "labels" else scores.shape
    dtype = label_dtype(scores.shape[1]) if output == "labels" else torch.float32
    if got.shape != shape or got.dtype != dtype:
        wanted = f"{tuple(shape)} {dtype}"
        raise ExportError(f"the file disagrees with the model at {name}: {tuple(got.shape)} {got.dtype}, not {wanted}")
    largest, best = scores.abs().max().item() or 1.0, scores.argmax(1)
    labels = got.long() if output == "labels" else got.argmax(1)
    if output == "labels" and not 0 <= int(labels.min()) <= int(labels.max()) < scores.shape[1]:
        raise ExportError(f"the file disagrees with the model at {name}: label {int(labels.max())}")
    if output == "labels":
        error = (scores.amax(1) - scores.gather(1, labels[:, None])[:, 0]).max().item() / largest
        limit = 2 * limit  # both classes may be off
    else:
        error = (got - scores).abs().max().item() / largest
    same = (labels == best).double().mean().item()
    if not error <= limit:  # also true for NaN
        what = "shortfall of a label's score" if output == "labels" else "error"
        raise ExportError(
            f"the file disagrees with the model at {name}: {what} {error:.1e} of the largest score, allowed "
            f"{limit:.1e}; {100 * same:.2f} % of labels equal"
        )
    return Agreement(batch, error, limit, same, len(best.unique()))


def _images(B: int, H: int, W: int, seed: int) -> torch.Tensor:
    """Smooth seeded images with a little noise, (B, H, W, 3) uint8."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(B, 3, 6, 8, generator=generator)
    smooth = F.interpolate(coarse, (H, W), mode="bicubic", align_corners=False)
    noisy = 255 * smooth + 4 * torch.randn(B, 3, H, W, generator=generator)
    return noisy.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    """Float32 products in float32 on a GPU too: TF32 on one side only would look like a difference."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


def _resolve(format: str, output: str, dtype: str | torch.dtype) -> torch.dtype:
    """The type of the network. ValueError if output or type is unknown, or nothing for this format."""
    if output not in OUTPUTS:
        raise ValueError(f"output={output!r} is unknown; choose one of {', '.join(OUTPUTS)}")
    dtype = DTYPES.get(dtype, dtype)
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of {', '.join(DTYPES)}")
    if format == "onnx" and dtype == torch.bfloat16:
        raise ValueError("onnxruntime has no bfloat16 on the CPU, so the file could not be checked; choose float16")
    return dtype


def _check_sizes(sizes: Sequence[Size], patch_size: int) -> None:
    if len(sizes) < 2:
        raise ValueError("give at least two sizes to check: one alone does not show that sizes are free")
    for H, W in sizes:
        if min(H, W) <= patch_size:
            raise ValueError(f"{H}x{W}: height and width have to be more than a patch, {patch_size}")


def _move(files: Sequence[Path], path: Path) -> None:
    """Puts files in place, the one called like `path` last. A reader never sees the new one with old weights."""
    for file in files:
        flush(file)
    several = len(files) > 1
    with locked(path.parent, wait=_TURN) if several else contextlib.nullcontext():
        if several:
            path.unlink(missing_ok=True)
        for file in reversed(files):
            os.replace(file, path.parent / file.name)
    flush(path.parent)


def _described(model: Segmenter, output: str) -> tuple[dict[str, str], dict[str, str]]:
    """(inputs, outputs) in words."""
    K, P = model.n_cls, model.patch_size
    outputs = {
        "labels": f"(batch, height, width) {str(label_dtype(K)).removeprefix('torch.')}",
        "logits": f"(batch, {K}, height, width) float32",
        "masks": f"(batch, {K}, ceil(height/{P}), ceil(width/{P})) float32",
    }
    return {"pixels": "(batch, height, width, 3) uint8, RGB"}, {output: outputs[output]}
