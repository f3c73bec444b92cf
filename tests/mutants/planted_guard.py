"""The planted bugs of the guard, which let a block run fused that must not; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

GUARD = [
    *planted_in(
        "segmenter/guard.py",
        ("tests/test_guard.py",),
        {
            "calls_replaced_on_known_classes_not_looked_at": (
                "if reason := replaced(cls):",
                "if cls.forward is not METHODS.get(cls) and (reason := replaced(cls)):",
            ),
            "hooks_not_looked_at": (
                '                    held["_forward_hooks"]\n                    or ',
                "                    ",
            ),
            "pre_hooks_not_looked_at": (
                'or held["_forward_pre_hooks"]\n                    or held["_backward_hooks"]',
                'or held["_backward_hooks"]',
            ),
            "backward_pre_hooks_not_looked_at": (
                '                    or held["_backward_pre_hooks"]\n                )',
                "                )",
            ),
            "classes_not_looked_at": (
                "state += type(module), len(held), held",
                "state += len(held), held",
            ),
            "new_attributes_not_looked_at": (
                "len(held), held",
                "held",
            ),
            "training_not_looked_at": (
                'held["training"], bool(hooked)',
                "bool(hooked)",
            ),
            "children_not_looked_at": (
                "                    state += children\n",
                "",
            ),
            "grandchildren_not_looked_at": (
                "                    modules += children.values()\n",
                "",
            ),
            "attributes_not_compared": (
                "all(map(operator.is_, values, self.values))",
                "True",
            ),
            "types_of_parameters_not_looked_at": (
                "if not _PLAIN_OR_NONE.issuperset(kinds):",
                "if False:",
            ),
            "shapes_of_parameters_not_looked_at": (
                'operator.attrgetter("dtype", "shape")',
                'operator.attrgetter("dtype")',
            ),
            "methods_of_classes_not_looked_at": (
                "            state += map(_METHODS, self.classes)\n",
                "",
            ),
            "surroundings_not_compared": (
                " and _around(x) == self.around",
                "",
            ),
            "autocast_not_looked_at": (
                "        torch.is_autocast_enabled(kind),\n",
                "",
            ),
            "forward_mode_not_looked_at": (
                "        torch.autograd.forward_ad._current_level,\n",
                "",
            ),
            "transforms_not_looked_at": (
                "        torch._C._functorch.maybe_current_level(),\n",
                "",
            ),
            "hooks_of_all_not_looked_at": (
                "        hooks_of_all(),\n",
                "",
            ),
            "functions_of_torch_not_looked_at": (
                "        altered(),\n    )",
                "    )",
            ),
            "results_kept_alive": (
                "if any(isinstance(value, torch.Tensor) for value in self.values):",
                "if False:",
            ),
            "asked_each_time": (
                "if seen is None or not seen.holds_for(module, x):",
                "if True:",
            ),
        },
    ),
    *planted_in(
        "segmenter/dropin/guard.py",
        ("tests/dropin/test_guards.py", "tests/dropin/test_altered.py", "tests/dropin/test_layers.py"),
        {
            "replaced_methods_not_asked_about": (
                "        if reason := replaced(cls):\n            return reason\n    return next",
                "        pass\n    return next",
            ),
            "rates_not_asked_about": (
                "if noted.rate is not None and",
                "if False and",
            ),
            "types_not_asked_about": (
                "and parameter.dtype != dtype:",
                "and False:",
            ),
            "layers_not_asked_about": (
                "if layer is not root and (reason := why_not_bypass(layer, (type(layer),), True)):",
                "if False:",
            ),
            "children_may_change": (
                'if tuple(state["_modules"]) != noted.children:',
                "if False:",
            ),
        },
    ),
]
