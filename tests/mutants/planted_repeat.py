"""The planted bugs of repeating host functions and of launching past Triton; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

REPEAT = [
    *planted_in(
        "kernels/repeat.py",
        ("tests/kernels/test_repeat.py",),
        {
            "strides_not_in_the_key": (
                "(x.shape, x.stride(), x.dtype,",
                "(x.shape, x.dtype,",
            ),
            "types_not_in_the_key": (
                "x.stride(), x.dtype, x.data_ptr()",
                "x.stride(), x.data_ptr()",
            ),
            "alignment_not_in_the_key": (
                "x.data_ptr() % 16, ",
                "",
            ),
            "precision_not_in_the_key": (
                "key = (*layouts, *others, launch.float32_precision())",
                "key = (*layouts, *others)",
            ),
            "places_of_tensors_not_in_the_key": (
                "_TENSOR if isinstance(x, torch.Tensor) else tuple(x)",
                "None if isinstance(x, torch.Tensor) else tuple(x)",
            ),
            "shared_memory_taken_for_one_argument": (
                "            if len(found) != 1:\n                raise Ambiguous\n",
                "",
            ),
            "offset_of_a_view_lost": (
                "return found[0], address - self.layouts[found[0]][2]",
                "return found[0], 0",
            ),
            "memory_kept_to_the_end": (
                "            for slot in dead:\n                slots[slot] = None\n",
                "",
            ),
            "memory_given_back_too_early": (
                "            kept.update(dead)\n",
                "",
            ),
            "result_in_the_shape_of_its_memory": (
                "                allocation.shape = tuple(tensor.shape)\n",
                "",
            ),
            "notes_left_after_an_error": (
                "        finally:\n            launch.current.notes = None\n",
                "        finally:\n            pass\n",
            ),
            "always_as_written": (
                "        self.programs[key] = program\n",
                "",
            ),
        },
    ),
    *planted_in(
        "kernels/direct.py",
        ("tests/kernels/test_repeat.py",),
        {
            "tensors_of_the_first_launch_kept": (
                "            self.arguments[position] = None\n",
                "            pass\n",
            ),
            "first_address_for_ever": (
                "            arguments[position] = slots[slot].data_ptr() + offset\n",
                "            pass\n",
            ),
            "offset_lost": (
                "            arguments[position] = slots[slot].data_ptr() + offset\n",
                "            arguments[position] = slots[slot].data_ptr()\n",
            ),
            "first_map_for_ever": (
                "if found is None else found",
                "if found is None else next(iter(known.values()))",
            ),
            "maps_made_each_time": (
                "            found = known.get(address)\n",
                "            found = None\n",
            ),
            "maps_never_forgotten": (
                "        if len(known) >= MAX_MAPS:\n            known.clear()\n",
                "",
            ),
            "hooks_passed_by": (
                'getattr(hook, "calls", True)',
                "False",
            ),
            "scratch_memory_not_asked_about": (
                "        if run.global_scratch_size or run.profile_scratch_size:\n",
                "        if False:\n",
            ),
            "unknown_forms_accepted": (
                "if len(maps) != len(mapped) or found != set(index_of):",
                "if False:",
            ),
        },
    ),
    *planted_in(
        "segmenter/ops.py",
        ("tests/test_ops.py",),
        {
            "gradients_not_asked_about": (
                "        and not torch.is_grad_enabled()\n",
                "",
            ),
            "subclasses_not_asked_about": (
                "        and type(x) is torch.Tensor\n",
                "",
            ),
            "ambient_autocast_not_asked_about": (
                'not torch.is_autocast_enabled("cuda" if x.is_cuda else "cpu") and unobserved_but_for_autocast(x)',
                "unobserved_but_for_autocast(x)",
            ),
            "modes_not_asked_about": (
                "        and not torch._C._len_torch_dispatch_stack()\n",
                "",
            ),
            "function_transforms_not_asked_about": (
                "        and torch._C._functorch.maybe_current_level() is None\n",
                "",
            ),
            "forward_derivatives_not_asked_about": (
                "        and torch.autograd.forward_ad._current_level < 0\n",
                "",
            ),
            "traces_not_asked_about": (
                "        and torch._C._get_tracing_state() is None\n",
                "",
            ),
            "profilers_not_asked_about": (
                "        and not torch._C._autograd._profiler_enabled()\n",
                "",
            ),
            "negated_views_not_asked_about": (
                "        and not x.is_neg()  # its values have the other sign in memory\n",
                "",
            ),
            "replaced_operators_passed_by": (
                "        return Operators(*self)._replace(**others)\n",
                "        return super()._replace(**others)\n",
            ),
        },
    ),
]
