"""The planted bugs: one text edit each, in a file of the kernels, and the tests that should find it."""

from tests.mutants.mutant import Mutant, planted_in
from tests.mutants.planted_backward import ATTENTION_BACKWARD
from tests.mutants.planted_blocks import BLOCKS_OF_OTHERS
from tests.mutants.planted_figures import FIGURES
from tests.mutants.planted_first_hour import FIRST_HOUR
from tests.mutants.planted_guard import GUARD
from tests.mutants.planted_int8 import INT8
from tests.mutants.planted_labels import (
    BY_THEMSELVES,
    CAPTURED,
    COMPILED,
    LABELS,
    LABELS_KERNEL,
    READ_AHEAD,
    STREAM,
    STRIDES,
    UPSAMPLE_TILES,
)
from tests.mutants.planted_layer_backward import LAYER_BACKWARD
from tests.mutants.planted_loss import LOSS
from tests.mutants.planted_maps import MAPS
from tests.mutants.planted_masks_and_pixels import MASKS_AND_PIXELS
from tests.mutants.planted_memory import MEMORY
from tests.mutants.planted_recompute import RECOMPUTE
from tests.mutants.planted_repeat import REPEAT
from tests.mutants.planted_rotary import ROTARY
from tests.mutants.planted_tanh import TANH
from tests.mutants.planted_training import DURABILITY, SCHEDULE
from tests.mutants.planted_tune import TUNE

