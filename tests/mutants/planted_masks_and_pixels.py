"""The planted bugs of the mask head's and the patch embedding's gradients; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

MASKS_AND_PIXELS = [
    *planted_in(
        "kernels/mask_head_backward.py",
        ("tests/kernels/test_mask_head_backward.py",),
        {
            "gradient_along_the_row_left_in": (
                "    dx = (d_unit - unit * tl.sum(unit * d_unit, 1)[:, None]) * (1.0 / norm)[:, None]\n",
                "    dx = d_unit * (1.0 / norm)[:, None]\n",
            ),
            "gradient_of_the_rows_not_divided": (
                "[:, None]) * (1.0 / norm)[:, None]\n    tl.store(DX",
                "[:, None])\n    tl.store(DX",
            ),
            "unit_rows_beyond_the_last": (
                "    mask = (rows < n_rows)[:, None]\n    if D != D_PAD",
                "    mask = (rows <= n_rows)[:, None]\n    if D != D_PAD",
            ),
            "columns_beyond_the_width": (
                "        mask = mask & (cols < D)[None, :]\n    return rows",
                "        mask = mask\n    return rows",
            ),
            "last_columns_of_the_cosines_lost": (
                "    for d_0 in tl.range(0, D, BLOCK_D):",
                "    for d_0 in tl.range(0, D // BLOCK_D * BLOCK_D, BLOCK_D):",
            ),
            "classes_of_the_first_image": (
                "        C += tl.cast(b, tl.int64) * N_CLASSES * D\n",
                "        C += 0\n",
            ),
            "padded_classes_in_the_variance_of_the_gradient": (
                "z = tl.where(real[None, :], s - mean[:, None], 0.0)\n            rstd",
                "z = s - mean[:, None]\n            rstd",
            ),
            "padded_rows_of_infinite_r": (
                "            rstd = tl.where(here, tl.rsqrt(",
                "            rstd = tl.where(here | True, tl.rsqrt(",
            ),
            "eps_left_out_of_the_gradient": (
                "tl.rsqrt(tl.sum(z * z, 1) * (1.0 / N_CLASSES) + eps), 0.0)",
                "tl.rsqrt(tl.sum(z * z, 1) * (1.0 / N_CLASSES)), 0.0)",
            ),
            "mean_of_h_left_in": (
                "            ds = (h - mean_h[:, None] - z * mean_hz[:, None]) * rstd[:, None]\n",
                "            ds = (h - z * mean_hz[:, None]) * rstd[:, None]\n",
            ),
            "projection_on_z_left_in": (
                "            ds = (h - mean_h[:, None] - z * mean_hz[:, None]) * rstd[:, None]\n",
                "            ds = (h - mean_h[:, None]) * rstd[:, None]\n",
            ),
            "weight_of_the_norm_forgotten": (
                "        h = dy * tl.load(NormWeight + offs_k, mask=real, other=0.0).to(tl.float32)[None, :]\n",
                "        h = dy\n",
            ),
            "sums_of_the_last_tile_alone": (
                "            sum_dyz += tl.sum(dy * z, 0)\n",
                "            sum_dyz = tl.sum(dy * z, 0)\n",
            ),
            "sums_exchanged": (
                "        tl.store(mine, sum_dyz, mask=real)\n",
                "        tl.store(mine, sum_dy, mask=real)\n",
            ),
            "slabs_merged_without_their_distance": (
                "        squares += tl.sum(centred * centred, 1) + step * moved * k_0\n",
                "        squares += tl.sum(centred * centred, 1)\n",
            ),
            "mean_of_h_z_not_moved": (
                "slab_h * (step - moved) - sum_h * moved\n",
                "slab_h * (step - moved)\n",
            ),
            "first_slab_for_all": (
                "    k_0 = tl.program_id(0) % n_slabs * K_PAD\n",
                "    k_0 = tl.program_id(0) % n_slabs * 0\n",
            ),
            "all_programs_take_all_tiles": (
                "    for tile in tl.range(part, n_tiles, n_parts):",
                "    for tile in tl.range(part, n_tiles, 1):",
            ),
            "as_many_partial_sums_as_tiles": (
                "    n_parts = min(n_tiles, PROGRAMS)\n",
                "    n_parts = n_tiles\n",
            ),
            "classes_gradient_for_the_patches_projection": (
                "        found[2] = launch.call(_weight_gradient, patches, dp)",
                "        found[2] = launch.call(_weight_gradient, patches, dp.flip(0))",
            ),
            "upstream_gradient_taken_for_dense": (
                "    dy = launch.contiguous(dy)\n",
                "    dy = dy\n",
            ),
        },
    ),
    *planted_in(
        "kernels/mask_head.py",
        ("tests/kernels/test_mask_head_backward.py",),
        {
            "norms_gradient_for_each_wish": (
                "    wanted = [*needed[:4], needed[4] or needed[5]]\n",
                "    wanted = [*needed[:4], True]\n",
            ),
            "bias_gradient_for_the_weight": (
                "        norm[i].to(t.dtype) if n",
                "        norm[1].to(t.dtype) if n",
            ),
        },
    ),
    *planted_in(
        "kernels/partial_sums.py",
        ("tests/kernels/test_partial_sums.py",),
        {
            "partial_sums_beyond_the_last": (
                "        mask = (rows < n_partials)[:, None] & (cols < n)[None, :]\n",
                "        mask = (rows <= n_partials)[:, None] & (cols < n)[None, :]\n",
            ),
            "last_partial_sums_lost": (
                "    for s_0 in tl.range(0, n_partials, BLOCK_S):",
                "    for s_0 in tl.range(0, n_partials // BLOCK_S * BLOCK_S, BLOCK_S):",
            ),
            "partial_sums_not_scaled": (
                "    y = tl.sum(total, 0) * scale\n",
                "    y = tl.sum(total, 0)\n",
            ),
        },
    ),
    *planted_in(
        "kernels/pixels.py",
        ("tests/kernels/test_pixels_to_tokens.py",),
        {
            "padded_with_black": (
                ".fill_(CENTRE)",
                ".fill_(0)",
            ),
            "half_pixels_not_centred": (
                "- (16.0 + 2.0)",
                "- 16.0",
            ),
            "unaligned_images_read_in_place": (
                " and all(n % 16 == 0 for n in offsets)",
                "",
            ),
        },
    ),
    *planted_in(
        "kernels/pixels_to_tokens_backward.py",
        ("tests/kernels/test_pixels_to_tokens_backward.py",),
        {
            "rows_beyond_the_last_patch_count": (
                "        mask = (offs_m < end)[:, None] & mask_n[None, :]\n",
                "        mask = mask_n[None, :]\n",
            ),
            "rows_beyond_the_range_count": (
                "    end = tl.minimum(start + range_rows, n_rows)\n",
                "    end = n_rows\n",
            ),
            "first_range_for_all": (
                "    start = part * range_rows\n",
                "    start = part * 0\n",
            ),
            "positions_of_patches_exchanged": (
                "        patch_y, patch_x = patch // grid_w, patch % grid_w\n",
                "        patch_y, patch_x = patch % grid_h, patch // grid_h\n",
            ),
            "pixels_offset_in_32_bits": (
                "        corner = image * stride_pb + ",
                "        corner = image.to(tl.int32) * stride_pb + ",
            ),
            "image_rows_offset_in_32_bits": (
                "(patch_y * P).to(tl.int64) * stride_ph",
                "(patch_y * P) * stride_ph",
            ),
            "gradient_offset_in_32_bits": (
                "image * stride_yb + patch.to(tl.int64) * stride_yn",
                "image.to(tl.int32) * stride_yb + patch.to(tl.int64) * stride_yn",
            ),
            "gradient_rows_offset_in_32_bits": (
                "image * stride_yb + patch.to(tl.int64) * stride_yn",
                "image * stride_yb + patch * stride_yn",
            ),
            "units_of_bytes_forgotten": (
                "    return partial_sums.add(partials, (d, K), dy.dtype, 0.5)",
                "    return partial_sums.add(partials, (d, K), dy.dtype, 1.0)",
            ),
            "one_range_for_each_block": (
                "    range_blocks = triton.cdiv(blocks, max(1, PROGRAMS // max(1, tiles)))\n",
                "    range_blocks = 1\n",
            ),
        },
    ),
    *planted_in(
        "kernels/pixels_to_tokens.py",
        ("tests/kernels/test_pixels_to_tokens_backward.py",),
        {
            "extra_tokens_gradient_for_the_weights": (
                "PIXELS_TO_TOKENS_BACKWARD(dy[:, E:].to(weight.dtype), pixels, P)",
                "PIXELS_TO_TOKENS_BACKWARD(dy[:, :-E].to(weight.dtype), pixels, P)",
            ),
            "border_biases_exchanged": (
                "last[:-1].sum(0), grid[-1, :-1].sum(0), last[-1]]",
                "grid[-1, :-1].sum(0), last[:-1].sum(0), last[-1]]",
            ),
            "corner_counted_twice": (
                "last[:-1].sum(0), grid[-1, :-1].sum(0), last[-1]]",
                "last.sum(0), grid[-1, :-1].sum(0), last[-1]]",
            ),
            "borders_without_padding": (
                "    if pixels.shape[1] % patch_size or pixels.shape[2] % patch_size:\n        grid = sums",
                "    if pixels.shape[1] % patch_size or pixels.shape[2] % patch_size or True:\n        grid = sums",
            ),
            "positions_summed_in_half_types": (
                "dy.sum(0, dtype=torch.promote_types(dy.dtype, torch.float32))",
                "dy.cumsum(0)[-1] if len(dy) else dy.sum(0)",
            ),
        },
    ),
]
