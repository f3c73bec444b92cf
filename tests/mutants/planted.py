"""The planted bugs: one text edit each, in a file of the kernels, and the tests that should find it."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str  # occurs exactly once in the file
    new: str
    tests: tuple[str, ...]
    reason: str | None = None  # why it may survive


def _mutants(file: str, tests: tuple[str, ...], edits: dict[str, tuple[str, ...]]) -> list[Mutant]:
    return [Mutant(name, file, edit[0], edit[1], tests, *edit[2:]) for name, edit in edits.items()]


ATTENTION = _mutants(
    "kernels/attention.py",
    ("tests/test_attention.py",),
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
            "            qk = tl.where((end + tl.arange(0, BLOCK_N))[None, :] < n_keys, qk, float(\"-inf\"))\n",
            "",
        ),
        "row_mask_missing": (
            "mask=((row + offs)[:, None] < n_rows) & mask_d",
            "mask=((row + offs)[:, None] < n_rows + ROWS) & mask_d",
        ),
        "row_mask_one_too_many": (
            "mask=((row + offs)[:, None] < n_rows) & mask_d",
            "mask=((row + offs)[:, None] <= n_rows) & mask_d",
        ),
        "padded_columns_read": (
            "        elif HEAD_DIM != HEAD_PAD:\n            x = tl.load(pointers, mask=mask_d, other=0.0)",
            "        elif HEAD_DIM != HEAD_PAD:\n            x = tl.load(pointers)",
        ),
        "batch_offset_in_32_bits": (
            "base = X + b.to(tl.int64) * stride_b",
            "base = X + b * stride_b",
        ),
        "output_offset_in_32_bits": (
            "o_rows = Out + b.to(tl.int64) * stride_ob",
            "o_rows = Out + b * stride_ob",
        ),
        "peeled_offset_in_32_bits": (
            "k_rows = KRows + b.to(tl.int64) * stride_kb",
            "k_rows = KRows + b * stride_kb",
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
            "        m_i, l_i, acc = _softmax_step(qk, v, m_i, l_i, acc, scale_log2, PRECISION)\n    if TAIL:  # noqa: SIM102",
            "        qk = qk.to(q.dtype).to(tl.float32)\n"
            "        m_i, l_i, acc = _softmax_step(qk, v, m_i, l_i, acc, scale_log2, PRECISION)\n    if TAIL:  # noqa: SIM102",
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
            "v = _load_rows(V, b, v_head + h, n_0,",
            "v = _load_rows(V, b, k_head + h, n_0,",
        ),
        "value_stride_of_keys": (
            "v = _load_rows(V, b, v_head + h, n_0, stride_vb, stride_vn, stride_vh, n_keys,",
            "v = _load_rows(V, b, v_head + h, n_0, stride_kb, stride_kn, stride_kh, n_keys,",
        ),
        "second_peeled_row_is_the_first": (
            "k_1 = tl.load(k_rows + stride_kn + offs_d,",
            "k_1 = tl.load(k_rows + offs_d,",
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
            "tl.log2(l_i)) * 0.6931471805599453",
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
)  # fmt: skip

MUTANTS = [*ATTENTION]
