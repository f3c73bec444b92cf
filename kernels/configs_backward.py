"""Which tile shape each kernel of training runs with: tables as in kernels/configs.py, and all tables together.

All of these rows are estimates, by registers, shared memory and reads from L2: none has been measured.
"""

import dataclasses

from segmenter.kernels import configs, configs_maps, configs_queries
from segmenter.kernels.configs import AMD, ANY, BLACKWELL, MULTIPROCESSORS, NEW, AttentionConfig, LinearConfig, Row


@dataclasses.dataclass(frozen=True, slots=True)
class DeltaConfig:
    """Rows a program (a divisor of 128), warps."""

    block_m: int
    num_warps: int


# Of attention's gradient, in the order of its launches; `AttentionConfig` is rows of queries and of keys as forward.
# With pointers there is one loop, every step masked: a second body for the last tile keeps the addresses of both and
# spills.
ATTENTION_DELTA = (
    Row(BLACKWELL, "all", "", DeltaConfig(32, 4), {"n": 1025}, "64 rows spill."),
    Row(ANY, "all", "", DeltaConfig(64, 4), {"n": 1025}, "32 values a thread of o and of its gradient."),
)
ATTENTION_DKDV = (
    Row(ANY, "fp32", "head_pad >= 128", AttentionConfig(16, 16, 8, 2), {"n": 1025, "d": 128},
        "As forward: operands of ordinary multiply-adds fill the registers."),
    Row(ANY, "fp32", "", AttentionConfig(32, 16, 8, 2), {"n": 1025}, "As above."),
    Row(NEW, "tf32", "head_pad >= 128", AttentionConfig(16, 64, 4, 2, True), {"n": 1025, "d": 128},
        "dO and Q are transposed through registers, and a warpgroup's product has 64 rows. 98 KB: two programs."),
    Row(NEW, "tf32", "", AttentionConfig(32, 64, 4, 2, True), {"n": 1025}, "As above, with room for three."),
    Row(AMD, "tf32", "", AttentionConfig(32, 32, 4, 1), {"n": 1025}, "64 KB of shared memory."),
    Row(ANY, "tf32", "head_pad >= 128", AttentionConfig(32, 32, 8, 2), {"n": 1025, "d": 128},
        "82 KB of 101; with four warps all registers."),
    Row(ANY, "tf32", "", AttentionConfig(64, 32, 4, 2), {"n": 1025}, "As above, with room for 64 queries a step."),
    Row(NEW, "half", "head_pad >= 128", AttentionConfig(64, 64, 8, 2, True), {"n": 1025, "d": 128},
        "Both accumulators are 128 columns wide: four warps take all registers."),
    Row(NEW, "half", "head_pad == 32", AttentionConfig(64, 64, 4, 1, True), {"n": 1025, "d": 32},
        "With a second stage ptxas serialises the products."),
    Row(NEW, "half", "", AttentionConfig(64, 64, 4, 2, True), {"n": 1025},
        "Four products for each 16 KB of Q and dO from L2, so larger tiles save nothing there. Two programs of one "
        "warpgroup are out of step, one of two (64 x 128, as many registers) is not."),
    Row(AMD, "half", "", AttentionConfig(32, 64, 4, 1), {"n": 1025}, "64 KB of shared memory."),
    Row(ANY, "half", "head_pad >= 128", AttentionConfig(64, 64, 8, 2), {"n": 1025, "d": 128},
        "74 KB of 101 on sm_86, 89 and 120, and mma.sync. Fewer rows with four warps spill."),
    Row(ANY, "half", "", AttentionConfig(32, 64, 4, 2), {"n": 1025}, "As above. 64 queries a step take all registers."),
)  # fmt: skip
ATTENTION_DQ = (
    Row(ANY, "fp32", "head_pad >= 128", AttentionConfig(16, 16, 8, 2), {"n": 1025, "d": 128}, "As above."),
    Row(ANY, "fp32", "", AttentionConfig(32, 16, 8, 2), {"n": 1025}, "As above."),
    Row(NEW, "tf32", "head_pad >= 128", AttentionConfig(64, 32, 8, 2, True), {"n": 1025, "d": 128},
        "K is transposed through registers."),
    Row(NEW, "tf32", "", AttentionConfig(64, 32, 4, 2, True), {"n": 1025}, "As above."),
    Row(AMD, "tf32", "", AttentionConfig(32, 32, 4, 1), {"n": 1025}, "64 KB of shared memory."),
    Row(ANY, "tf32", "head_pad >= 128", AttentionConfig(32, 32, 4, 2), {"n": 1025, "d": 128}, "82 KB of 101."),
    Row(ANY, "tf32", "", AttentionConfig(64, 32, 4, 2), {"n": 1025}, "As above, with room for 64 queries."),
    Row(NEW, "half", "head_pad >= 128", AttentionConfig(64, 64, 4, 2, True), {"n": 1025, "d": 128},
        "96 KB: two programs. With 128 queries it would be one."),
    Row(NEW, "half", "n <= 512", AttentionConfig(64, 64, 4, 2, True), {"n": 257}, "As forward: many small programs."),
    Row(NEW, "half", "", AttentionConfig(128, 64, 8, 2, True), {"n": 1025},
        "Three products for each 16 KB of K and V from L2 at 64 queries; 128 halve that. Two programs, four "
        "warpgroups."),
    Row(AMD, "half", "", AttentionConfig(64, 32, 4, 1), {"n": 1025}, "64 KB of shared memory."),
    Row(ANY, "half", "", AttentionConfig(64, 32, 4, 2), {"n": 1025}, "mma.sync: 64 keys a step take all registers."),
)  # fmt: skip


