"""Whole models as they are timed: from uint8 images on the device to labels, and one training step."""

import copy
import dataclasses
import functools
from collections.abc import Callable

import numpy as np
import torch
from PIL import Image

from bench import gate, providers
from bench.machine import ROOT
from bench.operations import full_labels, fused_loss, labels_by, segmentation_loss, upsampled
from bench.shapes import Shape
from segmenter.config import NORMALIZATION, preset
from segmenter.inference import pruned_argmax
from segmenter.layers import RECOMPUTE
from segmenter.model import Segmenter, create_segmenter
from segmenter.ops import EAGER, Operators
from segmenter.weights.load import from_pretrained

SHIPPED = ROOT / "examples" / "camvid-seg-s-mask-16"
_WHOLE = tuple(name for name in providers.PROVIDERS if name != "sdpa-math")  # which is eager by another name
MODEL_PROVIDERS, STEP_PROVIDERS = (*_WHOLE, "pruned"), (*_WHOLE, *providers.LEVELS)
LEARNING_RATE = 1e-3  # the published one


def shipped() -> Segmenter:
    """The model in examples/: a small Seg-S-Mask/16 of CamVid, trained weights."""
    return from_pretrained(SHIPPED)


@functools.lru_cache(1)
def build(shape: Shape, device: torch.device) -> Segmenter:
    """The shape's model with seeded random weights, in float32 and evaluation mode. One is kept."""
    torch.manual_seed(0)
    config = preset(shape.name.replace("Seg-X", "Seg-T"), n_cls=shape.n_cls, image_size=shape.size)
    config = dataclasses.replace(config, d_model=shape.d_model, n_heads=shape.n_heads, n_layers=shape.n_layers)
    with device:  # random weights of a large model take ten seconds on a CPU
        return create_segmenter(config, impl="eager").eval()


def images(shape: Shape, device: torch.device) -> torch.Tensor:
    """A batch (B, H, W, 3) uint8: the street photograph of examples/, moved sideways so that no two are alike."""
    photograph = Image.open(ROOT / "examples" / "street.jpg").convert("RGB")
    pixels = torch.from_numpy(np.array(photograph.resize((shape.size, shape.size), Image.BICUBIC)))
    shifts = torch.randint(0, shape.size, (shape.batch,)).tolist()
    return torch.stack([pixels.roll(shift, dims=1) for shift in shifts]).to(device)


class Normalize:
    """(B, H, W, 3) uint8 -> (B, 3, H, W), as `segmenter.inference.images.normalize`, on the device."""

    def __init__(self, stats: str, dtype: torch.dtype, device: torch.device):
        # Made once: a copy from the host inside could not be captured in a CUDA graph.
        mean, std = NORMALIZATION[stats]
        self.mean, self.std = torch.tensor([mean, std], dtype=torch.float32, device=device).unbind()
        self.dtype = dtype

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        x = pixels.float().div_(255).sub_(self.mean).div_(self.std)
        return x.to(self.dtype).permute(0, 3, 1, 2).contiguous()


def set_operators(model: torch.nn.Module, ops: Operators) -> None:
    """Makes every part of `model` that has a choice compute with `ops`, for good."""
    for module in model.modules():
        if hasattr(module, "ops"):
            module.ops = ops


