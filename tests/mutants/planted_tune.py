"""The planted bugs of the tool that tunes configurations; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

TESTS = ("tests/bench/test_tune.py",)
TUNE = [
    *planted_in(
        "bench/tuning/verdict.py",
        TESTS,
        {
            "any_gain_wins": (
                "self.seconds[0] - self.seconds[1] > self.spread",
                "self.seconds[0] > self.seconds[1]",
            ),
            "one_run_is_enough_to_win": (
                "len(runs(row)) > 1 for row",
                "len(runs(row)) > 0 for row",
            ),
            "drift_is_no_spread": (
                "max(*ranges, max(medians) - min(medians))",
                "max(ranges)",
            ),
        },
    ),
    *planted_in(
        "bench/tuning/measure.py",
        TESTS,
        {
            "unwritten_results_are_not_poisoned": (
                ".fill_(math.nan if dtype.is_floating_point else torch.iinfo(dtype).max)",
                "",
            ),
            "spills_beside_the_shipped_ones_allowed": (
                "kernel.spills > shipped.spills and",
                "False and",
            ),
            "results_may_change_from_run_to_run": (
                "if not all(map(torch.equal, tree_leaves(result), again)):",
                "if False:",
            ),
            "one_gradient_of_several_is_enough": (
                "for one in several if one[0].is_floating_point()",
                "for one in list(several)[:1] if one[0].is_floating_point()",
            ),
            "log_sum_exp_of_other_scores": (
                'found["lse"].copy_(lse)',
                'found["lse"]',
            ),
        },
    ),
    *planted_in(
        "bench/repeats.py",
        TESTS,
        {
            "repeats_of_the_first_result_only": (
                "for tensor in tree_leaves(result)]",
                "for tensor in tree_leaves(result)[:1]]",
            ),
        },
    ),
    *planted_in(
        "bench/tuning/buckets.py",
        TESTS,
        {
            "choices_of_the_tuned_one_are_kept": (
                "for forget in (configs.mlp.cache_clear, repeat.forget):",
                "for forget in ():",
            ),
            "what_launches_the_same_is_tried_again": (
                "found.setdefault((plan.grid, plan.tiles, plan.scalars, *plan.options.items()), (steps, config))",
                "found[config] = (steps, config)",
            ),
        },
    ),
    *planted_in(
        "bench/tune.py",
        TESTS,
        {
            "infeasible_ones_are_run": (
                "if steps == 0 or not reasons:",
                "if True:",
            ),
            "time_is_not_looked_at": (
                "if time.monotonic() > self.deadline:",
                "if False:",
            ),
            "measured_again_after_an_interruption": (
                "if distance <= steps and _name(bucket, config) not in self._known():",
                "if distance <= steps:",
            ),
            "a_rehearsal_proposes_rows": (
                '    if tuning.rehearsal:\n        lines.append("no row',
                '    if False:\n        lines.append("no row',
            ),
        },
    ),
]
