"""The planted bugs of LayerScale, in kernels, and of blocks that others built; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in
from tests.mutants.planted_backbones import BACKBONES

SCALED = "acc = acc * tl.load(LayerScale + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]"

BLOCKS_OF_OTHERS = [
    *BACKBONES,
    *planted_in(
        "kernels/linear.py",
        ("tests/kernels/test_linear.py",),
        {
            "layer_scale_of_the_residual": (
                f"        {SCALED}\n    if HAS_RESIDUAL:\n        acc = acc + residual.to(tl.float32)\n",
                "        acc = acc * 1.0\n    if HAS_RESIDUAL:\n        acc = acc + residual.to(tl.float32)\n"
                f"    if HAS_SCALE:\n        {SCALED}\n",
            ),
            "bias_not_scaled": (
                f"        {SCALED}\n",
                f"        bias = tl.load(Bias + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]\n"
                f"        acc = acc - bias\n        {SCALED}\n        acc = acc + bias\n",
            ),
            "layer_scale_rounded_to_half": (
                "acc * tl.load(LayerScale + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]",
                "acc * tl.load(LayerScale + offs_n, mask=mask_n, other=0.0).to(tl.bfloat16).to(tl.float32)[None, :]",
            ),
            "result_narrower_than_layer_scale": (
                "result_type(weight, residual, layer_scale), x.device)",
                "result_type(weight, residual), x.device)",
            ),
            "layer_scale_left_to_the_library": (
                "configs.linear_by_library(gelu, residual is not None or layer_scale is not None)",
                "configs.linear_by_library(gelu, residual is not None)",
            ),
        },
    ),
    *planted_in(
        "kernels/layernorm_mlp.py",
        ("tests/kernels/test_layernorm_mlp.py",),
        {
            "layer_scale_of_the_first_columns_for_all": (
                "tl.load(LayerScale + offs_d).to",
                "tl.load(LayerScale + offs_d - COL_0).to",
            ),
            "fc2_bias_not_scaled": (
                "    acc = acc + tl.load(Bias + offs_d).to(tl.float32)[None, :]\n"
                "    if HAS_SCALE:\n"
                "        acc = acc * tl.load(LayerScale + offs_d).to(tl.float32)[None, :]\n",
                "    if HAS_SCALE:\n"
                "        acc = acc * tl.load(LayerScale + offs_d).to(tl.float32)[None, :]\n"
                "    acc = acc + tl.load(Bias + offs_d).to(tl.float32)[None, :]\n",
            ),
            "layer_scale_lost_between_two_kernels": (
                "    return product(h, fc2_weight, fc2_bias, x, layer_scale=layer_scale)",
                "    return product(h, fc2_weight, fc2_bias, x)",
            ),
        },
    ),
    *planted_in(
        "kernels/layernorm_mlp.py",
        ("tests/kernels/test_operators.py",),
        {
            "gradient_of_the_residual_scaled": (
                "needed[:7], pre_activation, grad, tanh)",
                "needed[:7], pre_activation, None, tanh)",
            ),
            "layer_scale_without_gradient_of_its_branch": (
                "of_branch = grad * layer_scale",
                "of_branch = grad",
            ),
        },
    ),
    *planted_in(
        "kernels/attention_half.py",
        ("tests/kernels/test_attention_half.py",),
        {
            "projection_gets_the_gradient_unscaled": (
                "of_branch, of_scale = grad if layer_scale is None else grad * layer_scale, None",
                "of_branch, of_scale = grad, None",
            ),
        },
    ),
    *planted_in(
        "kernels/linear_backward.py",
        ("tests/kernels/test_attention_half.py",),
        {
            "gradient_of_layer_scale_without_its_branch": (
                "return (grad.float() * branch.float()).sum_to_size",
                "return grad.float().sum_to_size",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/modules.py",
        ("tests/dropin/test_layer_scale.py",),
        {
            "layer_scale_of_the_other_half": (
                'name = plan.names[f"ls{number}"]',
                'name = plan.names[f"ls{3 - int(number)}"]',
            ),
            "attention_without_its_layer_scale": (
                'attention, scale = layer._modules, layer_scale(block, plan, "1")',
                "attention, scale = layer._modules, None",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/recognise.py",
        ("tests/dropin/test_layer_scale.py",),
        {
            "whatever_holds_a_vector_is_a_layer_scale": (
                "len(held) != 1 or layer._parameters[held[0]].ndim != 1",
                "len(held) == 0",
            ),
        },
    ),
    *planted_in(
        "segmenter/layers.py",
        ("tests/dropin/test_separate.py",),
        {
            "keys_and_values_exchanged": (
                "pairs = (q_weight, q_bias), (k_weight, k_bias), (v_weight, v_bias)",
                "pairs = (q_weight, q_bias), (v_weight, k_bias), (k_weight, v_bias)",
            ),
            "separate_attention_without_its_layer_scale": (
                "_separate_attention_half, x, *parameters, heads, norm.eps, layer_scale, *",
                "_separate_attention_half, x, *parameters, heads, norm.eps, None, *",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/verify.py",
        ("tests/dropin/test_separate.py",),
        {
            "layers_that_drop_not_tried_out": (
                'if plan.style == "separate" and not _same(',
                'if plan.style == "none" and not _same(',
            ),
            "other_names_not_tried_out": (
                '"something_else" if name == ANY else name',
                '"attention_mask" if name == ANY else name',
                "no block in the tests does anything else with arguments that it has no names for",
            ),
        },
    ),
    *planted_in(
        "segmenter/guard.py",
        ("tests/dropin/test_separate.py",),
        {
            "configurations_not_watched": (
                "and (not self.held or self._contents() == self.contents)",
                "and True",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/guard.py",
        ("tests/dropin/test_separate.py",),
        {
            "configurations_not_noted": (
                "if change := value.change(flag, state.get(flag)):",
                "if False:",
            ),
            "whatever_an_object_holds_is_data": (
                "return _is_plain(value) or _is_data(value, depth)",
                "return True",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/recognise.py",
        ("tests/dropin/test_layer_scale.py",),
        {
            "vectors_of_the_block_exchanged": (
                'return {"ls1": held[0], "ls2": held[1]} if',
                'return {"ls1": held[1], "ls2": held[0]} if',
            ),
        },
    ),
]
