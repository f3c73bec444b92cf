"""The planted bugs of the model of memory; see `tests.mutants.planted`."""

from tests.mutants.mutant import planted_in

MEMORY = planted_in(
    "bench/memory.py",
    ("tests/bench/test_memory.py",),
    {
        "copies_of_weights_not_counted": (
            "B * N, 2 * 12 * d * d",
            "B * N, 0",
        ),
        "qkv_counted_at_level_2": (
            "FUSED = (24, 16, 10)",
            "FUSED = (24, 16, 16)",
        ),
        "momenta_not_counted": (
            "there = 8 * parameters",
            "there = 4 * parameters",
        ),
        "logits_not_counted": (
            "return 12 * B * K * S * S",
            "return 0",
        ),
        "gradients_of_weights_not_counted": (
            "max(first, 4 * parameters + work)",
            "first",
        ),
        "one_more_than_fits": (
            "return step * bisect.bisect_left(",
            "return step + step * bisect.bisect_left(",
        ),
    },
)