ATTENTION = planted_in(
    "kernels/attention.py",
    ("tests/kernels/test_attention.py",),
    {
        "lost_tail": (
            "        if end < n_keys:\n",
            "        if end < 0:\n",
        ),
        "loop_stops_early": (
            "for n_0 in tl.range(PEELED, end, BLOCK_N):",
            "for n_0 in tl.range(PEELED, end - BLOCK_N, BLOCK_N):",
        ),
        "loop_starts_at_zero_after_peeling": (
            "for n_0 in tl.range(PEELED, end, BLOCK_N):",
            "for n_0 in tl.range(0, end, BLOCK_N):",
        ),
        "tail_mask_one_key_too_many": (
            "(end + tl.arange(0, BLOCK_N))[None, :] < n_keys",
            "(end + tl.arange(0, BLOCK_N))[None, :] <= n_keys",
        ),
        "tail_mask_missing": (
            '            qk = tl.where((end + tl.arange(0, BLOCK_N))[None, :] < n_keys, qk, float("-inf"))\n',
            "",
        ),
        "batch_offset_in_32_bits": (
            "Q += b.to(tl.int64) * stride_qb",
            "Q += b * stride_qb",
        ),
        "output_offset_in_32_bits": (
            "o_rows = Out + b.to(tl.int64) * stride_ob",
            "o_rows = Out + b * stride_ob",
        ),
        "key_offset_in_32_bits": (
            "k_row = KRows + b.to(tl.int64) * stride_kb",
            "k_row = KRows + b * stride_kb",
        ),
        "maximum_starts_at_zero": (
            'm_i = tl.full([BLOCK_M], float("-inf"), tl.float32)',
            "m_i = tl.zeros([BLOCK_M], tl.float32)",
        ),
        "maximum_of_the_tile_only": (
            "m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)",
            "m_new = tl.max(qk, 1) * scale_log2",
        ),
        "no_maximum": (
            "m_new = tl.maximum(m_i, tl.max(qk, 1) * scale_log2)",
            "m_new = tl.maximum(m_i, 0.0)",
        ),
        "output_not_rescaled": (
            "acc * alpha[:, None], input_precision=PRECISION)",
            "acc, input_precision=PRECISION)",
        ),
        "sum_not_rescaled": (
            "l_i = l_i * alpha + tl.sum(p, 1)",
            "l_i = l_i + tl.sum(p, 1)",
        ),
        "sum_of_the_tile_only": (
            "l_i = l_i * alpha + tl.sum(p, 1)",
            "l_i = l_i * alpha + tl.max(p, 1)",
        ),
        "probabilities_in_half_before_the_sum": (
            "    alpha = tl.exp2(m_i - m_new)\n    l_i = l_i * alpha",
            "    p = p.to(tl.float16).to(tl.float32)\n    alpha = tl.exp2(m_i - m_new)\n    l_i = l_i * alpha",
        ),
        "half_precision_accumulator": (
            "    return m_new, l_i, acc\n",
            "    return m_new, l_i, acc.to(v.dtype).to(tl.float32)\n",
        ),
        "half_precision_scores": (
            "        qk = tl.dot(q, k.T, input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]\n",
            "        qk = tl.dot(q, k.T, input_precision=PRECISION).to(q.dtype).to(tl.float32)\n",
        ),
        "exp_in_place_of_exp2": (
            "p = tl.exp2(qk * scale_log2 - m_new[:, None])",
            "p = tl.exp(qk * scale_log2 - m_new[:, None])",
        ),
        "scale_of_head_64": (
            "x.shape[-1] ** -0.5, False)[0]",
            "0.125, False)[0]",
        ),
        "value_heads_of_keys": (
            "v = load_tile(V, (b, v_head + h, n_0, 0),",
            "v = load_tile(V, (b, k_head + h, n_0, 0),",
        ),
        "value_stride_of_keys": (
            "v = load_tile(V, (b, v_head + h, n_0, 0), offs_n, stride_vn,",
            "v = load_tile(V, (b, v_head + h, n_0, 0), offs_n, stride_kn,",
        ),
        "second_peeled_row_is_the_first": (
            "k_1 = tl.load(k_row + stride_kn + offs_d,",
            "k_1 = tl.load(k_row + offs_d,",
        ),
        "peeled_value_forgotten": (
            "acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32) + v_0[None, :]",
            "acc = tl.zeros([BLOCK_M, HEAD_PAD], tl.float32)",
        ),
        "peeled_score_not_scaled": (
            "m_i = tl.sum(q.to(tl.float32) * k_0[None, :], 1) * scale_log2",
            "m_i = tl.sum(q.to(tl.float32) * k_0[None, :], 1)",
        ),
        "heads_and_batch_exchanged": (
            "    b = bh // n_heads\n    h = bh % n_heads\n",
            "    b = bh % n_heads\n    h = bh // n_heads\n",
        ),
        "lse_without_maximum": (
            "lse = (m_i + tl.log2(l_i))",
            "lse = (tl.log2(l_i))",
        ),
        "lse_in_base_two": (
            "tl.log2(l_i)) * LN2",
            "tl.log2(l_i)) * 1.0",
        ),
        "lse_padding_left_out": (
            'lse = tl.where(offs_m < n_queries, lse, float("inf"))',
            "lse = lse + 0.0",
        ),
        "output_mask_missing": (
            "mask = (offs_m[:, None] < n_queries) & (offs_d[None, :] < HEAD_DIM)",
            "mask = (offs_m[:, None] < n_queries + BLOCK_M) & (offs_d[None, :] < HEAD_DIM)",
        ),
        "sum_forgotten_in_the_end": (
            "acc = acc * (1.0 / l_i)[:, None]",
            "acc = acc * (1.0 / (l_i + 0.002))[:, None]",
        ),
    },
)

LAYERNORM = planted_in(
    "kernels/layernorm.py",
    ("tests/kernels/test_layernorm.py",),
    {
        "padding_in_the_variance": (
            "x = tl.where(offs_n[None, :] < N, x, 0.0)",
            "x = x + 0.0",
        ),
        "unbiased_variance": (
            "variance = tl.sum(x * x, 1) / N",
            "variance = tl.sum(x * x, 1) / (N - 1)",
        ),
        "one_pass_variance": (
            "        x = _centre(x, mean, offs_n, N, EVEN)\n        variance = tl.sum(x * x, 1) / N",
            "        variance = tl.sum(x * x, 1) / N - mean * mean\n        x = _centre(x, mean, offs_n, N, EVEN)",
        ),
        "long_rows_keep_the_last_block_only": (
            "            total += x * x\n",
            "            total = x * x\n",
        ),
        "norm_bias_forgotten": (
            "        y = y + tl.load(B + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]\n",
            "        y = y + 0.0\n",
        ),
        "norm_eps_outside_the_root": (
            "rstd = tl.rsqrt(variance + eps)",
            "rstd = 1.0 / (tl.sqrt(variance) + eps)",
        ),
        "norm_offset_in_32_bits": (
            "rows = tl.program_id(0).to(tl.int64) * BLOCK_M",
            "rows = tl.program_id(0) * BLOCK_M",
        ),
    },
)

