"""Operations with their gradients, forward and backward in one call as training does.

What an operator keeps for its backward pass and what it computes again is its own affair, and torch.compile decides it
by itself, so only both together can be compared. (Of attention it is `operations.ATTENTION_BACKWARD`, of the loss
`operations.LOSS`.)
"""

from collections.abc import Callable

import torch

from bench import gate, operations, providers, shapes
from bench.operations import Operation, Tensors, compiled, random_tensor
from bench.shapes import Shape, Work
from segmenter.config import NORMALIZATION
from segmenter.kernels import reference
from segmenter.layers import attention_half
from segmenter.ops import load_kernels

WITHOUT_ATTENTION = ("eager", "compile", "triton")
Forward = Callable[[str, Shape], Callable]  # (provider, shape) -> a function of the arguments


def _differentiated(
    kind: str,
    forward: Forward,
    arguments: Callable[[Shape, torch.dtype, torch.device], Tensors],
    result: Callable[[Shape], tuple[int, ...]],
    work: tuple[Callable[[Shape, int], Work], Callable[[Shape, int], Work]],
    of: tuple[str, ...] = WITHOUT_ATTENTION,
) -> Operation:
    """An operation that is called with its arguments and the gradient of its result, of this shape.

    It gives the gradients of all arguments that can have one. work: of the forward and of the backward pass.
    """

    def inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
        tensors = arguments(shape, dtype, device)
        grad = random_tensor(result(shape), dtype, device)
        return *(t.requires_grad_() if t.is_floating_point() else t for t in tensors), grad

    def call(provider: str, shape: Shape) -> Callable:
        fn = compiled(provider, forward(provider, shape))

        def run(*tensors: torch.Tensor) -> Tensors:
            *given, grad = tensors
            return torch.autograd.grad(fn(*given), [t for t in given if t.requires_grad], grad)

        return run

    def check(provider: str, shape: Shape, found: Tensors, tensors: Tensors) -> str:
        wide = [t.detach().double() if t.is_floating_point() else t for t in tensors]
        wide = [t.requires_grad_(old.requires_grad) for t, old in zip(wide, tensors, strict=True)]
        exact, eager = call("eager", shape)(*wide), call("eager", shape)(*tensors)
        # Each gradient goes through several roundings of half types, so one element may be off by more, as attention's.
        return "; ".join(gate.check(provider, *one, max_ratio=4.0) for one in zip(found, exact, eager, strict=True))

    return Operation(kind, of, inputs, call, check, lambda *args: work[0](*args) + work[1](*args))


def _tokens(shape: Shape) -> tuple[int, int, int]:
    return shape.batch, shape.tokens, shape.d_model


def _by_name(name: str) -> Forward:
    """What the reference and our operators define under one name."""

    def forward(provider: str, shape: Shape) -> Callable:
        return getattr(load_kernels() if provider == "triton" else reference, name)

    return forward


def _layernorm_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    d = shape.d_model
    norm = random_tensor((d,), dtype, device, 0.2, 1.0), random_tensor((d,), dtype, device, 0.2)
    return random_tensor(_tokens(shape), dtype, device), *norm


def _fc1(provider: str, shape: Shape) -> Callable:
    linear = _by_name("linear")(provider, shape)
    return lambda x, weight, bias: linear(x, weight, bias, gelu=True)


def _fc1_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    x, _, _, weight, bias, _, _ = operations.LAYERNORM_MLP.inputs(shape, dtype, device)
    return x, weight, bias


def _attention_half(provider: str, shape: Shape) -> Callable:
    ops = providers.operators(provider)
    return lambda *tensors: attention_half(ops, *tensors, shape.n_heads)


def _attention_half_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    d = shape.d_model
    qkv = random_tensor((3 * d, d), dtype, device, d**-0.5), random_tensor((3 * d,), dtype, device, 0.2)
    proj = random_tensor((d, d), dtype, device, d**-0.5), random_tensor((d,), dtype, device, 0.2)
    return *_layernorm_inputs(shape, dtype, device), *qkv, *proj


def _pixels_to_tokens(provider: str, shape: Shape) -> Callable:
    function = providers.operators(provider).pixels_to_tokens
    return lambda *tensors: function(*tensors, *NORMALIZATION["vit"])


def _pixels_inputs(shape: Shape, dtype: torch.dtype, device: torch.device) -> Tensors:
    B, S, P, d = shape.batch, shape.size, shape.patch, shape.d_model
    pixels = torch.randint(0, 256, (B, S, S, 3), device=device).to(torch.uint8)
    proj = random_tensor((d, 3, P, P), dtype, device, (3 * P * P) ** -0.5), random_tensor((d,), dtype, device, 0.2)
    return pixels, *proj, *(random_tensor((n, d), dtype, device, 0.2) for n in (1, shape.tokens))


LAYERNORM = _differentiated(
    "layernorm-backward",
    _by_name("layernorm"),
    _layernorm_inputs,
    _tokens,
    (shapes.layernorm, shapes.layernorm_backward),
)
LINEAR = _differentiated(
    "linear-backward",
    _fc1,
    _fc1_inputs,
    lambda shape: (shape.batch, shape.tokens, 4 * shape.d_model),
    (shapes.linear, shapes.linear_backward),
)
LAYERNORM_MLP = _differentiated(
    "layernorm-mlp-backward",
    _by_name("layernorm_mlp"),
    operations.LAYERNORM_MLP.inputs,
    _tokens,
    (shapes.layernorm_mlp, shapes.layernorm_mlp_backward),
)
MASK_HEAD = _differentiated(
    "mask-head-backward",
    _by_name("mask_head"),
    operations.MASK_HEAD.inputs,
    lambda shape: (shape.batch, shape.patches, shape.n_cls),
    (shapes.mask_head, shapes.mask_head_backward),
)
PIXELS_TO_TOKENS = _differentiated(
    "pixels-to-tokens-backward",
    _pixels_to_tokens,
    _pixels_inputs,
    _tokens,
    (shapes.pixels_to_tokens, shapes.pixels_to_tokens_backward),
)
ATTENTION_HALF = _differentiated(
    "attention-half-backward",
    _attention_half,
    _attention_half_inputs,
    _tokens,
    (shapes.attention_half, shapes.attention_half_backward),
    of=providers.PROVIDERS,
)
