"""The operations that are timed alone, each by every provider that has it; bench/operations.py says what they are."""

import pytest

from bench import operations as ops


@pytest.mark.parametrize("provider", ops.ATTENTION.providers)
def bench_attention(benchmark, harness, shape, provider):
    """Attention of packed qkv, one encoder layer."""
    harness.operation(benchmark, ops.ATTENTION, shape, provider)


@pytest.mark.parametrize("provider", ops.ATTENTION_BACKWARD.providers)
def bench_attention_backward(benchmark, harness, shape, provider):
    """The same with its gradient, in one call as training does."""
    harness.operation(benchmark, ops.ATTENTION_BACKWARD, shape, provider)


@pytest.mark.parametrize("provider", ops.LAYERNORM_MLP.providers)
def bench_layernorm_mlp(benchmark, harness, shape, provider):
    """x + fc2(gelu(fc1(layer_norm(x)))), one encoder layer."""
    harness.operation(benchmark, ops.LAYERNORM_MLP, shape, provider)


@pytest.mark.parametrize("provider", ops.MASK_HEAD.providers)
def bench_mask_head(benchmark, harness, shape, provider):
    """Class masks from decoded patch and class tokens."""
    harness.operation(benchmark, ops.MASK_HEAD, shape, provider)


@pytest.mark.parametrize("provider", ops.MASKS_TO_LABELS.providers)
def bench_masks_to_labels(benchmark, harness, shape, provider):
    """The tail of inference: low-resolution masks to a label for every pixel."""
    harness.operation(benchmark, ops.MASKS_TO_LABELS, shape, provider)


@pytest.mark.parametrize("provider", ops.NOISE_TO_LABELS.providers)
def bench_noise_to_labels(benchmark, harness, shape, provider):
    """The worst case of what looks at classes first: nearly all of them could win everywhere."""
    harness.operation(benchmark, ops.NOISE_TO_LABELS, shape, provider)


@pytest.mark.parametrize("provider", ops.LOSS.providers)
def bench_loss(benchmark, harness, shape, provider):
    """The tail of training: upsampling, cross-entropy and the gradient of the low-resolution masks."""
    harness.operation(benchmark, ops.LOSS, shape, provider)
