"""The operations that are timed alone, each by every provider that has it.

bench/operations.py, bench/gradients.py, bench/maps.py and bench/encoders.py say what they are.
"""

from collections.abc import Callable

import pytest

from bench import encoders, gradients, maps, operations


def _benchmark(operation: operations.Operation) -> Callable:
    @pytest.mark.parametrize("provider", operation.providers)
    def run(benchmark, harness, shape, provider):
        harness.operation(benchmark, operation, shape, provider)

    return run


bench_attention = _benchmark(operations.ATTENTION)
bench_attention_backward = _benchmark(operations.ATTENTION_BACKWARD)
bench_layernorm_mlp = _benchmark(operations.LAYERNORM_MLP)
bench_layernorm_mlp_scaled = _benchmark(operations.LAYERNORM_MLP_SCALED)
bench_mask_head = _benchmark(operations.MASK_HEAD)
bench_masks_to_labels = _benchmark(operations.MASKS_TO_LABELS)
bench_noise_to_labels = _benchmark(operations.NOISE_TO_LABELS)
bench_loss = _benchmark(operations.LOSS)
bench_layernorm_backward = _benchmark(gradients.LAYERNORM)
bench_linear_backward = _benchmark(gradients.LINEAR)
bench_layernorm_mlp_backward = _benchmark(gradients.LAYERNORM_MLP)
bench_mask_head_backward = _benchmark(gradients.MASK_HEAD)
bench_pixels_to_tokens_backward = _benchmark(gradients.PIXELS_TO_TOKENS)
bench_attention_half_backward = _benchmark(gradients.ATTENTION_HALF)
bench_maps_rows = _benchmark(maps.ROWS)
bench_maps_statistics = _benchmark(maps.STATISTICS_OF_ROWS)
bench_maps_transposed = _benchmark(maps.TRANSPOSED)
bench_rotate = _benchmark(encoders.ROTATE)
bench_queries_to_labels = _benchmark(encoders.QUERIES_TO_LABELS)
