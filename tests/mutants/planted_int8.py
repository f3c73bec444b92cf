"""The planted bugs of weights in eight bits; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

_TESTS = ("tests/weights/test_int8.py",)

INT8 = [
    *planted_in(
        "segmenter/weights/int8.py",
        _TESTS,
        {
            "one_scale_for_all_rows": (
                "rows.abs().amax(1)",
                "rows.abs().amax().expand(len(rows))",
            ),
            "scales_along_columns": (
                "view(-1, *[1] * (matrix.ndim - 1))",
                "view(*[1] * (matrix.ndim - 1), -1)",
            ),
            "not_symmetric": (
                "rows.abs().amax(1)",
                "rows.amax(1)",
            ),
            "rounded_towards_zero": (
                "steps.round()",
                "steps.trunc()",
            ),
            "a_step_too_many": (
                "STEPS = 127",
                "STEPS = 128",
            ),
            "scales_that_do_not_come_back": (
                ".bfloat16()",
                ".float()",
            ),
            "positions_are_rows_too": (
                "if tensor.ndim < 2 or tensor.shape[0] == 1:",
                "if tensor.ndim < 2:",
            ),
            "missing_scales_are_ones": (
                "        if scale is None:",
                "        scale = torch.ones(rows).bfloat16() if scale is None else scale\n        if scale is None:",
            ),
            "scales_of_nothing_pass": (
                "if name.endswith(SCALE)]",
                "if name.endswith(SCALE) and scales.get(name) is not None]",
            ),
            "negative_scales_pass": (
                "torch.isfinite(scale) & (scale >= 0)",
                "torch.isfinite(scale)",
            ),
            "infinity_becomes_an_integer": (
                "if not torch.isfinite(tensor).all():",
                "if None:",
            ),
        },
    ),
    *planted_in(
        "segmenter/weights/pretrained.py",
        _TESTS,
        {
            "older_versions_are_not_told": (
                '{"schema": SCHEMA, _STORAGE',
                '{"schema": 1, _STORAGE',
            ),
            "kept_weights_are_int8_all_the_same": (
                "dtype == torch.int8 and name not in keep else",
                "dtype == torch.int8 else",
            ),
            "unknown_storage_is_int8": (
                "if content.get(_STORAGE, _INT8) != _INT8:",
                "if None:",
            ),
        },
    ),
]
