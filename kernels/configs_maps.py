"""Which tile shape each kernel of attention maps runs with: tables as in kernels/configs.py. None has been measured."""

from segmenter.kernels import configs
from segmenter.kernels.configs import AMD, ANY, HOPPER, AttentionConfig, Row

# Rows of queries and of keys a program. Each row of the result is written once, and that is most of the traffic.
ATTENTION_ROWS = (
    Row(ANY, "fp32", "", AttentionConfig(16, 32, 4, 1), {"n": 1025},
        "Operands of ordinary multiply-adds fill the registers."),
    Row(ANY, "tf32", "", AttentionConfig(16, 64, 4, 1), {"n": 1025}, "Few queries; K is read once."),
    Row(ANY, "half", "", AttentionConfig(16, 128, 4, 1), {"n": 1025}, "As above."),
)  # fmt: skip
# Rows of queries a program, and of keys a step.
ATTENTION_STATISTICS = (
    Row(ANY, "fp32", "head_pad >= 128", AttentionConfig(16, 16, 4, 1), {"n": 1025, "d": 128}, "As for the rows."),
    Row(ANY, "fp32", "", AttentionConfig(16, 32, 4, 1), {"n": 1025}, "As for the rows."),
    Row(ANY, "tf32", "", AttentionConfig(64, 32, 4, 2), {"n": 1025}, "As for attention."),
    Row(ANY, "half", "", AttentionConfig(64, 64, 4, 2), {"n": 1025},
        "Eighteen operations and two of the special unit (an exponential, a square root) for each score: tensor cores "
        "and L2 wait for those, so tiles need not be larger. Several programs a multiprocessor."),
)  # fmt: skip
# Rows of queries a step, and of keys a program.
ATTENTION_TRANSPOSED = (
    Row(ANY, "fp32", "", AttentionConfig(16, 32, 8, 2), {"n": 1025}, "As for the rows."),
    Row(AMD, "tf32", "", AttentionConfig(32, 32, 4, 1), {"n": 1025}, "64 KB of shared memory."),
    Row(HOPPER, "tf32", "", AttentionConfig(32, 64, 4, 1), {"n": 1025}, "As for half types."),
    Row(ANY, "tf32", "", AttentionConfig(32, 64, 4, 2), {"n": 1025}, "Columns are transposed through registers."),
    Row(AMD, "half", "", AttentionConfig(32, 64, 4, 1), {"n": 1025}, "64 KB of shared memory."),
    Row(HOPPER, "half", "", AttentionConfig(32, 64, 4, 1), {"n": 1025},
        "With a second stage ptxas serialises the products where N is a multiple of 16. Six programs a multiprocessor "
        "wait at different times."),
    Row(ANY, "half", "", AttentionConfig(32, 64, 4, 2), {"n": 1025},
        "The second product is of TF32, with operands twice as wide as those of the first."),
)  # fmt: skip


def attention_rows(architecture: str, element_size: int, precision: str) -> AttentionConfig:
    """The configuration for chosen rows."""
    return configs.look_up(ATTENTION_ROWS, architecture, configs.kind_of(element_size, precision)).config


def attention_statistics(architecture: str, element_size: int, head_pad: int, precision: str) -> AttentionConfig:
    """The configuration for statistics, of a head of `head_pad` columns (a power of two)."""
    kind = configs.kind_of(element_size, precision)
    return configs.look_up(ATTENTION_STATISTICS, architecture, kind, head_pad=head_pad).config


def attention_transposed(architecture: str, element_size: int, precision: str) -> AttentionConfig:
    """The configuration for products with the transposed matrix."""
    return configs.look_up(ATTENTION_TRANSPOSED, architecture, configs.kind_of(element_size, precision)).config


TABLES = {
    "attention_rows": ATTENTION_ROWS,
    "attention_statistics": ATTENTION_STATISTICS,
    "attention_transposed": ATTENTION_TRANSPOSED,
}
