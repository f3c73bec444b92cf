"""The planted bugs of rotary positions; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

ROTARY = [
    *planted_in(
        "kernels/rotate.py",
        ("tests/kernels/test_rotate.py",),
        {
            "turned_the_other_way": (
                "            y_a = x_a * cos_a - x_b * sin_a\n            y_b = x_b * cos_b + x_a * sin_b\n",
                "            y_a = x_a * cos_a + x_b * sin_a\n            y_b = x_b * cos_b - x_a * sin_b\n",
            ),
            "sines_of_the_other_half": (
                "y_a = x_a * cos_a - x_b * sin_a",
                "y_a = x_a * cos_a - x_b * sin_b",
            ),
            "transposed_by_the_sign_alone": (
                "y_a = x_a * cos_a + x_b * sin_b",
                "y_a = x_a * cos_a + x_b * sin_a",
            ),
            "columns_of_the_wrong_half": (
                "a = tl.load(rows[:, None] + cols[None, :], mask=mask, other=other).to(tl.float32)\n        b = ",
                "b = tl.load(rows[:, None] + cols[None, :], mask=mask, other=other).to(tl.float32)\n        a = ",
            ),
            "interleaved_as_if_it_were_halves": (
                "    if INTERLEAVED:  # dense columns, which are taken apart in registers\n",
                "    if INTERLEAVED and HEAD_DIM != 64:\n",
            ),
            "extra_tokens_turned": (
                "turned = inside & (rows >= n_extra)",
                "turned = inside & (rows >= n_extra - 1)",
            ),
            "extra_tokens_multiplied_by_one_and_zero": (
                "        y_a = tl.where(turned[:, None], y_a, x_a)",
                "        y_a = y_a",
            ),
            "tables_from_the_first_token_on": (
                "cos_rows = Cos + b * stride_cb + (rows - n_extra) * stride_cn",
                "cos_rows = Cos + b * stride_cb + (rows - n_extra + (n_extra > 0)) * stride_cn",
            ),
            "tables_of_the_first_image": (
                "sin_rows = Sin + b * stride_sb + (rows",
                "sin_rows = Sin + (rows",
            ),
            "tables_of_the_first_head": (
                "sin_a, sin_b = _load_pairs(sin_rows + t * stride_st,",
                "sin_a, sin_b = _load_pairs(sin_rows,",
            ),
            "heads_beyond_the_last": (
                "tl.range(h_0, tl.minimum(h_0 + GROUP, HEADS))",
                "tl.range(h_0, h_0 + GROUP)",
            ),
            "images_offset_in_32_bits": (
                "b = (pid // N_GROUPS // n_blocks).to(tl.int64)",
                "b = pid // N_GROUPS // n_blocks",
            ),
            "heads_offset_in_32_bits": (
                "tl.cast(h, tl.int64) * stride_xh",
                "tl.cast(h, tl.int32) * stride_xh",
            ),
            "rounded_between_the_products": (
                "            y_b = x_b * cos_b + x_a * sin_b\n",
                "            y_b = (x_b * cos_b).to(Y.dtype.element_ty).to(tl.float32) + x_a * sin_b\n",
            ),
            "gradient_turned_as_the_result": (
                "sin, interleaved, not transposed), None",
                "sin, interleaved, transposed), None",
            ),
            "gradient_of_learned_tables_lost": (
                "    if needed[1] or needed[2]:\n        return None\n",
                "",
            ),
        },
    ),
    *planted_in(
        "kernels/reference_rotary.py",
        ("tests/kernels/test_rotate.py",),
        {
            "definition_turned_the_other_way": (
                "pairs = a * cos_a - b * sin_a, b * cos_b + a * sin_b",
                "pairs = a * cos_a + b * sin_a, b * cos_b - a * sin_b",
            ),
            "definition_of_the_other_convention": (
                "if interleaved else x.chunk(2, -1)",
                "if not interleaved else x.chunk(2, -1)",
            ),
        },
    ),
    *planted_in(
        "segmenter/layers.py",
        ("tests/dropin/test_rotary.py",),
        {
            "keys_not_turned": (
                "    q, k = ops.rotate(qk, cos, sin, interleaved).split(heads, 2)\n",
                "    q, k = ops.rotate(qk, cos, sin, interleaved)[:, :, :heads], qk[:, :, heads:]\n",
            ),
            "values_turned_in_place_of_keys": (
                "q, k = (ops.rotate(t, cos, sin, interleaved) for t in (q, k))",
                "q, v = (ops.rotate(t, cos, sin, interleaved) for t in (q, v))",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/rotary.py",
        ("tests/dropin/test_rotary.py",),
        {
            "cosines_taken_for_sines": (
                "return (second, first) if self.sines_first else (first, second)",
                "return first, second",
            ),
            "columns_of_the_grid_taken_for_rows": (
                "        cos, sin = parts\n",
                "        cos, sin = (t.unflatten(-2, (2, -1)).transpose(-3, -2).flatten(-3, -2) for t in parts)\n",
            ),
            "any_number_of_extra_tokens": (
                "(self.extra is not None and tokens - shape[-2] != self.extra)",
                "False",
            ),
            "tables_of_any_type": (
                "if cos.dtype not in FLOATS or sin.dtype not in FLOATS or not",
                "if not",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/verify.py",
        ("tests/dropin/test_rotary.py",),
        {
            "first_form_taken_for_granted": (
                "return _same(copies, lambda m: modules.attention_fused(m, plan, x, EAGER, rotation), first) and _same",
                "return True or _same",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/modules.py",
        ("tests/dropin/test_rotary.py", "tests/dropin/test_published_dinov3.py"),
        {
            "biases_of_their_own_forgotten": (
                "        bias = masked_bias(qkv) if bias is None else bias\n",
                "        bias = masked_bias(qkv)\n",
            ),
            "biases_of_keys_not_masked": (
                "        bias = masked_bias(qkv) if bias is None else bias\n",
                "        bias = qkv.bias if bias is None else bias\n",
            ),
            "norms_of_queries_and_keys_passed_over": (
                "type(layers.get(name)) not in (type(None), nn.Identity)",
                "type(layers.get(name)) in ()",
            ),
            "keys_normed_as_queries": (
                '    names = ("q_norm", "k_norm")\n',
                '    names = ("q_norm", "q_norm")\n',
            ),
            "changes_of_the_block_itself_layer_by_layer": (
                "            return Obstacles(reason)\n        parts = ",
                "            pass\n        parts = ",
            ),
            "masks_forgotten_beside_positions": (
                "if plan.rotary is not None and set(passed) <= {plan.rotary.argument}:",
                "if plan.rotary is not None:",
            ),
        },
    ),
]