def pixels_to_labels(
    model: Segmenter, ops: Operators, dtype: torch.dtype, tail: str, compiled: bool = False, from_bytes: bool = False
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A way from pixels (B, H, W, 3) uint8 to labels (B, H, W) uint8, with a copy of the model in `dtype`.

    Args:
        tail: "softmax" (full-resolution logits, softmax, argmax: published), "logits" (without the softmax, which no
            label needs) or "labels" (without full-resolution logits).
        compiled: torch.compile(max-autotune) of all of it.
        from_bytes: the patch embedding reads the bytes, by `ops.pixels_to_tokens`.
    """
    device = next(model.parameters()).device
    model = copy.deepcopy(model).to(dtype)
    set_operators(model, ops)
    normalize, patch = Normalize(model.info.normalization, dtype, device), model.patch_size

    def run(pixels: torch.Tensor) -> torch.Tensor:
        masks = model.masks_of_pixels(pixels) if from_bytes else model.masks(normalize(pixels))
        if tail == "softmax":
            return upsampled(masks, patch).softmax(1).argmax(1).to(torch.uint8)
        return labels_by(pruned_argmax.operator(ops), masks, patch) if tail == "labels" else full_labels(masks, patch)

    if compiled:
        return torch.no_grad()(torch.compile(run, mode="max-autotune", dynamic=False))
    return torch.inference_mode()(run)


def labels_of(model: Segmenter, provider: str, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """The provider's way from pixels to labels. "pruned" is what `impl="auto"` does without a GPU."""
    if provider in providers.BACKENDS:  # held once for the whole call, not in every layer
        return providers.with_backend(provider, pixels_to_labels(model, EAGER, dtype, "logits"))
    ops = EAGER if provider in ("pruned", "compile") else providers.operators(provider)
    tail = {"eager": "softmax", "triton": "labels", "pruned": "labels"}.get(provider, "logits")
    return pixels_to_labels(model, ops, dtype, tail, compiled=provider == "compile", from_bytes=tail == "labels")


@torch.inference_mode()
def exact_scores(model: Segmenter, pixels: torch.Tensor) -> torch.Tensor:
    """Full-resolution float32 logits (B, K, H, W) by the published order of work, float32 products in full."""
    no_tf32 = torch.backends.cudnn.flags(enabled=True, allow_tf32=False)  # the patch embedding is a convolution
    with providers.using(model, providers.PUBLISHED), providers.float32_products("highest"), no_tf32:
        normalize = Normalize(model.info.normalization, torch.float32, pixels.device)
        return upsampled(model.masks(normalize(pixels)), model.patch_size)


# Golden checks ask for 1e-4 of the largest score in float32; half types are compared with what eager makes of them.
LABEL_FLOOR = {torch.float32: 1e-4, torch.bfloat16: 2**-8, torch.float16: 2**-11}


@functools.lru_cache(1)
def _judged(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(first image of the batch, its exact scores, its labels by eager PyTorch in `dtype`)."""
    torch.manual_seed(0)
    pixels = images(shape, device)[:1]
    model = build(shape, device)
    return pixels, exact_scores(model, pixels), labels_of(model, "eager", dtype)(pixels)


def check_labels(
    shape: Shape, provider: str, labels: torch.Tensor, pixels: torch.Tensor, dtype: torch.dtype
) -> tuple[str, float]:
    """(how right the first image's labels are, share of its pixels with the exact labels).

    Args:
        labels, pixels: of the batch that `images` makes first.
    Raises:
        GateError: a pixel's class is clearly not the best.
    """
    first, scores, eager = _judged(shape, pixels.device, dtype)
    if not torch.equal(first, pixels[:1]):
        raise ValueError("the images are not those that the exact scores belong to")
    verdict = gate.check_labels(provider, labels[:1], scores, eager, LABEL_FLOOR[dtype])
    return verdict, (labels[:1].long() == scores.argmax(1)).double().mean().item()


# ---------------------------------------------------------------------------------------------------------------------
# Training


class TrainStep:
    """One step as in training: forward, loss, backward, SGD with momentum; weights float32, half types by autocast.

    Dropout and stochastic depth are on, at the published rates, when it is timed. Blocks with dropout (the decoder's)
    then run layer by layer, with scaled_dot_product_attention for every provider; blocks with stochastic depth do so
    with all but our kernels. Gradients are checked with both off. With our kernels the loss is training's own, without
    the logits of pixels; the others hold them, as published.
    """

    def __init__(self, model: Segmenter, provider: str, dtype: torch.dtype):
        self.model, self.dtype = copy.deepcopy(model).train(), dtype
        if dtype == torch.float64:  # to judge the others by
            self.model.double()
        set_operators(self.model, providers.operators(provider))
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=LEARNING_RATE, momentum=0.9)
        loss = segmentation_loss
        if providers.computing(provider) == "triton":
            self.model.recompute(providers.LEVELS.get(provider, RECOMPUTE))
            loss = fused_loss
        self.loss = lambda im, target: loss(self.model.masks(im), target, self.model.patch_size)
        if provider == "compile":
            self.loss = torch.compile(self.loss, mode="max-autotune", dynamic=False)

    def backward(self, im: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        """The loss, with gradients in the parameters."""
        self.optimizer.zero_grad(set_to_none=True)
        half = self.dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(im.device.type, self.dtype if half else None, enabled=half):
            loss = self.loss(im.double() if self.dtype == torch.float64 else im, target)
        loss.backward()
        return loss.detach()

    def __call__(self, im: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        loss = self.backward(im, target)
        self.optimizer.step()
        return loss


def check_gradients(model: Segmenter, provider: str, im: torch.Tensor, target: torch.Tensor, dtype: torch.dtype) -> str:
    """Compares gradients without dropout, of the first weights and of the last, for the first image of the batch.

    Raises:
        GateError: one is further from float64's than eager's of the same type allows. Through a whole network rounding
            adds up by chance, so here four times eager's largest error is allowed, not twice.
    """
    found = []
    for name, kind in ((provider, dtype), ("eager", torch.float64), ("eager", dtype)):
        step = TrainStep(model, name, kind)
        step.model.eval()
        step.backward(im[:1], target[:1])
        decoder = step.model.decoder
        last = decoder.proj_patch if hasattr(decoder, "proj_patch") else decoder.head.weight
        found.append((step.model.encoder.patch_embed.proj.weight.grad.flatten(1), last.grad))
    return "; ".join(gate.check(provider, *tensors, max_ratio=4.0) for tensors in zip(*found, strict=True))
