"""The planted bugs of the first hour on a card, and of the repeats; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

TESTS = ("tests/bench/test_first_hour.py",)
FIRST_HOUR = [
    *planted_in(
        "bench/first_hour.py",
        TESTS,
        {
            "cut_short_counts_as_done": (
                'if entry["state"] == "done" and CUT.search(',
                "if False and CUT.search(",
            ),
            "done_steps_are_run_again": (
                "if not self.done(step.name)]",
                "]",
            ),
            "failed_steps_come_first": (
                "return sorted(found, key=",
                "return sorted(found, reverse=True, key=",
            ),
            "a_begun_step_counts_as_done": (
                'entry["state"] in ("done", "nothing to do")',
                'entry["state"] in ("done", "nothing to do", BEGUN)',
            ),
            "failed_operations_are_timed": (
                'options if "--missing" in step.command else []',
                "[]",
            ),
            "findings_of_the_sanitizer_are_any_failure": (
                "if sanitized else {}\n    codes |= {TESTS",
                "if not sanitized else {}\n    codes |= {TESTS",
            ),
        },
    ),
    *planted_in(
        "bench/repeats.py",
        TESTS,
        {
            "only_the_last_repeat_counts": (
                "count += torch.stack(",
                "count = torch.stack(",
            ),
            "what_differed_is_taken_for_done": (
                'if known.get(name) == "" and args.times:',
                "if name in known and args.times:",
            ),
        },
    ),
]