LINEAR = planted_in(
    "kernels/linear.py",
    ("tests/kernels/test_linear.py",),
    {
        "last_k_block_dropped": (
            "    for k_0 in tl.range(0, K, BLOCK_K):\n        x = load_tile(X,",
            "    for k_0 in tl.range(0, K - BLOCK_K, BLOCK_K):\n        x = load_tile(X,",
        ),
        "bias_before_the_norm": (
            "acc = (acc - mean[:, None] * row_sum[None, :]) * rstd[:, None]",
            "acc = acc * rstd[:, None] - mean[:, None] * row_sum[None, :]",
        ),
        "gelu_after_the_residual": (
            "        acc = gelu(acc, GELU)\n    mask = ",
            "        acc = acc * 1.0\n    mask = ",
        ),
        "residual_forgotten_by_descriptors": (
            "            residual = Residual.load([m_0, n_0])",
            "            residual = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
        ),
        "residual_forgotten_by_pointers": (
            "residual = tl.load(Residual + x_rows[:, None] * stride_r + offs_n[None, :], mask=mask, other=0.0)",
            "residual = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)",
        ),
        "unrounded_row_sum": (
            "row_sum += tl.sum(folded.to(tl.float32), 1)",
            "row_sum += tl.sum(w * gamma[None, :], 1)",
        ),
        "folded_bias_without_beta": (
            "        bias += tl.sum(w * beta[None, :], 1)\n",
            "",
        ),
        "store_mask_missing": (
            "mask = (offs_m < n_rows)[:, None] & mask_n[None, :]\n    if HAS_RESIDUAL:",
            "mask = (offs_m >= 0)[:, None] & mask_n[None, :]\n    if HAS_RESIDUAL:",
            "the same result: rows beyond the edge repeat the last one, and store its value there a second time",
        ),
        "second_columns_of_rows_forgotten": (
            "            acc = tl.dot(x_2, w.T, acc, input_precision=PRECISION)\n        mask_n",
            "            acc = acc + 0.0\n        mask_n",
        ),
    },
)

LOADS = [
    *planted_in(
        "kernels/blocks.py",
        ("tests/kernels/test_attention.py",),
        {
            "row_mask_missing": (
                "mask = (row + rows)[:, None] < n_rows\n",
                "mask = (row + rows)[:, None] < n_rows + rows.shape[0]\n",
            ),
            "row_mask_one_too_many": (
                "mask = (row + rows)[:, None] < n_rows\n",
                "mask = (row + rows)[:, None] <= n_rows\n",
            ),
            "padded_columns_read": (
                "            x = tl.load(pointers, mask=cols[None, :] < WIDTH, other=0.0)\n",
                "            x = tl.load(pointers)\n",
            ),
        },
    ),
    *planted_in(
        "kernels/blocks.py",
        ("tests/kernels/test_linear.py",),
        {
            "columns_beyond_k_read": (
                "            x = tl.load(pointers, mask=cols[None, :] < WIDTH, other=0.0)\n",
                "            x = tl.load(pointers)\n",
            ),
            "program_order_off": (
                "return group * GROUP_M + within % group_rows,",
                "return group * GROUP_M + within % GROUP_M,",
            ),
        },
    ),
    *planted_in(
        "kernels/blocks.py",
        ("tests/kernels/test_mask_head.py",),
        {
            "columns_beyond_d_read": (
                "mask = mask & (cols[None, :] < WIDTH)",
                "mask = mask & (cols[None, :] < WIDTH + COLS)",
            ),
        },
    ),
]

