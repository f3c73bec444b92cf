"""The operations that are timed alone: inputs, what each provider calls, how it is checked, how much work it is."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from bench import gate, providers, shapes
from bench.shapes import Shape, Work
from segmenter.inference import pruned_argmax
from segmenter.inference.merge import View, fill_labels
from segmenter.inference.windows import Windows
from segmenter.kernels import reference
from segmenter.ops import load_kernels
from segmenter.training.upsample_loss import upsample_cross_entropy

IGNORE = 255
Tensors = tuple[torch.Tensor, ...]


class Operation(NamedTuple):
    """One operation: its name in results and the names of the providers that compute it."""

    kind: str
    providers: tuple[str, ...]
    inputs: Callable[[Shape, torch.dtype, torch.device], Tensors]  # random tensors to call with
    call: Callable[[str, Shape], Callable]  # (provider, shape) -> a function of those tensors
    check: Callable[[str, Shape, Any, Tensors], str]  # -> how right the result is, for people; raises GateError
    work: Callable[[Shape, int], Work]  # (shape, bytes an element) -> operations and bytes


def compiled(provider: str, fn: Callable) -> Callable:
    """`fn`, by torch.compile if that is the provider."""
    return torch.compile(fn, mode="max-autotune-no-cudagraphs", dynamic=False) if provider == "compile" else fn


def random_tensor(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device, scale: float = 1.0, mean: float = 0.0
) -> torch.Tensor:
    """Normal numbers."""
    return (mean + torch.randn(*shape, device=device) * scale).to(dtype)


# ---------------------------------------------------------------------------------------------------------------------
# Attention


def _qkv(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    return (random_tensor((shape.batch, shape.tokens, 3 * shape.d_model), dtype, device),)


def _attention_call(provider: str, shape: Shape) -> Callable:
    fn, n_heads = providers.attention(provider), shape.n_heads
    return compiled(provider, lambda qkv: fn(qkv, n_heads))


def _ends(x: torch.Tensor) -> torch.Tensor:
    """The first and the last of a batch: what is checked of it."""
    return x if len(x) <= 2 else torch.cat([x[:1], x[-1:]])


def _check_attention(provider: str, shape: Shape, out: torch.Tensor, inputs: Tensors) -> str:
    exact, eager = gate.attention_references(_ends(inputs[0]), shape.n_heads)
    return gate.check(provider, _ends(out), exact, eager)


def _qkv_and_gradient(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    (qkv,) = _qkv(shape, dtype, device)
    return qkv.requires_grad_(), random_tensor((shape.batch, shape.tokens, shape.d_model), dtype, device)


def _attention_backward_call(provider: str, shape: Shape) -> Callable:
    forward = _attention_call(provider, shape)
    return lambda qkv, do: torch.autograd.grad(forward(qkv), qkv, do)[0]


def _check_attention_backward(provider: str, shape: Shape, dqkv: torch.Tensor, inputs: Tensors) -> str:
    """The gradient of one image's first head, which is enough to hold float64 scores of any length of the sweep."""
    qkv, do = (x.detach()[-1:] for x in inputs)
    heads = (1, shape.tokens, 3, shape.n_heads, shapes.HEAD_DIM)
    first, d_first = qkv.view(heads)[..., 0, :].flatten(2), do.unflatten(2, heads[3:])[..., 0, :]

    def gradient(dtype: torch.dtype) -> torch.Tensor:
        x = first.to(dtype).requires_grad_()
        return torch.autograd.grad(reference.explicit_attention(x, 1), x, d_first.to(dtype))[0]

    actual = dqkv[-1:].view(heads)[..., 0, :].flatten(2)
    # Some backends scale q and k by a root each, so gradients are rounded elsewhere.
    return gate.check(provider, actual, gradient(torch.float64), gradient(qkv.dtype), max_ratio=4.0)


# Of packed qkv, one encoder layer; and the same with its gradient, in one call as training does.
ATTENTION = Operation("attention", providers.PROVIDERS, _qkv, _attention_call, _check_attention, shapes.attention)
ATTENTION_BACKWARD = ATTENTION._replace(
    kind="attention-backward",
    inputs=_qkv_and_gradient,
    call=_attention_backward_call,
    check=_check_attention_backward,
    work=lambda *args: shapes.attention(*args) + shapes.attention_backward(*args),
)

# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm-MLP and mask head


def _mlp_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    d = shape.d_model
    norm = random_tensor((d,), dtype, device, 0.2, 1.0), random_tensor((d,), dtype, device, 0.2)
    fc1 = random_tensor((4 * d, d), dtype, device, d**-0.5), random_tensor((4 * d,), dtype, device, 0.2)
    fc2 = random_tensor((d, 4 * d), dtype, device, (4 * d) ** -0.5), random_tensor((d,), dtype, device, 0.2)
    return random_tensor((shape.batch, shape.tokens, d), dtype, device), *norm, *fc1, *fc2


def _mask_head_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    B, d, K = shape.batch, shape.d_model, shape.n_cls
    tokens = random_tensor((B, shape.patches, d), dtype, device), random_tensor((B, K, d), dtype, device)
    projections = (random_tensor((d, d), dtype, device, d**-0.5) for _ in range(2))
    return *tokens, *projections, random_tensor((K,), dtype, device, 0.2, 1.0), random_tensor((K,), dtype, device, 0.2)


def _scaled_mlp_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    return *_mlp_inputs(shape, dtype, device), random_tensor((shape.d_model,), dtype, device, 0.2, 1.0)


def _fused(
    kind: str, name: str, inputs: Callable[..., Tensors], work: Callable[[Shape, int], Work], last: str = ""
) -> Operation:
    """An operation that the reference defines under the name that our kernel has. last: the last input's keyword."""

    def by(function: Callable) -> Callable:
        return (lambda *tensors: function(*tensors[:-1], **{last: tensors[-1]})) if last else function

    definition = by(getattr(reference, name))

    def call(provider: str, shape: Shape) -> Callable:
        return by(getattr(load_kernels(), name)) if provider == "triton" else compiled(provider, definition)

    def check(provider: str, shape: Shape, out: torch.Tensor, inputs: Tensors) -> str:
        ends = [_ends(t) if t.ndim == 3 else t for t in inputs]
        return gate.check(provider, _ends(out), definition(*(t.double() for t in ends)), definition(*ends))

    return Operation(kind, ("eager", "compile", "triton"), inputs, call, check, work)


LAYERNORM_MLP = _fused("layernorm-mlp", "layernorm_mlp", _mlp_inputs, shapes.layernorm_mlp)
_LAYER_SCALE = _scaled_mlp_inputs, shapes.layernorm_mlp_scaled, "layer_scale"  # a factor a column, as in DINOv2
LAYERNORM_MLP_SCALED = _fused("layernorm-mlp-scaled", "layernorm_mlp", *_LAYER_SCALE)
MASK_HEAD = _fused("mask-head", "mask_head", _mask_head_inputs, shapes.mask_head)

# ---------------------------------------------------------------------------------------------------------------------
# From low-resolution masks to labels, and to the loss


