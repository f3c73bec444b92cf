"""The planted bugs on the way from masks to labels, and of what is captured; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

LABELS_KERNEL = planted_in(
    "kernels/upsample_argmax.py",
    ("tests/kernels/test_upsample_argmax.py",),
    {
        "last_class_dropped": (
            "    candidate = (c < K) &",
            "    candidate = (c < K - 1) &",
        ),
        "equal_classes_go_to_the_highest": (
            "better = v > best",
            "better = v >= best",
        ),
        "no_allowance_for_rounding": (
            "return v + tl.abs(v) * _ROUNDING - (v_0 + v_1 + v_2 + v_3 - size * _ROUNDING) * 0.25 + _SUBNORMAL",
            "return v - (v_0 + v_1 + v_2 + v_3) * 0.25",
        ),
        "no_allowance_for_subnormals": (
            " * 0.25 + _SUBNORMAL",
            " * 0.25",
        ),
        "windows_counted_by_columns": (
            "(t.first_y + s_y) * t.windows_x + t.first_x + s_x",
            "(t.first_x + s_x) * t.windows_x + t.first_y + s_y",
        ),
        "lower_cell_of_the_first_window": (
            "tl.load(t.rows + _HEADER + SLOTS_Y + s_y)",
            "tl.load(t.rows + _HEADER + SLOTS_Y)",
        ),
        "lower_cell_is_the_upper": (
            "tl.load(t.rows + _HEADER + SLOTS_Y + s_y)",
            "tl.load(t.rows + _HEADER + s_y)",
        ),
        "right_cell_is_the_left": (
            "tl.load(t.cols + _HEADER + SLOTS_X + s_x)",
            "tl.load(t.cols + _HEADER + s_x)",
        ),
        "row_weights_of_another_window": (
            "t.row_weights + (s // t.n_x) * t.height + y",
            "t.row_weights + (s % t.n_x) * t.height + y",
        ),
        "column_weights_of_the_first_window": (
            "t.col_weights + (s % t.n_x) * t.width + x",
            "t.col_weights + x",
        ),
        "rows_weighted_the_wrong_way": (
            "tl.fma(1.0 - h, top, h * bottom)",
            "tl.fma(h, top, (1.0 - h) * bottom)",
        ),
        "product_rounded": (
            "tl.fma(1.0 - w, v00, w * v01)",
            "(1.0 - w) * v00 + w * v01",
        ),
        "average_not_divided": (
            "        v = tl.div_rn(v, t.n_slots.to(tl.float32))\n",
            "",
        ),
        "only_the_last_window_prunes": (
            "        excess += _excess(",
            "        excess = _excess(",
        ),
        "every_window_compares_with_its_own_winners": (
            "c, best_of_cells, K)[0]",
            "c, None, K)[0]",
        ),
        "lower_cells_do_not_count": (
            "return tl.maximum(upper, lower), best",
            "return upper, best",
        ),
        "class_of_padding_not_cut": (
            "k_0 = tl.minimum(tl.argmax(v00, 0), K - 1)",
            "k_0 = tl.argmax(v00, 0)",
            "differs for masks that are all NaN only, and what it then reads is compared with NaN",
        ),
        "mask_offset_in_32_bits": (
            "(t.image * t.n_windows + (t.first_y + s_y) * t.windows_x + t.first_x + s_x).to(tl.int64)",
            "t.image * t.n_windows + (t.first_y + s_y) * t.windows_x + t.first_x + s_x",
            "needs 4 GiB of masks: tests/gpu/test_labels_on_gpu.py",
        ),
        "label_offset_in_32_bits": (
            "pixels = image.to(tl.int64) * height",
            "pixels = image * height",
            "needs 2 GiB of labels: tests/gpu/test_labels_on_gpu.py",
        ),
        "one_row_too_many_written": (
            "        in_y = y < y_end\n",
            "        in_y = y <= y_end\n",
        ),
        "one_column_too_many_written": (
            "    in_x = x < x_end\n",
            "    in_x = x <= x_end\n",
        ),
    },
)

UPSAMPLE_TILES = planted_in(
    "kernels/upsample_tiles.py",
    ("tests/kernels/test_upsample_tiles.py",),
    {
        "not_cut_where_windows_end": (
            "np.concatenate([[0], changes, [window]])",
            "np.concatenate([[0], changes])",
        ),
        "window_counted_from_its_second_pixel": (
            'np.searchsorted(starts, cuts, side="right") - first',
            'np.searchsorted(starts, cuts, side="left") - first',
        ),
        "window_counted_beyond_its_end": (
            'np.searchsorted(starts + window, cuts, side="right")',
            'np.searchsorted(starts + window, cuts, side="left")',
        ),
        "cut_a_pixel_early": (
            "(np.diff(high) != 0)) + 1",
            "(np.diff(high) != 0))",
        ),
        "border_not_cut": (
            "np.flatnonzero((np.diff(low) != 0) | (np.diff(high) != 0))",
            "np.flatnonzero(np.diff(low) != 0)",
        ),
        "scale_in_float64": (
            "np.float64(np.float32(n_in) / np.float32(n_out))",
            "np.float64(n_in / n_out)",
        ),
        "rounded_where_it_is_fused": (
            "[0, 0, 32, 0] == 0",
            "[0, 0, 32, 0] != 0",
        ),
        "border_weight_not_cut_off": (
            "np.clip(source - low.astype(np.float32), 0, 1)",
            "(source - low.astype(np.float32))",
        ),
        "windows_that_touch_refused": (
            "if (np.diff(starts) > window).any():",
            "if (np.diff(starts) >= window).any():",
        ),
        "one_window_too_few_fits": (
            "slots[0] * slots[1] <= MAX_SLOTS",
            "slots[0] * slots[1] < MAX_SLOTS",
        ),
        "windows_of_both_axes_added": (
            "slots[0] * slots[1] <= MAX_SLOTS",
            "slots[0] + slots[1] <= MAX_SLOTS",
        ),
    },
)

LABELS = planted_in(
    "segmenter/inference/pruned_argmax.py",
    ("tests/inference/test_pruned_argmax.py",),
    {
        "equal_candidates_go_to_the_highest": (
            "torch.where(values > best[..., :n]",
            "torch.where(values >= best[..., :n]",
        ),
        "candidates_without_allowance": (
            "given.mean(1) - given.abs().mean(1) * upsample_tiles.ROUNDING - upsample_tiles.SUBNORMAL\n"
            "                above = values + values.abs().mul_(upsample_tiles.ROUNDING) - bar[:, None]\n",
            "given.mean(1)\n                above = values - bar[:, None]\n",
        ),
        "candidates_without_allowance_for_subnormals": (
            "given.abs().mean(1) * upsample_tiles.ROUNDING - upsample_tiles.SUBNORMAL",
            "given.abs().mean(1) * upsample_tiles.ROUNDING",
        ),
        "near_ties_at_all_corners_ignored": (
            "((at == at[0]) & clear[corners.cells])",
            "(at == at[0])",
        ),
        "candidates_of_one_window": (
            "excess = most + excess",
            "excess = most",
        ),
        "candidates_of_the_worst_corner": (
            "torch.maximum(most, above, out=most)",
            "torch.minimum(most, above, out=most)",
        ),
        "windows_of_the_other_axis": (
            "(rows.first[y] + slot_y) * len(view.windows.lefts)",
            "(rows.first[y] + slot_y) * len(view.windows.tops)",
        ),
        "windows_summed_not_averaged": (
            "return total if len(self.weights) == 1 else total.div_(len(self.weights))",
            "return total",
        ),
        "fewest_candidates_first": (
            "counts.argsort(descending=True)",
            "counts.argsort()",
        ),
        "dense_strip_at_the_top": (
            "labels[begin:stop] = best",
            "labels[begin - top : stop - top] = best",
        ),
        "dense_windows_summed_not_averaged": (
            "            best.div_(count[begin:stop, :, None])\n",
            "            pass\n",
        ),
        "dense_rows_of_the_first_window": (
            "y, end = max(begin - anchor, 0),",
            "y, end = max(begin - windows.tops[0], 0),",
        ),
        "dense_rows_kept_too_long": (
            "                upsampled.pop(i, None)\n",
            "",
            "the same labels, in more memory",
        ),
        "dense_mask_rows_shifted": (
            "torch.cat([rows[:, first - begin :], more], 1)",
            "torch.cat([rows, more], 1)",
        ),
        "dense_windows_together_all_on_the_left": (
            "zip(values, windows.lefts[j:], strict=False)",
            "zip(values, windows.lefts, strict=False)",
        ),
        "dense_product_rounded": (
            "torch.addcmul(values, above[j : j + together], rest_h[a:b], out=values)",
            "values.add_(above[j : j + together] * rest_h[a:b])",
        ),
        "no_class_of_scores_that_are_no_numbers": (
            "return ~(excess < 0)",
            "return excess >= 0",
        ),
        "product_of_a_candidate_rounded": (
            "torch.addcmul(h * bottom, 1 - h, top)",
            "h * bottom + (1 - h) * top",
        ),
        "axes_of_weights_exchanged": (
            "h, w = h[:, None, :n], w[:, :n]",
            "h, w = w[:, None, :n], h[:, :n]",
        ),
        "last_strip_left_out": (
            "for begin in range(0, len(rows.first), step):",
            "for begin in range(0, len(rows.first) - step + 1, step):",
        ),
    },
)

STRIDES = planted_in(
    "segmenter/inference/pruned_argmax.py",
    ("tests/kernels/test_strides.py",),
    {
        "candidates_whatever_the_overlap": (
            "(windows <= MAX_WINDOWS and ",
            "(",
        ),
        "candidates_of_the_smallest_tiles": (
            " and rows.length * cols.length >= MIN_TILE * tiles",
            "",
        ),
    },
)

READ_AHEAD = planted_in(
    "segmenter/inference/read_ahead.py",
    ("tests/inference/test_read_ahead.py",),
    {
        "reading_without_limit": (
            "return self._held > self.max_bytes",
            "return False",
        ),
        "failures_before_their_turn": (
            "    except Exception as error:\n        failure = error\n",
            "    finally:\n        pass\n",
        ),
        "errors_of_reading_lost": (
            "        if call.error is not None:\n            raise call.error\n",
            "",
        ),
    },
)

_GRAPH_TESTS = tuple(f"tests/inference/test_{name}.py" for name in ("compiled_inference", "captures", "network_graphs"))

CAPTURED = planted_in(
    "segmenter/inference/cuda_graphs.py",
    _GRAPH_TESTS,
    {
        "changes_of_the_model_not_followed": (
            "if self._watched is not None and not self._watched.unchanged():",
            "if False:",
        ),
        "every_first_call_captured": (
            "        if met.calls < met.wait:\n",
            "        if False:\n",
        ),
        "graphs_come_back_at_once": (
            "1 if graph.used >= PAYS else min(2 * met.wait, PATIENCE)",
            "1",
        ),
        "graphs_that_paid_come_back_late": (
            "1 if graph.used >= PAYS else min(2 * met.wait, PATIENCE)",
            "min(2 * met.wait, PATIENCE)",
        ),
        "the_shape_used_last_evicted": (
            "shape, graph = self._shapes.popitem(last=False)",
            "shape, graph = self._shapes.popitem()",
        ),
        "use_does_not_count": (
            "        self._shapes.move_to_end(shape)\n",
            "",
        ),
        "biases_of_norms_converted": (
            'if isinstance(module, MATRICES) or name in ("proj_patch", "proj_classes"):',
            "if True:",
        ),
        "projections_not_converted": (
            'if isinstance(module, MATRICES) or name in ("proj_patch", "proj_classes"):',
            "if isinstance(module, MATRICES):",
        ),
        "patch_embedding_converted": (
            "MATRICES = (nn.Linear,)",
            "MATRICES = (nn.Linear, nn.Conv2d)",
        ),
        "fused_optimisers_not_seen": (
            "            self.steps == optimiser_steps()\n            and same(self.owners",
            "            same(self.owners",
        ),
        "written_in_place_not_seen": (
            "            and self._versions() == self.versions\n",
            "",
        ),
        "other_memory_not_seen": (
            "            and self._addresses() == self.addresses\n",
            "",
        ),
        "other_parameters_not_seen": (
            "            and same(self.owners, self.contents)\n",
            "",
        ),
        "equal_parameters_of_one_element_not_seen": (
            "            and all(owner[name] is tensor for owner, name, tensor in self.single)",
            "            and True",
        ),
        "tensors_compared_by_value": ("return False\n\n\nATTEMPTS", "return True\n\n\nATTEMPTS"),
        "weights_without_counted_writes_converted": (
            "if parameter.is_inference():",
            "if False:",
        ),
        "default_streams_of_two_devices_are_one": (
            "turns = _Turns.on(device.index)",
            "turns = _Turns.on(0)",
        ),
        "turns_on_the_current_device": ("if torch.cuda.current_device() == device.index else", "or"),
        "models_do_not_take_turns": (
            "turns = _Turns.on(device.index)",
            "turns = _Turns()",
        ),
        "tried_once_only": (
            "ATTEMPTS = 3 ",
            "ATTEMPTS = 1 ",
        ),
        "tried_for_ever": (
            "self._met.setdefault(shape, _Met()).failed < ATTEMPTS:",
            "True:",
        ),
        "pool_of_a_failed_capture_kept": (
            "            self._place = Place.on(self.device)  # the pool of a failed capture takes no other\n",
            "",
        ),
        "captures_push_out_each_other": (
            "        self._full = True\n",
            "",
        ),
        "graphs_never_give_way": (
            "        if not self._shapes:\n            return False\n",
            "        return False\n",
        ),
        "ambient_autocast_captured": (
            "        with torch.autocast(kind, dtype if half else None, enabled=half, cache_enabled=False), ",
            "        with contextlib.nullcontext() if not half else torch.autocast(kind, dtype, cache_enabled=False), ",
        ),
        "refresh_leaves_what_is_cached": (
            "                    module.cache.clear()\n",
            "                    pass\n",
        ),
    },
)

COMPILED = planted_in(
    "segmenter/inference/compiled_inference.py",
    _GRAPH_TESTS[:2],
    {
        "results_of_earlier_calls_overwritten": (
            "return labels.clone(), largest.clone()",
            "return labels, largest",
        ),
        "filled_up_images_returned": (
            "return labels[: shape.batch], largest",
            "return labels, largest",
        ),
        "scores_not_checked": (
            "            check_finite(largest)\n",
            "",
        ),
        "training_mode_not_seen": (
            "        if self.model.training:\n            raise",
            "        if False:\n            raise",
        ),
    },
)

BY_THEMSELVES = planted_in(
    "segmenter/inference/network_graphs.py",
    _GRAPH_TESTS[2:],
    {
        "hooks_of_layers_not_seen": (
            "            and not any(self.hooks)\n",
            "",
        ),
        "hooks_of_all_modules_not_seen": (
            "            and not (hooks_of_all() or altered())\n",
            "",
        ),
        "other_layers_not_seen": (
            "            and same(self.parents, self.children)\n",
            "",
        ),
        "other_classes_not_seen": (
            "            and list(map(type, self.layers)) == self.kinds\n",
            "",
        ),
        "added_attributes_not_seen": (
            "            and list(map(len, self.states)) == self.sizes\n",
            "",
        ),
        "changed_attributes_not_seen": (
            "            and same(self._attributes(), self.attributes)\n",
            "",
        ),
        "methods_replaced_on_classes_not_seen": (
            "            and self.classes == self.members\n",
            "",
        ),
        "cleared_caches_not_seen": (
            "            and self._cleared() == self.cleared\n",
            "",
        ),
        "compiled_layers_captured": (
            'if "_compiled_call_impl" in module.__dict__ or any(',
            "if any(",
        ),
        "models_of_any_kind_captured": (
            "        if why_not(self.model):\n",
            "        if False:\n",
        ),
        "observers_passed_by": (
            "        if not unobserved_but_for_autocast(windows) or torch.cuda.is_current_stream_capturing():\n",
            "        if torch.cuda.is_current_stream_capturing():\n",
        ),
        "masks_of_earlier_windows_overwritten": (
            "return masks[0].clone()",
            "return masks[0]",
        ),
        "switches_share_a_graph": (
            "return tuple([switch() for switch in _SWITCHES])",
            "return ()",
        ),
        "statistics_share_a_graph": (
            "windows.dtype, model.info.normalization, _settings())",
            'windows.dtype, "vit", _settings())',
        ),
        "graphs_keep_the_model": (
            "self._model = weakref.ref(model)",
            "self._model = lambda: model",
        ),
        "types_share_weights": (
            "        if dtype not in by_type:\n",
            "        if not by_type:\n",
        ),
    },
)

STREAM = planted_in(
    "segmenter/inference/stream.py",
    ("tests/inference/test_stream.py", "tests/inference/test_run_ahead.py"),
    {
        "images_under_way_run_twice": (
            "        waits = not (slot.finished or slot.under_way)\n",
            "        waits = not slot.finished\n",
        ),
        "never_runs_ahead": (
            "return len(self.under_way) == 1 and",
            "return False and",
        ),
        "errors_ahead_of_their_turn": (
            "        with contextlib.suppress(Exception):\n            labels",
            "        with contextlib.suppress(ZeroDivisionError):\n            labels",
        ),
        "memory_for_two_batches_tried_for_ever": (
            "            self._fits_two = labels is not None\n",
            "",
        ),
        "one_bad_image_fails_its_batch": (
            "            for slot in part:\n                self.run([slot])\n",
            "            for slot in part:\n                slot.fail(error)\n",
        ),
    },
)