BLOCKS = planted_in(
    "kernels/blocks.py",
    ("tests/kernels/test_layernorm_mlp.py", "tests/kernels/test_linear.py"),
    {
        "tanh_for_erf": (
            "y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))",
            "y = x / (1.0 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))",
        ),
        "gelu_coefficient_off": (
            "0.10522997",
            "0.1032",
        ),
        "eps_forgotten_in_rows": (
            "rstd = tl.rsqrt((tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / D + eps)",
            "rstd = tl.rsqrt((tl.sum(x_1 * x_1, 1) + tl.sum(x_2 * x_2, 1)) / D)",
        ),
        "mean_of_the_first_columns": (
            "mean = (tl.sum(x_1, 1) + tl.sum(x_2, 1)) / D",
            "mean = tl.sum(x_1, 1) / D1",
        ),
    },
)

LAYERNORM_MLP = planted_in(
    "kernels/layernorm_mlp.py",
    ("tests/kernels/test_layernorm_mlp.py",),
    {
        "last_hidden_block_dropped": (
            "for h_0 in tl.range(0, H, BLOCK_H):",
            "for h_0 in tl.range(0, H - BLOCK_H, BLOCK_H):",
        ),
        "no_gelu": (
            "h = gelu(h + tl.load(Bias1 + offs_h).to(tl.float32)[None, :], GELU).to(dtype)",
            "h = (h + tl.load(Bias1 + offs_h).to(tl.float32)[None, :]).to(dtype)",
        ),
        "fc1_bias_forgotten": (
            "h = gelu(h + tl.load(Bias1 + offs_h).to(tl.float32)[None, :], GELU).to(dtype)",
            "h = gelu(h, GELU).to(dtype)",
        ),
        "fc2_bias_forgotten": (
            "    acc = acc + tl.load(Bias + offs_d).to(tl.float32)[None, :]\n",
            "",
        ),
        "mlp_residual_forgotten": (
            "y = acc + X.load([row_0, COL_0]).to(tl.float32)",
            "y = acc + 0.0",
        ),
    },
)

MASK_HEAD = planted_in(
    "kernels/mask_head.py",
    ("tests/kernels/test_mask_head.py",),
    {
        "unnormalised_classes": (
            "* (1.0 / class_norm)[None, :]",
            "* (1.0 + 0.0 * class_norm)[None, :]",
        ),
        "unnormalised_patches": (
            "cosine = cosine * tl.rsqrt(patch_norm2)[:, None]",
            "cosine = cosine * (1.0 + 0.0 * patch_norm2)[:, None]",
        ),
        "patch_norm_of_the_last_chunk": (
            "patch_norm2 += tl.sum(p * p, 1)",
            "patch_norm2 = tl.sum(p * p, 1)",
        ),
        "patch_norm_off": (
            "tl.rsqrt(patch_norm2)[:, None]",
            "tl.rsqrt(patch_norm2 * 1.001)[:, None]",
        ),
        "padded_classes_in_the_variance": (
            "centred = tl.where(real[None, :], cosine - mean[:, None], 0.0)",
            "centred = cosine - mean[:, None]",
        ),
        "last_chunk_dropped": (
            "for d_0 in tl.range(0, D, BLOCK_D):",
            "for d_0 in tl.range(0, D - BLOCK_D, BLOCK_D):",
        ),
        "last_projection_step_dropped": (
            "for i_0 in tl.range(0, D, BLOCK_K):",
            "for i_0 in tl.range(0, D - BLOCK_K, BLOCK_K):",
        ),
        "mask_norm_eps_forgotten": (
            "tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / N_CLASSES) + eps)",
            "tl.rsqrt(tl.sum(centred * centred, 1) * (1.0 / N_CLASSES))",
        ),
        "slab_offset_forgotten": (
            "k_0 = (pid % n_slabs) * K_PAD",
            "k_0 = (pid % n_slabs) * 0",
        ),
        "mask_norm_bias_forgotten": (
            "            y = y + tl.load(NormBias + offs_k, mask=real, other=0.0).to(tl.float32)[None, :]\n",
            "            y = y + 0.0\n",
        ),
    },
)

