"""From the published code to the fastest, one technique at a time: the headline figure's steps.

Each step keeps those before it, with one exception: torch.compile is a step of its own that our kernels then replace.
A technique that this machine does not have is left out, with the reason, and the steps after it do without it.
"""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from bench import timing
from bench.machine import ROOT
from bench.models import pixels_to_labels, set_operators
from bench.providers import PUBLISHED, Unavailable
from bench.published import published_inference
from bench.shapes import Shape
from segmenter.evaluation.metrics import ConfusionMatrix
from segmenter.inference.images import normalize, read_image
from segmenter.inference.precision import cpu_has_bfloat16
from segmenter.model import Segmenter
from segmenter.ops import EAGER, Operators, load_kernels, why_not_on

Labels = Callable[[np.ndarray], torch.Tensor]  # of one image
GPU_SHAPE, CPU_SHAPE = Shape("L", 16, 640, 8), Shape("S", 16, 512, 1)
EVERY = {"cuda": 5, "cpu": 20}  # every so many-th test image of CamVid counts for mIoU


class Step(NamedTuple):
    """A technique: its name in results, what it adds, and what that does."""

    name: str
    adds: str
    text: str


STEPS = (
    Step("fp32 eager", "", "the published order of work: score matrices, full-resolution logits, float32 without TF32"),
    Step("bf16", "half", "weights and activations in bfloat16"),
    Step("SDPA", "sdpa", "torch's scaled_dot_product_attention, no softmax on the logits"),
    Step("torch.compile", "compile", "max-autotune of all of it; the steps below do without"),
    Step("our attention", "attention", "our attention kernel, reading the packed qkv"),
    Step("LayerNorm-MLP", "mlp", "our kernels for LayerNorm with products, GELU and residuals"),
    Step("mask head", "mask_head", "our kernel from decoded tokens to class masks"),
    Step("labels without logits", "labels", "only classes that can win are upsampled; no full-resolution logits"),
    Step("bytes to tokens", "pixels", "our kernel from uint8 pixels to tokens; no normalised image"),
    Step("CUDA graph", "graph", "one launch for the whole model; labels as the step before"),
)
KERNELS = {
    "attention": ("attention",),
    "mlp": ("layernorm_linear", "linear", "layernorm_mlp"),
    "mask_head": ("mask_head",),
    "labels": ("windows_argmax",),
    "pixels": ("pixels_to_tokens",),
}


def why_not(adds: str, device: torch.device) -> str | None:
    """Why this machine does not have a technique, or None."""
    if adds == "half" and device.type == "cpu" and not cpu_has_bfloat16():
        return "this processor has no bfloat16 instructions; what follows stays in float32"
    if adds in KERNELS and adds != "labels":  # which there is in plain PyTorch too
        return "our kernels need a GPU" if device.type == "cpu" else why_not_on(device.type, device.index)
    return "CUDA graphs need a GPU" if adds == "graph" and device.type != "cuda" else None


def features(index: int, device: torch.device) -> frozenset[str]:
    """What is on at a step.

    Raises:
        Unavailable: this machine does not have what the step adds.
    """
    reason = why_not(STEPS[index].adds, device)
    if reason is not None:
        raise Unavailable(reason)
    on = {step.adds for step in STEPS[: index + 1] if why_not(step.adds, device) is None}
    return frozenset(on if STEPS[index].adds == "compile" else on - {"compile"})


def operators(on: frozenset[str]) -> Operators:
    """The operators of a step."""
    ops = EAGER if "sdpa" in on else PUBLISHED
    ours = on if "mask_head" in on else on - {"labels"}  # without a GPU labels are plain PyTorch's, as all the rest
    names = [name for technique, names in KERNELS.items() if technique in ours for name in names]
    return ops._replace(**{name: getattr(load_kernels(), name) for name in names}) if names else ops


def dtype_of(on: frozenset[str]) -> torch.dtype:
    """The type of weights and activations of a step."""
    return torch.bfloat16 if "half" in on else torch.float32


def labels_of(model: Segmenter, on: frozenset[str]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The step's way from pixels (B, H, W, 3) uint8 on the device to labels (B, H, W).

    Raises:
        Unavailable: it cannot be captured in a CUDA graph.
    """
    tail = "labels" if "labels" in on else "logits" if "sdpa" in on else "softmax"
    run = pixels_to_labels(model, operators(on), dtype_of(on), tail, "compile" in on, "pixels" in on)
    return _Graphed(run) if "graph" in on else run


class _Graphed:
    """`run` as a CUDA graph of the first input's shape; others are copied into its place."""

    def __init__(self, run: Callable[[torch.Tensor], torch.Tensor]):
        self.run, self.pixels, self.replay = run, None, None

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        if self.replay is None:
            self.pixels = pixels.clone()
            try:
                self.replay = timing.graphed(lambda: self.run(self.pixels))
            except RuntimeError as error:
                torch.cuda.synchronize()
                raise Unavailable(f"cannot be captured in a CUDA graph: {str(error).splitlines()[0]}") from None
        self.pixels.copy_(pixels)
        return self.replay()


# ---------------------------------------------------------------------------------------------------------------------
# What the steps do to a trained model's labels


def segment_with(model: Segmenter, on: frozenset[str], device: torch.device) -> Labels:
    """The step's way from one image of any size (H, W, 3) to its labels (H, W), sliding windows included."""
    model, dtype, ops, info = copy.deepcopy(model).to(device, dtype_of(on)), dtype_of(on), operators(on), model.info
    set_operators(model, ops)
    if "compile" in on:
        model.masks = torch.compile(model.masks, mode="max-autotune-no-cudagraphs", dynamic=False)

    @torch.no_grad()
    def run(pixels: np.ndarray) -> torch.Tensor:
        if "labels" in on:
            return model.segment(pixels, batch_size=1).long()
        im = normalize(pixels, info.normalization)[None].to(device, dtype)
        sizes = info.window_size, info.window_stride, 1
        return published_inference(model, [im], [False], pixels.shape[:2], *sizes, ops).argmax(0)

    return run


def examples() -> Iterator[np.ndarray]:
    """The photographs in examples/, (H, W, 3) uint8."""
    return map(read_image, sorted((ROOT / "examples").glob("*.jpg")))


def camvid_test(camvid: Path, every: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(image, class ids) of CamVid's test set, every so many of them: images/test and annotations/test.

    Raises:
        FileNotFoundError: it has no such images.
    """
    paths = sorted((camvid / "images" / "test").glob("*"))[::every]
    if not paths:
        raise FileNotFoundError(f"{camvid} has no images in images/test")
    for path in paths:
        yield read_image(path), np.asarray(Image.open(camvid / "annotations" / "test" / f"{path.stem}.png"))


def quality(run: Labels, exact: Labels, camvid: Path | None, every: int) -> dict[str, float | int | None]:
    """How a step labels: the share of pixels labelled as by the first step, and mIoU in percent if CamVid is there."""
    pairs = [(run(pixels), exact(pixels)) for pixels in examples()]
    agreement = torch.cat([(found == expected).flatten() for found, expected in pairs]).double().mean().item()
    matrix, n = ConfusionMatrix(11), 0
    for pixels, label in camvid_test(camvid, every) if camvid is not None else ():
        matrix.update(run(pixels).numpy(), np.where(label >= 11, 255, label))
        n += 1
    miou = round(100 * float(matrix.scores()["mIoU"]), 2) if n else None
    return {"agreement": agreement, "miou": miou, "miou_pictures": n}
