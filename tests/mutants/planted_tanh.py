"""The planted bugs of the GELU by tanh; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

TANH = [
    *planted_in(
        "kernels/blocks.py",
        ("tests/kernels/test_layernorm_mlp.py", "tests/kernels/test_layernorm_mlp_backward.py"),
        {
            "approximation_without_its_cube": (
                "(2.3022081981 + 0.1029432396 * x * x)",
                "2.3022081981",
            ),
            "slope_of_the_approximation_without_its_cube": (
                "(1.5957691216 + 0.2140644488 * x * x)",
                "1.5957691216",
            ),
            "slope_of_the_approximation_by_cancellation": (
                "    return s, e * s\n",
                "    return s, 1.0 - s\n",
            ),
            "infinity_times_zero_far_out": (
                "tl.minimum(-x * (2.3022081981 + 0.1029432396 * x * x), 126.0)",
                "-x * (2.3022081981 + 0.1029432396 * x * x)",
            ),
            "exact_gelu_for_the_approximation": (
                '    return f"tanh {form}" if tanh else form\n',
                "    return form\n",
            ),
        },
    ),
    *planted_in(
        "kernels/layernorm_mlp.py",
        ("tests/kernels/test_layernorm_mlp.py", "tests/kernels/test_layernorm_mlp_backward.py"),
        {
            "approximation_forgotten_in_two_kernels": (
                '"tanh" if tanh else True',
                "True",
            ),
            "approximation_forgotten_in_one_kernel": (
                "gelu_form(fc1_weight.dtype, launch.architecture(x), tanh)",
                "gelu_form(fc1_weight.dtype, launch.architecture(x))",
            ),
            "layer_scale_of_the_exact_branch": (
                '        h = F.gelu(a, approximate="tanh" if tanh else "none")\n',
                "        h = F.gelu(a)\n",
            ),
        },
    ),
    *planted_in(
        "kernels/layernorm_mlp_backward.py",
        ("tests/kernels/test_layernorm_mlp_backward.py",),
        {
            "slope_of_the_exact_gelu": (
                "pre_activation, needed[5], needed[4], tanh=tanh)",
                "pre_activation, needed[5], needed[4])",
            ),
            "hidden_layer_of_the_exact_gelu": (
                'launch.call(F.gelu, pre_activation, approximate="tanh" if tanh else "none")',
                "launch.call(F.gelu, pre_activation)",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/modules.py",
        ("tests/dropin/test_accelerate.py",),
        {
            "exact_gelu_in_blocks_of_others": (
                'layer_scale(block, plan, "2"), tanh=plan.tanh)',
                'layer_scale(block, plan, "2"))',
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/guard.py",
        ("tests/dropin/test_separate.py",),
        {
            "functions_with_arguments_never_equal": (
                "return (value.func, value.keywords) if isinstance(value, functools.partial) else value",
                "return value",
            ),
        },
    ),
]
