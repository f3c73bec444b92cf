"""The planted bugs of the loss that makes no logits of pixels; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

LOSS = [
    *planted_in(
        "kernels/upsample_cross_entropy.py",
        ("tests/kernels/test_upsample_cross_entropy.py",),
        {
            "labels_of_the_padding_counted": (
                "inside = (i < P) & (y >= 0) & (y < height) & (x >= 0) & (x < width)",
                "inside = (i < P) & (y >= 0) & (x >= 0) & (x < width)",
            ),
            "pixels_of_the_next_cell_counted": (
                "inside = (i < P) & ",
                "inside = ",
            ),
            "ignored_pixels_counted": (
                "counts = inside & (label != ignore_index)",
                "counts = inside",
            ),
            "ignored_label_is_a_class_of_the_padding": (
                "hot = (label[:, None] == offs_k[None, :]) & mask_k[None, :]",
                "hot = label[:, None] == offs_k[None, :]",
                "its weight is 0 and its pixel is left out everywhere: the mask keeps infinities out of the sums",
            ),
            "half_a_pixel_off": (
                "SHIFT: tl.constexpr = 0.5 + 0.5 * (P % 2)",
                "SHIFT: tl.constexpr = 0.0 + 0.5 * (P % 2)",
            ),
            "odd_patches_half_a_pixel_off": (
                "SHIFT: tl.constexpr = 0.5 + 0.5 * (P % 2)",
                "SHIFT: tl.constexpr = 0.5",
            ),
            "corners_swapped": (
                "g_01 += (1.0 - t) * rightward",
                "g_01 += t * rightward",
            ),
            "no_label_in_the_gradient": (
                " - tl.where(hot, own[:, None], 0.0)\n",
                "\n",
            ),
            "smoothing_without_weights": (
                "back -= each[:, None] * weight[None, :]",
                "back -= each[:, None] * tl.where(mask_k, 1.0, 0.0)[None, :]",
            ),
            "overflow_of_large_scores": (
                "highest = tl.max(z, 1)\n",
                "highest = tl.max(z, 1) * 0.0\n",
            ),
            "unknown_labels_pass": (
                'tl.sum(tl.where(hot, z, 0.0), 1), float("nan"))',
                "tl.sum(tl.where(hot, z, 0.0), 1), 0.0)",
            ),
            "last_class_wins_ties": (
                "best = tl.min(tl.where(z == highest[:, None], offs_k[None, :], K_PAD), 1)",
                "best = tl.max(tl.where(z == highest[:, None], offs_k[None, :], 0), 1)",
            ),
            "cells_at_the_border_left_out": (
                "row = tl.maximum(cell_y - 1, 0) if corner < 2",
                "row = cell_y - 1 if corner < 2",
            ),
        },
    ),
    *planted_in(
        "segmenter/training/upsample_loss.py",
        ("tests/training/test_upsample_loss.py",),
        {
            "products_of_the_loss_in_half_types": (
                "with torch.autocast(masks.device.type, enabled=False):",
                "if True:",
            ),
            "gradient_rounded_before_it_is_scaled": (
                "(gradient * upstream).to(ctx.dtype)",
                "gradient.to(ctx.dtype) * upstream.to(ctx.dtype)",
            ),
            "upstream_gradient_left_out": (
                "(gradient * upstream).to(ctx.dtype)",
                "gradient.to(ctx.dtype)",
            ),
            "ignored_pixels_in_the_gradient": (
                "weight = counted.to(z.dtype) if",
                "weight = torch.ones_like(counted, dtype=z.dtype) if",
            ),
            "gradient_of_ignored_pixels_smoothed": (
                "z.addr_(counted.to(z.dtype), self.ones",
                "z.addr_(torch.ones_like(counted, dtype=z.dtype), self.ones",
            ),
            "rows_beyond_the_labels": (
                "bottom = min(bottom, H)",
                "bottom = min(bottom, H + 1)",
            ),
            "only_the_mask_row_above": (
                "above, below = max(i - 1, 0), min(i, h - 1)",
                "above, below = max(i - 1, 0), max(i - 1, 0)",
            ),
            "the_kernel_is_not_taken": (
                'if select(impl).on(masks).name == "triton":',
                "if False:",
            ),
            "weights_of_all_classes_are_one": (
                "all_weights = self.ones.sum()",
                "all_weights = float(z.shape[1])",
            ),
        },
    ),
    *planted_in(
        "segmenter/training/losses.py",
        ("tests/training/test_loop.py",),
        {
            "not_divided": (
                "impl=self.impl).loss / denominator",
                "impl=self.impl).loss",
            ),
        },
    ),
    *planted_in(
        "segmenter/training/losses.py",
        ("tests/training/test_losses.py",),
        {
            "losses_of_the_library_ignore_another_label": (
                '"multiclass", ignore_index=self.ignore_index',
                '"multiclass", ignore_index=0',
            ),
            "hard_pixels_of_ignored_labels": (
                "counted = labels != ignore_index",
                "counted = labels != 0",
            ),
            "weights_of_a_sum_left_out": (
                "sum(term.weight * compute(",
                "sum(compute(",
            ),
            "weight_of_cross_entropy_left_out": (
                "else self._share * loss",
                "else loss",
            ),
            "arguments_left_out": (
                "ignore_index=self.ignore_index, **term.arguments)",
                "ignore_index=self.ignore_index)",
            ),
            "smoothing_left_out": (
                'self._cross_entropy.argument("label_smoothing")',
                "0.0",
            ),
            "added_losses_in_half_types": (
                "logits = masks.float()",
                "logits = masks",
            ),
            "easy_pixels_are_hard": (
                "(losses.detach() > -math.log",
                "(losses.detach() < -math.log",
            ),
            "no_least_number_of_hard_pixels": (
                "max(n_hard, round(min_share * len(y)), 1)",
                "max(n_hard, 1)",
            ),
        },
    ),
    *planted_in(
        "segmenter/training/loss_terms.py",
        ("tests/training/test_losses.py",),
        {
            "weights_of_terms_not_read": (
                'float(match["weight"] or 1)',
                "1.0",
            ),
        },
    ),
]
