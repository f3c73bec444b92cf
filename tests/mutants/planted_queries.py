"""The planted bugs of labels from queries; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

_TESTS = ("tests/kernels/test_queries_argmax.py",)
_EOMT = ("tests/eomt/test_eomt.py",)
QUERIES = [
    *planted_in(
        "kernels/queries_argmax.py",
        _TESTS,
        {
            "queries_no_sigmoid": (
                "(counts_y * counts_x)[None, :] / (1.0 + tl.exp2(-mask * LOG2E))",
                "(counts_y * counts_x)[None, :] * mask",
            ),
            "queries_sigmoid_to_base_2": ("tl.exp2(-mask * LOG2E)", "tl.exp2(-mask)"),
            "queries_weights_of_one_axis": (
                "(counts_y * counts_x)[None, :] /",
                "(counts_x + 0.0 * counts_y)[None, :] /",
            ),
            "queries_second_canvas_row_left_out": ("width, window_w, tap % n_taps)", "width, window_w, tap // n_taps)"),
            "queries_mask_cells_rounded_to_the_first": (
                "    high = tl.load(Ints + 2 * length + window + place)\n",
                "    high = low\n",
            ),
            "queries_window_goes_on_beyond_its_end": (
                "covered = (place >= 0) & (place < window) & inside",
                "covered = (place >= 0) & inside",
            ),
            "queries_classes_of_the_first_window": (
                "OfClasses = Classes + window * class_rows * class_cols",
                "OfClasses = Classes + image * (n_rows * n_cols) * class_rows * class_cols",
            ),
            "queries_windows_row_by_column": ("window_y * n_cols + window_x\n", "window_x * n_rows + window_y\n"),
            "queries_beyond_the_last_read": (
                "in_queries = (q < n_queries)[:, None]",
                "in_queries = (q < n_queries + BLOCK_Q)[:, None]",
                "what is read there is multiplied by 0, unless it is no number",
            ),
            "queries_last_query_left_out": (
                "for q_0 in range(0, n_queries, BLOCK_Q):",
                "for q_0 in range(0, n_queries - 1, BLOCK_Q):",
            ),
            "queries_padding_is_a_class": (
                'tl.where(c[None, :] < n_classes, acc, float("-inf"))',
                'tl.where(c[None, :] < n_classes, acc, float("inf"))',
            ),
            "queries_last_class_left_out": (
                "tl.where(c[None, :] < n_classes, acc",
                "tl.where(c[None, :] < n_classes - 1, acc",
            ),
            "queries_later_blocks_win_ties": ("    better = value > best\n", "    better = value >= best\n"),
            "queries_second_block_counted_from_0": (
                "_best(acc_2, c_0 + BLOCK_1, n_classes",
                "_best(acc_2, c_0, n_classes",
            ),
            "queries_half_operands": (
                "    return F.pad(found,",
                "    return F.pad(found.half().float(),",
            ),
            "queries_one_column_too_many_written": ("    in_x = x < width\n", "    in_x = x <= width\n"),
            "queries_window_offset_in_32_bits": (
                "image = (pid // (n_tiles_x * n_tiles_y)).to(tl.int64)",
                "image = pid // (n_tiles_x * n_tiles_y)",
                "needs 4 GiB of masks",
            ),
        },
    ),
    *planted_in(
        "kernels/canvas_axis.py",
        _TESTS,
        {
            "queries_average_of_windows_not_divided": (
                "(1 - self.weight) / self.covering[self.low]",
                "(1 - self.weight)",
            ),
            "queries_window_counted_beyond_its_end": (
                "pixels < starts[:, None] + window",
                "pixels <= starts[:, None] + window",
            ),
            "queries_last_window_of_a_tile_left_out": (
                'stop = np.searchsorted(self.anchors, self.high[last], side="right")',
                'stop = np.searchsorted(self.anchors, self.low[tiles], side="right")',
            ),
            "queries_uncovered_pixels_divide_by_0": ("weight, np.maximum(covering, 1))", "weight, covering)"),
        },
    ),
    *planted_in(
        "kernels/reference_queries.py",
        _TESTS,
        {
            "queries_no_object_left_out_before_the_softmax": (
                "return wide.softmax(-1)[..., :-1].transpose",
                "return wide[..., :-1].softmax(-1).transpose",
            ),
            "queries_no_object_is_the_first": ("softmax(-1)[..., :-1]", "softmax(-1)[..., 1:]"),
            "queries_softmax_over_queries": ("wide.softmax(-1)[", "wide.softmax(-2)["),
            "queries_definition_without_sigmoid": ("upsampled.sigmoid().flatten(1)", "upsampled.flatten(1)"),
            "queries_sigmoid_before_upsampling": (
                "_between(cells, 2, cols.cell_low[x]",
                "_between(4 * cells.sigmoid() - 2, 2, cols.cell_low[x]",
            ),
            "queries_definition_sums_windows": ("    return total / covering\n", "    return total\n"),
            "queries_rows_of_the_first_block": (
                "_between(scores, 1, low, high, rows.weight[block])",
                "_between(scores, 1, low, high, rows.weight[: len(low)])",
            ),
        },
    ),
    *planted_in(
        "kernels/device_tables.py",
        _TESTS,
        {
            "queries_tables_of_any_shape": (
                "    tables = _TABLES.get(key) or",
                "    tables = next(iter(_TABLES.values()), None) or",
            ),
        },
    ),
    *planted_in(
        "segmenter/eomt/preprocessing.py",
        _EOMT,
        {
            "eomt_windows_do_not_overlap": (
                "tuple(int(i * (window - overlap)) for i in range(n))",
                "tuple(int(i * window) for i in range(n))",
            ),
            "eomt_windows_rounded_to_nearest": ("int(i * (window - overlap))", "round(i * (window - overlap))"),
            "eomt_windows_along_the_short_side": (
                "if self.split and canvas[0] > canvas[1]:",
                "if self.split and canvas[0] < canvas[1]:",
            ),
            "eomt_windows_before_images": ("torch.stack(windows, 1)", "torch.stack(windows, 0)"),
            "eomt_padding_is_grey": (
                "x = F.pad(x, (0, w - canvas[1], 0, h - canvas[0]))",
                "x = F.pad(x, (0, w - canvas[1], 0, h - canvas[0]), value=128)",
            ),
        },
    ),
    *planted_in(
        "segmenter/eomt/model.py",
        _EOMT,
        {
            "eomt_masks_decided_as_off": (
                "tuple(torch.as_tensor(network.attn_mask_probs).tolist())",
                "(0.0,) * len(network.attn_mask_probs)",
            ),
            "eomt_masks_decided_by_a_tensor": (
                "    network.attn_mask_probs = probabilities\n",
                "    network.attn_mask_probs = torch.tensor(probabilities)\n",
            ),
            "eomt_kernels_for_eager_alone": (
                'if self.ops.name != "eager" and why_not_on',
                'if self.ops.name == "eager" and why_not_on',
            ),
            "eomt_masks_in_half_types": (
                "queries_argmax(masks, classes, *geometry), largest",
                "queries_argmax(masks.bfloat16(), classes.bfloat16(), *geometry), largest",
            ),
            "eomt_options_ignored": (
                "        if options:\n            raise",
                "        if not self:\n            raise",
            ),
        },
    ),
]