def _masks(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """(B, K, g, g) as the mask head leaves them: class last in memory. Noise, so that nearly every class could win."""
    grid = shape.size // shape.patch
    return (random_tensor((shape.batch, grid, grid, shape.n_cls), dtype, device).permute(0, 3, 1, 2),)


def _regions(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    """The same of regions of one class each, about four patches wide, with a little noise: as after training."""
    grid, coarse = shape.size // shape.patch, max(2, shape.size // shape.patch // 4)
    regions = torch.randn(shape.batch, shape.n_cls, coarse, coarse, device=device)
    regions = F.interpolate(regions, (grid, grid), mode="bicubic").argmax(1)
    noise = torch.randn(shape.batch, grid, grid, shape.n_cls, device=device) * 0.3
    return ((F.one_hot(regions, shape.n_cls) * 4.0 + noise).to(dtype).permute(0, 3, 1, 2),)


def _full_size(masks: torch.Tensor, patch: int) -> tuple[int, int]:
    return masks.shape[2] * patch, masks.shape[3] * patch


def upsampled(masks: torch.Tensor, patch: int) -> torch.Tensor:
    """(B, K, g, g) -> (B, K, g * patch, g * patch), bilinear."""
    return F.interpolate(masks, size=_full_size(masks, patch), mode="bilinear", align_corners=False)


def full_labels(masks: torch.Tensor, patch: int) -> torch.Tensor:
    """Labels by way of full-resolution logits: (B, K, g, g) -> (B, H, W) uint8."""
    return upsampled(masks, patch).argmax(1).to(torch.uint8)


def band_labels(masks: torch.Tensor, patch: int) -> torch.Tensor:
    """The same without ever holding the logits of a whole image: `segmenter.inference.merge`."""
    size = _full_size(masks, patch)
    labels = torch.empty(len(masks), *size, dtype=torch.uint8, device=masks.device)
    windows = Windows((0,), (0,), size, size, size)
    for of_image, target in zip(masks.float().permute(0, 2, 3, 1).contiguous(), labels, strict=True):
        fill_labels(target, [View(of_image[None], windows)])
    return labels


def labels_by(operator: Callable, masks: torch.Tensor, patch: int) -> torch.Tensor:
    """The same by an operator `windows_argmax`: (B, K, g, g) -> (B, H, W) uint8."""
    size = _full_size(masks, patch)
    return operator(masks.permute(0, 2, 3, 1).unsqueeze(1), (0,), (0,), size, size, size)


def _labels_call(provider: str, shape: Shape) -> Callable:
    if provider in ("pruned", "triton"):
        operator = load_kernels().windows_argmax if provider == "triton" else pruned_argmax.windows_argmax
        return lambda masks: labels_by(operator, masks, shape.patch)
    fn = band_labels if provider == "bands" else full_labels
    return compiled(provider, lambda masks: fn(masks, shape.patch))


def _check_labels(provider: str, shape: Shape, labels: torch.Tensor, inputs: Tensors) -> str:
    masks = _ends(inputs[0])
    eps = torch.finfo(masks.dtype).eps
    scores = upsampled(masks.float(), shape.patch)
    return gate.check_labels(provider, _ends(labels), scores, full_labels(masks, shape.patch), floor=4 * eps)


def _masks_and_target(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    target = torch.randint(0, shape.n_cls, (shape.batch, shape.size, shape.size), device=device)
    target[:, :: max(shape.size // 16, 1)] = IGNORE
    (masks,) = _masks(shape, dtype, device)
    return masks.requires_grad_(), target


def segmentation_loss(masks: torch.Tensor, target: torch.Tensor, patch: int) -> torch.Tensor:
    """Mean cross-entropy of the upsampled masks, in float32 as under autocast; pixels labelled 255 do not count."""
    logits = upsampled(masks, patch)
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return F.cross_entropy(logits, target, ignore_index=IGNORE)


def fused_loss(masks: torch.Tensor, target: torch.Tensor, patch: int, impl: str = "triton") -> torch.Tensor:
    """The same without the logits of pixels, as in training."""
    found = upsample_cross_entropy(masks, target, patch, ignore_index=IGNORE, impl=impl)
    return found.loss / found.weight


def _loss_call(provider: str, shape: Shape) -> Callable:
    impl = {"bands": "eager", "triton": "triton"}.get(provider)
    loss = functools.partial(fused_loss, impl=impl) if impl else segmentation_loss
    mean = compiled(provider, lambda masks, target: loss(masks, target, shape.patch))
    return lambda masks, target: torch.autograd.grad(mean(masks, target), masks)[0]


def _check_loss(provider: str, shape: Shape, gradient: torch.Tensor, inputs: Tensors) -> str:
    masks, target = inputs
    exact = _loss_call("eager", shape)(masks.detach().double().requires_grad_(), target)
    return gate.check(provider, gradient, exact, _loss_call("eager", shape)(masks, target))


_LABELS = ("eager", "compile", "bands", "pruned", "triton")
# The tail of inference: low-resolution masks to a label for every pixel; the worst case of what looks at classes first,
# where nearly all of them could win everywhere; and the tail of training with the gradient of the masks.
MASKS_TO_LABELS = Operation("masks-to-labels", _LABELS, _regions, _labels_call, _check_labels, shapes.masks_to_labels)
NOISE_TO_LABELS = MASKS_TO_LABELS._replace(kind="noise-to-labels", inputs=_masks)
_LOSSES = ("eager", "compile", "bands", "triton")
LOSS = Operation("loss", _LOSSES, _masks_and_target, _loss_call, _check_loss, shapes.loss)
