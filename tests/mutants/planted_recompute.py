"""The planted bugs of what is kept for a backward pass; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

HALF_TESTS = ("tests/kernels/test_attention_half.py",)
LEVEL_TESTS = ("tests/test_recompute.py", "tests/test_training_mode.py")

RECOMPUTE = [
    *planted_in(
        "kernels/operators.py",
        ("tests/kernels/test_attention_half.py", "tests/kernels/test_attention_backward.py"),
        {
            "kept_without_gradients": (
                "    wanted = torch.is_grad_enabled() and any(",
                "    wanted = any(",
            ),
        },
    ),
    *planted_in(
        "kernels/attention_half.py",
        HALF_TESTS,
        {
            "residual_without_gradient": (
                "needed[:5], grad), *of_proj",
                "needed[:5], None), *of_proj",
            ),
            "qkv_always_kept": (
                "return y, o, lse, qkv if keep_qkv else launch",
                "return y, o, lse, qkv if True else launch",
            ),
            "result_kept_as_well": (
                "keep_results=(1, 2, 3)",
                "keep_results=(0, 1, 2, 3)",
            ),
            "qkv_computed_again_without_its_norm": (
                "qkv = layernorm_linear(*before)",
                "qkv = linear(x, qkv_weight, qkv_bias)",
            ),
            "all_of_it_for_the_projection": (
                "    if not of_qkv:",
                "    if False:",
            ),
            "sdpa_asked_for_and_not_taken": (
                " and not uses_sdpa(x, qkv_weight)",
                "",
            ),
        },
    ),
    *planted_in(
        "segmenter/layers.py",
        LEVEL_TESTS,
        {
            "hidden_layer_kept_at_every_level": (
                "if keep_hidden and ops.layernorm_mlp_hidden",
                "if ops.layernorm_mlp_hidden",
            ),
            "qkv_kept_at_level_2": (
                "self.recompute < 2, None if ls1",
                "self.recompute < 3, None if ls1",
            ),
            "blocks_kept_at_level_3": (
                "if self.recompute > 2 and torch",
                "if self.recompute > 3 and torch",
            ),
            "attention_branch_never_dropped": (
                "x = self.drop_path.between(before, x) if drops else x",
                "x = x",
            ),
            "mlp_branch_never_dropped": (
                "return self.drop_path.between(x, y) if drops else y",
                "return y",
            ),
            "kept_branches_not_scaled": (
                "y, self._keep(x).to(y.dtype) / (1 - self.drop_prob))",
                "y, self._keep(x).to(y.dtype))",
            ),
            "eager_drops_after_adding": (
                'if name != "triton" and getattr',
                'if name == "none" and getattr',
            ),
        },
    ),
]
