"""Which tiles labels from queries are made in: a table as in kernels/configs.py. None has been measured."""

import dataclasses

from segmenter.kernels import configs
from segmenter.kernels.configs import ANY, BLACKWELL, Row


@dataclasses.dataclass(frozen=True, slots=True)
class QueriesArgmaxConfig:
    """Rows and columns of a tile of pixels, queries a step, warps, pipeline stages."""

    block_y: int
    block_x: int
    block_q: int
    num_warps: int
    num_stages: int


QUERIES_ARGMAX = (
    Row(ANY, "fp32", "", QueriesArgmaxConfig(2, 16, 16, 8, 1), {"n_cls": 150},
        "Operands of ordinary multiply-adds fill the registers: 64 pixels, or 4 warps, spill."),
    Row(BLACKWELL, "tf32", "", QueriesArgmaxConfig(2, 16, 16, 4, 1), {"n_cls": 150},
        "64 pixels would go to tcgen05, limited to 168 registers a thread, and spill."),
    Row(ANY, "tf32", "", QueriesArgmaxConfig(4, 16, 16, 4, 1), {"n_cls": 150},
        "64 pixels are the rows of one wgmma, and 16 side by side read few mask cells. Accumulators take 80 registers "
        "of 150 classes, 128 of 256; with 32 queries a step they spill."),
)  # fmt: skip


def queries_argmax(architecture: str, precision: str, n_classes: int) -> QueriesArgmaxConfig:
    """The configuration for products of this precision ("ieee" or another) and so many classes."""
    return configs.look_up(QUERIES_ARGMAX, architecture, configs.kind_of(4, precision), n_cls=n_classes).config


TABLES = {"queries_argmax": QUERIES_ARGMAX}