ATTENTION_BY = (  # what computes it: "kernels", or "sdpa", PyTorch's scaled_dot_product_attention evaluated again
    Row(ANY, "all", "", "kernels", {},
        "An estimate, not measured: seven products, where PyTorch makes the two of the forward pass and five, and "
        "copies dQ, dK and dV together. cuDNN may still be faster for long sequences on sm_90: then a row above this "
        "one, with n >= a length."),
)  # fmt: skip


def attention_by(architecture: str, element_size: int, n: int) -> str:
    """What computes the gradient of attention to n keys: "kernels" or "sdpa"."""
    return configs.look_up(ATTENTION_BY, architecture, configs.kind_of(element_size, "tf32"), n=n).config


def attention_delta(architecture: str) -> DeltaConfig:
    """The configuration of the row sums."""
    return configs.look_up(ATTENTION_DELTA, architecture).config


def attention_dkdv(architecture: str, element_size: int, head_pad: int, n: int, precision: str) -> AttentionConfig:
    """The configuration of dK and dV, which walk over n queries."""
    kind = configs.kind_of(element_size, precision)
    return configs.look_up(ATTENTION_DKDV, architecture, kind, head_pad=head_pad, n=n).config


def attention_dq(architecture: str, element_size: int, head_pad: int, n: int, precision: str) -> AttentionConfig:
    """The configuration of dQ, which walks over n keys."""
    kind = configs.kind_of(element_size, precision)
    return configs.look_up(ATTENTION_DQ, architecture, kind, head_pad=head_pad, n=n).config


# ---------------------------------------------------------------------------------------------------------------------
# The mask head, and sums of parameters' gradients


@dataclasses.dataclass(frozen=True, slots=True)
class UnitRowsConfig:
    """Numbers a program, as whole rows and one at least; warps."""

    elements: int
    num_warps: int


@dataclasses.dataclass(frozen=True, slots=True)
class MaskHeadBackwardConfig:
    """Patches a program and step, columns of a step of the product; the rest as for attention."""

    block_m: int
    block_d: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


@dataclasses.dataclass(frozen=True, slots=True)
class PartialSumsConfig:
    """Partial sums a step, columns a program, warps."""

    block_s: int
    block_n: int
    num_warps: int


