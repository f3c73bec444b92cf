"""The planted bugs of encoders of other projects: tokens, positions, LayerScale; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

TESTS = ("tests/test_backbones.py",)
BACKBONES = [
    *planted_in(
        "segmenter/encoder.py",
        TESTS,
        {
            "registers_before_the_class_token": (
                '("cls_token", "dist_token", "reg_token")',
                '("reg_token", "cls_token", "dist_token")',
            ),
            "positions_added_to_the_class_token": (
                "F.pad(positions, (0, 0, missing, 0)) if missing",
                "torch.cat([positions[:, :missing], positions], 1) if missing",
            ),
            "rotary_rows_and_columns_swapped": (
                "[y[:, None].expand(-1, columns, -1), x[None].expand(rows, -1, -1)]",
                "[x[None].expand(rows, -1, -1), y[:, None].expand(-1, columns, -1)]",
            ),
            "rotary_positions_of_corners": (
                "torch.arange(n, device=device) + 0.5)",
                "torch.arange(n, device=device))",
            ),
            "rotary_positions_of_another_grid": (
                '(("rotary", *options), (like,)',
                '(("rotary",), (like,)',
            ),
            "registers_are_decayed": (
                '({"reg_token"} if self.n_registers else set())',
                "set()",
            ),
        },
    ),
    *planted_in(
        "segmenter/layers.py",
        TESTS,
        {
            "layer_scale_of_attention_left_out": (
                'None if ls1 is None else ls1._parameters["gamma"]',
                "None",
            ),
            "layer_scale_of_the_mlp_left_out": (
                'None if ls2 is None else ls2._parameters["gamma"]',
                "None",
            ),
            "layer_scale_left_out_layer_by_layer": (
                "x + self.drop_path(y if ls2 is None else ls2(y))",
                "x + self.drop_path(y)",
            ),
            "not_turned_layer_by_layer": (
                "        if rotation is None:\n            return qkv\n",
                "        if True:\n            return qkv\n",
            ),
            "not_turned_when_computed_again": (
                "checkpoint(self._run, x, mask, rotation, use",
                "checkpoint(self._run, x, mask, None, use",
            ),
            "layer_scale_never_asked_about": (
                "in asked if scale is None else (*asked, (scale, _LAYER_SCALE)):",
                "in asked:",
            ),
            "positions_resampled_without_antialiasing": (
                "antialias=True",
                "antialias=False",
            ),
        },
    ),
    *planted_in(
        "segmenter/decoder.py",
        ("tests/test_linear_decoder.py",),
        {
            "folded_batch_norm_is_stale": (
                '(("folded", norm.eps), tensors, make)',
                '(("folded", norm.eps), tensors[:1], make)',
            ),
            "folded_batch_norm_of_another_epsilon": (
                '(("folded", norm.eps), tensors, make)',
                '(("folded",), tensors, make)',
            ),
            "batch_norm_folded_in_training": (
                "(norm.training or norm.running_mean is None)",
                "norm.running_mean is None",
            ),
            "folded_batch_norm_without_epsilon": (
                "(variance + norm.eps).rsqrt()",
                "variance.rsqrt()",
            ),
            "folded_batch_norm_without_the_mean": (
                "beta - scale * mean",
                "beta",
            ),
            "hooks_of_batch_norm_passed_over": (
                "why_not_bypass(norm, _BATCH_NORM) or ",
                "",
            ),
        },
    ),
    *planted_in(
        "segmenter/weights/names.py",
        TESTS,
        {
            "biases_of_keys_in_the_wrong_place": (
                "torch.cat([q, torch.zeros_like(q), v])",
                "torch.cat([q, v, torch.zeros_like(q)])",
            ),
            "biases_of_keys_in_files_not_masked": (
                "torch.tensor([[1.0], [0.0], [1.0]])",
                "torch.tensor([[1.0], [1.0], [1.0]])",
            ),
            "position_of_the_class_token_lost": (
                '= ours["encoder.cls_token"] + positions[:, :1]',
                '= ours["encoder.cls_token"]',
            ),
        },
    ),
    *planted_in(
        "segmenter/export/program.py",
        TESTS,
        {
            "exported_positions_not_moved_past_registers": (
                "(0, 0, encoder.n_extra_tokens - n_extra, 0)",
                "(0, 0, 0, encoder.n_extra_tokens - n_extra)",
            ),
        },
    ),
]
