"""The planted bugs of what attention is looked at by; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

_KERNELS = ("tests/kernels/test_attention_maps.py",)
_LAYERS = ("tests/analysis/test_attention_layers.py",)
_MAPS, _NUMBERS = ("tests/analysis/test_maps.py",), ("tests/analysis/test_statistics.py",)
MAPS = [
    *planted_in(
        "kernels/attention_statistics.py",
        _KERNELS,
        {
            "patches_beyond_the_last_counted": (
                "[None, :] < n_left, s, _LEAST)",
                "[None, :] < n_left + 1, s, _LEAST)",
            ),
            "centre_not_rescaled": ("y_i = y_i * alpha + ", "y_i = y_i + "),
            "entropy_without_the_new_maximum": ("alpha * (t_i + l_i * shift) +", "alpha * t_i +"),
            "tokens_behind_the_patches_left_out": (
                "key = tl.where(other < first, other, other + n_patches).to(tl.int64)",
                "key = other.to(tl.int64)",
            ),
            "square_of_the_distance": ("tl.sum(p * tl.sqrt(squared), 1)", "tl.sum(p * squared, 1)"),
            "queries_placed_from_token_0": ("_place((rows - first).to(tl.float32)", "_place(rows.to(tl.float32)"),
            "share_of_the_patches": ("l_o * a_o / total, mask=mask", "l_i * a_i / total, mask=mask"),
            "means_over_all_tokens": ("y_i / l_i, mask=mask", "y_i / total, mask=mask"),
            "entropy_of_the_patches_alone": (
                "total = l_i * a_i + l_o * a_o\n    t = a_i",
                "total = l_i * a_i + l_o * a_o\n    m_o, l_o, t_o = m_i, 0.0, 0.0\n    t = a_i",
            ),
            "class_tokens_have_a_distance": ("tl.where(is_patch, d_i / l_i, 0.0)", "d_i / l_i"),
            "one_row_of_the_grid_too_wide": ("return y, i - y * grid_w", "return y, i - y * (grid_w - 1)"),
        },
    ),
    *planted_in(
        "kernels/attention_rows.py",
        _KERNELS,
        {
            "log_sum_exp_in_nats": ("- (lse * LOG2E)[:, None])", "- lse[:, None])"),
            "rows_written_beyond_the_last": (
                "mask=(m_0 + offs_m[:, None] < n_queries) & (n_0",
                "mask=(m_0 + offs_m[:, None] < BLOCK_M * n_blocks_m) & (n_0",
            ),
            "keys_written_beyond_the_last": (
                "(n_0 + offs_n[None, :] < n_keys))",
                "(offs_n[None, :] < n_keys))",
            ),
        },
    ),
    *planted_in(
        "kernels/attention_transposed.py",
        _KERNELS,
        {
            "log_sum_exp_of_the_first_queries": ("tl.load(Lse + m_0) * LOG2E", "tl.load(Lse) * LOG2E"),
            "columns_of_x_beside_each_other": (
                "offs_r.to(tl.int64)[None, :] * stride_xr",
                "offs_r.to(tl.int64)[None, :]",
            ),
            "x_of_the_first_head": ("X += b * stride_xb + h * stride_xh", "X += b * stride_xb"),
            "columns_beyond_the_first_block_lost": (
                "offs_r = r_0 + tl.arange(0, BLOCK_R)",
                "offs_r = tl.arange(0, BLOCK_R)",
            ),
        },
    ),
    *planted_in(
        "kernels/reference_maps.py",
        _KERNELS,
        {
            "all_scores_at_once": ("BLOCK = 2**21", "BLOCK = 2**40"),
            "blocks_of_queries_not_added": (
                "sums[-1] = sums[-1] + added",
                "sums[-1] = added",
            ),
            "places_of_the_first_queries": (
                "(y[rows, None] - y[patches]).square()",
                "(y[:1, None] - y[patches]).square()",
            ),
            "means_not_divided_by_their_share": (
                "of_patches = scores[..., patches].softmax(-1)",
                "of_patches = log_p[..., patches].exp()",
            ),
        },
    ),
    *planted_in(
        "segmenter/analysis/attention_layers.py",
        _LAYERS,
        {
            "what_others_make_of_the_result_is_compared": ("prepend=True", "prepend=False"),
            "any_attention_is_shown": ("if not difference <= TOLERANCE", "if False and not difference <= TOLERANCE"),
            "hooks_stay": ("            handle.remove()\n", "            pass\n"),
            "layers_that_were_not_called_are_passed_over": ("if n != 1]", "if n > 9]"),
        },
    ),
    *planted_in(
        "segmenter/analysis/maps.py",
        _MAPS,
        {
            "rollout_without_the_residual": (
                "r = (attended.mean(2, keepdim=True) + r) / 2",
                "r = attended.mean(2, keepdim=True)",
            ),
            "rollout_from_the_first_layer_up": ("range(top, -1, -1)", "range(top + 1)"),
            "sum_of_a_class_in_place_of_its_mean": ("1 / len(query.tokens)", "1.0"),
            "rows_of_the_token_before": (".to(seen.q.device) + first", ".to(seen.q.device)"),
            "columns_counted_by_rows": ("row * of.grid[1] + column", "row * of.grid[0] + column"),
        },
    ),
    *planted_in(
        "segmenter/analysis/subject.py",
        _MAPS,
        {
            "points_of_the_image_before_it_was_resized": ("(int(at * scale) //", "(int(at) //"),
            "points_rounded_beyond_the_last_patch": ("min(row, self.grid[0] - 1)", "row"),
            "points_of_three_numbers": ("found.ndim != 2 or found.shape[1] != 2", "found.ndim != 2"),
            "letters_of_a_class_name": (" and not isinstance(values, str)", ""),
            "training_mode_is_no_matter": ("if model.training:", "if False:"),
        },
    ),
    *planted_in(
        "segmenter/cli/commands/attention.py",
        ("tests/cli/test_attention.py",),
        {"drawn_twice": ("list({look.name: look for look in looks}.values())", "looks")},
    ),
    *planted_in(
        "segmenter/analysis/statistics.py",
        _NUMBERS,
        {
            "mean_distance_in_patches": (".mean((-2, -1)) * self.patch_size", ".mean((-2, -1))"),
            "distances_of_class_tokens_are_0": (
                "by_name[name][..., :first] = by_name[name][..., first + of.n_patches :] = math.nan",
                "by_name[name][..., :first] = by_name[name][..., first + of.n_patches :] = 0.0",
            ),
        },
    ),
]