UNIT_ROWS = (
    Row(ANY, "all", "", UnitRowsConfig(4096, 4), {"n_cls": 150},
        "32 numbers a thread and tensor: rows are read once and kept."),
)  # fmt: skip
MASK_HEAD_BACKWARD = (
    Row(ANY, "fp32", "k_pad >= 128", MaskHeadBackwardConfig(16, 32, 8, 2), {"n_cls": 150},
        "As forward: operands of ordinary multiply-adds fill the registers."),
    Row(ANY, "fp32", "", MaskHeadBackwardConfig(32, 32, 4, 2), {"n_cls": 19}, "As above, with fewer classes."),
    Row(AMD, "tf32", "", MaskHeadBackwardConfig(64, 32, 8, 1), {"n_cls": 150}, "64 KB of shared memory."),
    Row(ANY, "tf32", "", MaskHeadBackwardConfig(64, 32, 8, 2), {"n_cls": 150}, "As half types below."),
    Row(NEW, "half", "k_pad >= 128", MaskHeadBackwardConfig(64, 64, 8, 3, True), {"n_cls": 150},
        "Cosines, the masks' gradient and z of 128 classes are 32 registers each; a warpgroup's product has 64 rows. "
        "72 KB."),
    Row(NEW, "half", "", MaskHeadBackwardConfig(64, 64, 4, 3, True), {"n_cls": 19}, "As above, with fewer cosines."),
    Row(AMD, "half", "", MaskHeadBackwardConfig(64, 64, 8, 1), {"n_cls": 150}, "64 KB of shared memory."),
    Row(ANY, "half", "k_pad >= 128", MaskHeadBackwardConfig(64, 64, 8, 2), {"n_cls": 150},
        "As above, and mma.sync, whose operands are in registers too."),
    Row(ANY, "half", "", MaskHeadBackwardConfig(64, 64, 4, 3), {"n_cls": 19}, "As above, with fewer cosines."),
)  # fmt: skip
PARTIAL_SUMS = (
    Row(ANY, "all", "", PartialSumsConfig(32, 128, 4), {"n_cls": 150},
        "Few numbers: rows of 512 bytes, 32 numbers a thread in flight."),
)  # fmt: skip


def unit_rows(architecture: str) -> UnitRowsConfig:
    """The configuration of dividing rows by their norms, and of the gradient of that."""
    return configs.look_up(UNIT_ROWS, architecture).config


def mask_head_backward(architecture: str, element_size: int, k_pad: int, precision: str) -> MaskHeadBackwardConfig:
    """The configuration for the gradient of cosines with `k_pad` classes (a power of two from 16 to 128)."""
    kind = configs.kind_of(element_size, precision)
    return configs.look_up(MASK_HEAD_BACKWARD, architecture, kind, k_pad=k_pad).config


def partial_sums(architecture: str) -> PartialSumsConfig:
    """The configuration of adding what several programs stored."""
    return configs.look_up(PARTIAL_SUMS, architecture).config


# ---------------------------------------------------------------------------------------------------------------------
# The patch embedding's weights


@dataclasses.dataclass(frozen=True, slots=True)
class PatchWeightsConfig:
    """Patches a step, rows and columns of the weights a program, warps, pipeline stages."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


PATCH_WEIGHTS = (
    Row(ANY, "fp32", "", PatchWeightsConfig(16, 32, 32, 4, 2), {"batch": 8},
        "Operands of ordinary multiply-adds fill the registers."),
    Row(ANY, "tf32", "", PatchWeightsConfig(32, 64, 64, 4, 2), {"batch": 8},
        "The gradient is transposed through registers."),
    Row(NEW, "half", "", PatchWeightsConfig(64, 128, 128, 8, 3), {"batch": 8},
        "As a plain product. Rows are walked over: their bytes are converted for each column block of the weights."),
    Row(AMD, "half", "", PatchWeightsConfig(32, 64, 64, 4, 1), {"batch": 8}, "64 KB of shared memory."),
    Row(ANY, "half", "", PatchWeightsConfig(32, 64, 128, 4, 3), {"batch": 8}, "101 KB, and mma.sync."),
)  # fmt: skip


def patch_weights(architecture: str, element_size: int, precision: str) -> PatchWeightsConfig:
    """The configuration of the gradient of a patch embedding's weights."""
    return configs.look_up(PATCH_WEIGHTS, architecture, configs.kind_of(element_size, precision)).config


# ---------------------------------------------------------------------------------------------------------------------
# The loss


@dataclasses.dataclass(frozen=True, slots=True)
class UpsampleCrossEntropyConfig:
    """Pixels of a row at a time, warps."""

    block_x: int  # in the table the most: at most the patch, as a power of two
    num_warps: int


