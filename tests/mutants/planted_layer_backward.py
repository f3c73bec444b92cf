"""The planted bugs of the gradients of LayerNorm and linear layers; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

LAYER_BACKWARD = [
    *planted_in(
        "kernels/layernorm_backward.py",
        ("tests/kernels/test_layernorm_backward.py",),
        {
            "padding_enters_the_variance_of_a_gradient": (
                "    if not EVEN:\n        x = tl.where(offs_n[None, :] < N, x, 0.0)\n    return x\n",
                "    return x\n",
            ),
            "last_row_counted_again": (
                "        dy = tl.where(inside[:, None], _load(DY + rows * stride_dy, offs_n, N, EVEN), 0.0)\n",
                "        dy = _load(DY + rows * stride_dy, offs_n, N, EVEN)\n",
            ),
            "mean_of_g_not_taken_off": (
                "            dx = (g - mean_g[:, None] - x * mean_product[:, None]) * rstd[:, None]\n",
                "            dx = (g - x * mean_product[:, None]) * rstd[:, None]\n",
            ),
            "gradient_not_scaled_by_the_deviation": (
                "            dx = (g - mean_g[:, None] - x * mean_product[:, None]) * rstd[:, None]\n",
                "            dx = g - mean_g[:, None] - x * mean_product[:, None]\n",
            ),
            "weight_left_out_of_the_gradient_of_x": (
                "            g = dy * weight[None, :] if HAS_WEIGHT else dy\n",
                "            g = dy\n",
            ),
            "weight_in_its_own_gradient": (
                "            d_weight += dy * x\n",
                "            d_weight += dy * weight[None, :] * x\n",
            ),
            "gradient_of_the_stream_lost": (
                "            if HAS_ADDED:\n",
                "            if HAS_ADDED and N_BLOCKS > 1:\n",
            ),
            "rows_that_no_program_takes": (
                "    steps = tl.cdiv(tl.cdiv(n_rows, BLOCK_M) - part, n_parts)\n",
                "    steps = tl.cdiv(n_rows, BLOCK_M) // n_parts\n",
            ),
            "statistics_of_another_row": (
                "            rstd = tl.load(Stats + 4 * rows + 1)\n",
                "            rstd = tl.load(Stats + 4 * (rows // 2) + 1)\n",
            ),
            "long_rows_without_their_weight": (
                "        if HAS_WEIGHT:\n            g *= ",
                "        if HAS_WEIGHT and EVEN:\n            g *= ",
            ),
            "sums_exchange_their_places": (
                "        row += n_parts\n",
                "        row += 0\n",
            ),
            "rows_of_the_gradient_offset_in_32_bits": (
                "        rows = tl.minimum(offs_m, n_rows - 1)  # beyond",
                "        rows = tl.minimum(offs_m.to(tl.int32), n_rows - 1)  # beyond",
            ),
            "all_gradients_of_a_layernorm_for_each": (
                "    return tuple(dtype if need else None for dtype, need in zip(dtypes, needed, strict=True))\n",
                "    return tuple(dtype for dtype, need in zip(dtypes, needed, strict=True))\n",
            ),
            "parts_by_architecture": (
                "    c = config or configs_backward.layernorm_backward(m, n)\n",
                "    fewer = 250 * (launch.architecture(x) == 'sm_80')\n"
                "    c = config or configs_backward.layernorm_backward(m - fewer, n)\n",
            ),
        },
    ),
    *planted_in(
        "kernels/column_sums.py",
        ("tests/kernels/test_layernorm_backward.py", "tests/kernels/test_linear_backward.py"),
        {
            "sums_without_the_derivative": (
                "            x *= gelu_and_derivative(a, GELU)[1]\n",
                "            total += x\n            x *= gelu_and_derivative(a, GELU)[1]\n",
            ),
            "gelu_in_the_place_of_its_derivative": (
                "gelu_and_derivative(a, GELU)[1]",
                "gelu_and_derivative(a, GELU)[0]",
            ),
            "gradient_not_rounded_for_the_product": (
                "    store = pre_activation is not None or x.dtype != dtype\n",
                "    store = pre_activation is not None\n",
            ),
        },
    ),
    *planted_in(
        "kernels/blocks.py",
        ("tests/kernels/test_linear_backward.py",),
        {
            "wrong_tail_of_the_normal_distribution": (
                "        cdf = tl.where(x < 0, tail, 1.0 - tail)\n",
                "        cdf = tl.where(x < 0, 1.0 - tail, tail)\n",
            ),
            "a_coefficient_of_the_derivative": (
                "-0.7265760135",
                "-0.7266760135",
            ),
            "derivative_without_its_density": (
                "    return x * cdf, cdf + x * e * 0.3989422804014327\n",
                "    return x * cdf, cdf\n",
            ),
        },
    ),
    *planted_in(
        "kernels/linear_backward.py",
        ("tests/kernels/test_linear_backward.py",),
        {
            "layernorm_computed_for_nothing": (
                "    normed = run_layernorm(x, *norm, eps, linear[0].dtype) if gelu or needed[3] else None\n",
                "    normed = run_layernorm(x, *norm, eps, linear[0].dtype)\n",
            ),
            "bias_taken_for_the_weight_of_a_layernorm": (
                "    return *layernorm_backward.run(d_normed, x, norm[0], eps, types, added), *others\n",
                "    return *layernorm_backward.run(d_normed, x, norm[1], eps, types, added), *others\n",
            ),
        },
    ),
    *planted_in(
        "kernels/gelu_backward.py",
        ("tests/kernels/test_layernorm_mlp_backward.py",),
        {
            "depth_beyond_the_last_row_of_fc2": (
                "    k_rows = K if K % BLOCK_K != 0 else None\n",
                "    k_rows = None\n",
            ),
            "last_row_summed_again": (
                "        d_a = tl.where(mask, d_a, 0.0)  # rows beyond the last would enter the sums\n",
                "        d_a = d_a\n",
            ),
            "pre_activation_in_the_place_of_its_gelu": (
                "    h, derivative = gelu_and_derivative(a.to(tl.float32), FORM)\n",
                "    derivative = gelu_and_derivative(a.to(tl.float32), FORM)[1]\n    h = a.to(tl.float32)\n",
            ),
            "parts_of_the_first_row_block_alone": (
                "        tl.store(Parts + block_m.to(tl.int64) * N + offs_n,",
                "        tl.store(Parts + 0 * N + offs_n,",
            ),
            "bias_of_the_hidden_layer_sums_what_comes_before_the_gelu": (
                "offs_n, tl.sum(d_a, 0), mask=mask_n)",
                "offs_n, tl.sum(acc, 0), mask=mask_n)",
            ),
            "rows_of_fc2_offset_in_32_bits": (
                "    w_rows = tl.arange(0, BLOCK_K).to(tl.int64)\n",
                "    w_rows = tl.arange(0, BLOCK_K)\n",
            ),
        },
    ),
    *planted_in(
        "kernels/layernorm_mlp_backward.py",
        ("tests/kernels/test_layernorm_mlp_backward.py",),
        {
            "stream_does_not_pass_the_mlp": (
                "types_of((x, *norm), needed[:3]), of_residual)\n",
                "types_of((x, *norm), needed[:3]), None)\n",
            ),
            "rounded_gradient_of_the_stream": (
                "types_of((x, *norm), needed[:3]), of_residual)\n",
                "types_of((x, *norm), needed[:3]), rounded)\n",
            ),
            "product_for_the_bias_of_fc2": (
                "    if not (of_hidden or needed[5]):\n",
                "    if not (of_hidden or needed[5] or True):\n",
            ),
        },
    ),
    *planted_in(
        "kernels/operators.py",
        ("tests/kernels/test_layernorm_backward.py",),
        {
            "results_kept_that_nothing_reads": (
                "*(results[i] for i in keep))",
                "*(() if by_kernels is None else results))",
            ),
        },
    ),
]
