"""The planted bugs of backward passes; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

ATTENTION_BACKWARD = [
    *planted_in(
        "kernels/attention_backward.py",
        ("tests/kernels/test_attention_backward.py",),
        {
            "delta_beyond_the_queries_not_zero": (
                "    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)  # 0 beyond N\n",
                "    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)\n"
                '    delta = tl.where(m_0 + offs_m < n_queries, delta, float("nan"))\n',
            ),
            "gradient_of_lse_added": (
                "        delta -= tl.load(pointers",
                "        delta += tl.load(pointers",
            ),
            "lse_stays_natural": (
                "lse * LOG2E, float",
                "lse, float",
            ),
            "keys_beyond_the_last_not_masked": (
                "        p = tl.where(tl.arange(0, k.shape[0])[None, :] < n_left, p, 0.0)\n",
                "        p = p\n",
            ),
            "key_mask_one_too_many": (
                "[None, :] < n_left, p, 0.0)",
                "[None, :] <= n_left, p, 0.0)",
            ),
            "last_tile_of_keys_lost": (
                "        if end < n_keys:  # always true",
                "        if end < 0:  # always true",
            ),
            "last_tile_of_queries_lost": (
                "    for m_0 in tl.range(0, n_queries, BLOCK_M):",
                "    for m_0 in tl.range(0, n_queries // BLOCK_M * BLOCK_M, BLOCK_M):",
            ),
            "dk_not_scaled": (
                "dk * scale, stride_dkn",
                "dk, stride_dkn",
            ),
            "dq_not_scaled": (
                "dq * scale, stride_dqn",
                "dq, stride_dqn",
            ),
            "dk_and_dv_exchange_their_places": (
                "    _store_tile(DV, [b, v_head + h, n_0, 0], dv,",
                "    _store_tile(DV, [b, k_head + h, n_0, 0], dv,",
            ),
            "delta_left_out_of_ds": (
                "        ds = p * (dp - delta[None, :])\n",
                "        ds = p * dp\n",
            ),
            "dv_of_another_product": (
                "        dv = tl.dot(p.to(do.dtype), do, dv,",
                "        dv = tl.dot(dp.to(do.dtype), do, dv,",
            ),
            "rows_of_the_next_image_in_the_last_tile": (
                "    rows = n_queries if TAIL and not DESCRIPTORS else None\n",
                "    rows = None\n",
            ),
            "stored_beyond_the_last_row": (
                "    mask = (index[2] + rows[:, None] < n_rows) & (cols[None, :] < HEAD_DIM)\n",
                "    mask = cols[None, :] < HEAD_DIM\n",
            ),
            "upstream_offset_in_32_bits": (
                "    DO += b * stride_db + h * stride_dh\n",
                "    DO += b.to(tl.int32) * stride_db.to(tl.int32) + h * stride_dh\n",
            ),
            "query_offset_in_32_bits": (
                "        DO += b.to(tl.int64) * stride_ob + h.to(tl.int64) * stride_oh\n        DK += ",
                "        DO += b * stride_ob.to(tl.int32) + h.to(tl.int64) * stride_oh\n        DK += ",
            ),
        },
    ),
    *planted_in(
        "kernels/attention.py",
        ("tests/kernels/test_attention_backward.py",),
        {
            "all_gradients_for_each": (
                "need_q, need_kv = needed[0], needed[1] or needed[2]",
                "need_q, need_kv = True, True",
            ),
            "gradient_of_lse_forgotten": (
                "ATTENTION_BACKWARD(grad, qkv, o, lse, grad_lse, n_heads), None",
                "ATTENTION_BACKWARD(grad, qkv, o, lse, None, n_heads), None",
            ),
        },
    ),
    *planted_in(
        "kernels/repeat.py",
        ("tests/kernels/test_attention_backward.py",),
        {
            "empty_results_taken_for_each_other": (
                "            raise Ambiguous  # whatever is empty is at address 0\n",
                "            pass\n",
            ),
        },
    ),
]