UPSAMPLE_CROSS_ENTROPY = (
    Row(ANY, "all", "k_pad <= 32", UpsampleCrossEntropyConfig(16, 1), {"n_cls": 19},
        "A warp a cell: 16 pixels of 32 classes are 16 values a thread, and no sum needs shared memory."),
    Row(ANY, "all", "k_pad <= 128", UpsampleCrossEntropyConfig(16, 4), {"n_cls": 100}, "As below."),
    Row(ANY, "all", "k_pad <= 256", UpsampleCrossEntropyConfig(16, 8), {"n_cls": 150},
        "Scores, exponentials and gradients of 16 pixels and 256 classes are 16 values a thread each; with four warps "
        "nearly all registers, and 32 pixels spill."),
    Row(ANY, "all", "k_pad <= 512", UpsampleCrossEntropyConfig(4, 8), {"n_cls": 300}, "8 pixels spill on sm_100."),
    Row(ANY, "all", "k_pad <= 1024", UpsampleCrossEntropyConfig(4, 8), {"n_cls": 847}, "As above."),
    Row(ANY, "all", "", UpsampleCrossEntropyConfig(1, 8), {"n_cls": 2000}, "As above; more classes spill on sm_100."),
)  # fmt: skip


def upsample_cross_entropy(block_x: int, k_pad: int) -> UpsampleCrossEntropyConfig:
    """The configuration for rows of a cell of `block_x` pixels and `k_pad` classes (both powers of two).

    Four elements a thread at least: where lanes repeat each other's sums they may round them differently, and then
    which of them is stored is chance.
    """
    config = configs.look_up(UPSAMPLE_CROSS_ENTROPY, "", k_pad=k_pad).config
    block_x = min(config.block_x, block_x)
    return UpsampleCrossEntropyConfig(block_x, max(1, min(config.num_warps, block_x * k_pad // 128)))


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm and linear layers


@dataclasses.dataclass(frozen=True, slots=True)
class SumsConfig:
    """Rows and columns a step, warps, and how many programs keep sums of the same columns.

    The order of additions follows from all of these: so no row is for an architecture of its own.
    """

    block_m: int
    block_n: int  # in the table of LayerNorm the most: a power of two that holds a row, or a part of one
    num_warps: int
    programs: int  # in the tables the most, of all columns together: multiples of 132 multiprocessors


_EACH = MULTIPROCESSORS
LAYERNORM_BACKWARD = (
    Row(ANY, "all", "n <= 64", SumsConfig(32, 64, 4, 8 * _EACH), {"n": 19},
        "About 16 values a thread of x, of the gradient and of both sums. Parts are few numbers, so there may be as "
        "many programs as fill the multiprocessors."),
    Row(ANY, "all", "n <= 128", SumsConfig(16, 128, 4, 8 * _EACH), {"n": 100}, "As above."),
    Row(ANY, "all", "n <= 256", SumsConfig(8, 256, 4, 8 * _EACH), {"n": 192}, "As above."),
    Row(ANY, "all", "n <= 512", SumsConfig(8, 512, 8, 4 * _EACH), {"n": 384},
        "As above, half as many of twice the warps."),
    Row(ANY, "all", "n <= 1024", SumsConfig(4, 1024, 8, 2 * _EACH), {"n": 768},
        "Two programs a multiprocessor, with 24 to 48 KB in flight: parts, float32 and twice, are a twentieth of what "
        "is read at m = 8,200. More rows a step would leave room for one program."),
    Row(ANY, "all", "n <= 2048", SumsConfig(2, 2048, 8, 2 * _EACH), {"n": 1280}, "As above."),
    Row(ANY, "all", "n <= 4096", SumsConfig(1, 4096, 8, 2 * _EACH), {"n": 4096}, "As above."),
    Row(ANY, "all", "n <= 8192", SumsConfig(1, 8192, 16, _EACH), {"n": 8192}, "As above, one program of all warps."),
    Row(ANY, "all", "", SumsConfig(4, 1024, 8, 2 * _EACH), {"n": 10_000}, "Statistics first; then columns are cut."),
)  # fmt: skip
COLUMN_SUMS = (
    Row(ANY, "all", "", SumsConfig(32, 128, 4, 4 * _EACH), {"m": 8200, "n": 768},
        "32 values a thread in 16-byte loads. Four programs a multiprocessor; the wider the rows, the fewer parts."),
)  # fmt: skip


_HIDDEN = {"m": 8200, "d": 768}
GELU_BACKWARD = (  # blocks: as for `linear`
    Row(NEW, "tf32", "", LinearConfig(64, 64, 32, 8, 4, 3, True), _HIDDEN,
        "TF32 needs fc2's weight transposed through registers: 128 columns spill."),
    Row(AMD, "tf32", "", LinearConfig(64, 64, 32, 8, 4, 2), _HIDDEN, "64 KB of shared memory."),
    Row(ANY, "tf32", "", LinearConfig(64, 64, 32, 8, 4, 3), _HIDDEN, "101 KB of shared memory."),
    Row(AMD, "fp32", "", LinearConfig(64, 64, 32, 8, 4, 2), _HIDDEN, "As for TF32."),
    Row(ANY, "fp32", "", LinearConfig(64, 64, 32, 8, 4, 3), _HIDDEN, "As for TF32."),
    Row(NEW, "half", "blocks <= 131", LinearConfig(64, 64, 64, 8, 4, 4, True), {"m": 257, "d": 768},
        "Small blocks where enough programs matter more than reuse."),
    Row(NEW, "half", "", LinearConfig(128, 64, 64, 8, 8, 3, True), _HIDDEN,
        "Two programs on a multiprocessor: one multiplies while the other is in its epilogue, which reads one block "
        "and writes two. With 128 columns it holds twice the registers, and there is room for one."),
    Row(AMD, "half", "blocks <= 131", LinearConfig(64, 64, 64, 8, 4, 2), {"m": 257, "d": 768}, "As above."),
    Row(ANY, "half", "blocks <= 131", LinearConfig(64, 64, 64, 8, 4, 3), {"m": 257, "d": 768}, "As above."),
    Row(("sm_80",), "half", "", LinearConfig(128, 64, 64, 8, 8, 3), _HIDDEN, "128 columns spill."),
    Row(AMD, "half", "", LinearConfig(128, 64, 64, 8, 8, 2), _HIDDEN, "As above; two stages are one buffer."),
    Row(ANY, "half", "", LinearConfig(128, 64, 32, 8, 8, 4), _HIDDEN, "As above; 48 KB of the 99 on sm_86."),
)  # fmt: skip


def gelu_backward(architecture: str, element_size: int, m: int, n: int, precision: str) -> LinearConfig:
    """The configuration of the product that is dA (m, n)."""
    kind = configs.kind_of(element_size, precision)
    return configs.look_up(GELU_BACKWARD, architecture, kind, blocks=configs.blocks(m, n)).config


def layernorm_backward(m: int, n: int) -> SumsConfig:
    """The configuration for m rows of n columns."""
    config = configs.look_up(LAYERNORM_BACKWARD, "", n=n).config
    block_n = min(config.block_n, max(2, 1 << (n - 1).bit_length()))
    return _cut(dataclasses.replace(config, block_n=block_n), m, n)


def column_sums(m: int, n: int) -> SumsConfig:
    """The configuration for the sums over m rows of n columns."""
    return _cut(configs.look_up(COLUMN_SUMS, "").config, m, n)


def _cut(config: SumsConfig, m: int, n: int) -> SumsConfig:
    """With as many programs for the same columns as there is work for."""
    programs = min(config.programs // -(-n // config.block_n), -(-m // config.block_m))
    return dataclasses.replace(config, programs=max(1, programs))


TABLES = {  # what is compiled row by row
    **configs.TABLES,
    **configs_maps.TABLES,
    **configs_queries.TABLES,
    "attention_delta": ATTENTION_DELTA,
    "attention_dkdv": ATTENTION_DKDV,
    "attention_dq": ATTENTION_DQ,
    "unit_rows": UNIT_ROWS,
    "mask_head_backward": MASK_HEAD_BACKWARD,
    "partial_sums": PARTIAL_SUMS,
    "patch_weights": PATCH_WEIGHTS,
    "upsample_cross_entropy": UPSAMPLE_CROSS_ENTROPY,
    "layernorm_backward": LAYERNORM_BACKWARD,
    "column_sums": COLUMN_SUMS,
    "gelu_backward": GELU_BACKWARD,
}