PIXELS_TO_TOKENS = planted_in(
    "kernels/pixels_to_tokens.py",
    ("tests/kernels/test_pixels_to_tokens.py",),
    {
        "last_bytes_dropped": (
            "for k_0 in tl.range(0, K, BLOCK_K):",
            "for k_0 in tl.range(0, K - BLOCK_K, BLOCK_K):",
        ),
        "right_border_gets_the_constant_of_the_bottom": (
            "tl.where(patch_x == grid_w - 1, 1, 0)",
            "tl.where(patch_x == grid_w - 1, 2, 0)",
        ),
        "bottom_border_one_patch_early": (
            "tl.where(patch_y == grid_h - 1, 2, 0)",
            "tl.where(patch_y >= grid_h - 2, 2, 0)",
        ),
        "extra_tokens_without_positions": (
            "            token += tl.load(Pos + e * D + offs_n, mask=mask_n, other=0.0).to(tl.float32)\n",
            "",
        ),
        "positions_of_the_extra_tokens_for_patches": (
            "tl.load(Pos + (E + patch)[:, None] * D",
            "tl.load(Pos + patch[:, None] * D",
        ),
        "extra_tokens_of_one_image_a_block": (
            "last = tl.cdiv(tl.minimum(m_0 + BLOCK_M, n_rows), n_patches)",
            "last = tl.minimum(tl.cdiv(m_0, n_patches) + 1, n_rows // n_patches)",
        ),
        "image_offset_in_32_bits": (
            "image = (rows // n_patches).to(tl.int64)",
            "image = rows // n_patches",
        ),
        "image_row_offset_in_32_bits": (
            "(patch_y * P).to(tl.int64) * stride_ph",
            "(patch_y * P) * stride_ph",
        ),
    },
)

FOLDING = planted_in(
    "kernels/reference.py",
    ("tests/kernels/test_pixels_to_tokens.py",),
    {
        "bias_of_the_weights_before_rounding": (
            "constant = (folded.double() * (",
            "constant = (exact * (CENTRE / (255 * std)) * (",
        ),
        "height_and_width_of_borders_exchanged": (
            "parts = (constant, constant[:, :, :width], constant[:, :height],",
            "parts = (constant, constant[:, :height], constant[:, :, :width],",
        ),
    },
)

CACHE = planted_in(
    "segmenter/cache.py",
    ("tests/test_embed_pixels.py",),
    {
        "written_weights_count_as_the_same": (
            "            and self.version == tensor._version\n",
            "",
        ),
        "other_memory_counts_as_the_same": (
            "(old.data_ptr(), old.dtype, old.device) == (tensor.data_ptr(), tensor.dtype, tensor.device)",
            "True",
        ),
        "steps_of_optimisers_forgotten": (
            "    return autocast, stream, optimiser_steps()",
            "    return autocast, stream, 0",
        ),
        "autocast_forgotten": (
            "    return autocast, stream, optimiser_steps()",
            "    return stream, optimiser_steps()",
            "the same result today: folding has the type in its key, and autocast leaves interpolation alone",
        ),
    },
)

MUTANTS = [
    *ATTENTION,
    *ATTENTION_BACKWARD,
    *LAYERNORM,
    *LINEAR,
    *LOADS,
    *BLOCKS,
    *LAYERNORM_MLP,
    *BLOCKS_OF_OTHERS,
    *MASK_HEAD,
    *PIXELS_TO_TOKENS,
    *FOLDING,
    *CACHE,
    *GUARD,
    *INT8,
    *RECOMPUTE,
    *REPEAT,
    *ROTARY,
    *TANH,
    *LABELS_KERNEL,
    *UPSAMPLE_TILES,
    *LABELS,
    *STRIDES,
    *READ_AHEAD,
    *CAPTURED,
    *COMPILED,
    *BY_THEMSELVES,
    *STREAM,
    *DURABILITY,
    *SCHEDULE,
    *TUNE,
    *FIGURES,
    *FIRST_HOUR,
    *LOSS,
    *LAYER_BACKWARD,
    *MASKS_AND_PIXELS,
    *MEMORY,
    *MAPS,
]

__all__ = ["MUTANTS", "Mutant"]
