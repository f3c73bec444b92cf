"""Which tile shape each kernel runs with: reviewed tables in code, a row a choice, each with its reason.

Nothing is tuned in the user's process. No row has been measured yet: the reasons are what the compiled code looks like
(`python -m bench.compile_report` shows registers, spills and instructions of each row on each of its architectures, for
the call that the row names as its example). The first row of a table that fits a call is taken. Architectures without
rows of their own take those for ANY.
"""

import dataclasses
import functools
import operator
from typing import Any

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what kernels take
MAX_HEAD_DIM = 128  # of attention; a multiple of 8
MULTIPROCESSORS = 132  # of an H100 or H200; the others below have 60 to 304. Only used to cut work into pieces.

# Shared memory that one program may use, in bytes (CUDA C programming guide, table of compute capabilities).
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_103": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
ARCHITECTURES = tuple(a for a in SHARED_MEMORY if a != "sm_103")  # those that every kernel is compiled for
ANY, AMD = ("any",), ("gfx",)  # whatever is left; all that begin so
HOPPER, BLACKWELL, NEW = ("sm_90",), ("sm_100",), ("sm_90", "sm_100")

_COMPARISONS = {"<=": operator.le, ">=": operator.ge, "==": operator.eq}


@dataclasses.dataclass(frozen=True, slots=True)
class Row:
    """One choice.

    Attributes:
        architectures: names, or ANY or AMD. kind: of operands, "half" (bfloat16, float16), "fp32" (multiplied in
            float32), "tf32" or "all".
        when: conditions on the sizes that the look-up names, "a <= 1 and b >= 2"; none if empty.
        config: what such a call runs with. why: the reason.
        example: a call that takes this row, by arguments of its function in `bench.compile.cases`.
    """

    architectures: tuple[str, ...]
    kind: str
    when: str
    config: Any
    example: dict[str, Any]
    why: str = ""

    def fits(self, architecture: str, kind: str, sizes: dict[str, int]) -> bool:
        """Whether it is for such a call."""
        here = self.architectures == ANY or any(
            architecture == name or (name == "gfx" and architecture.startswith(name)) for name in self.architectures
        )
        conditions = [text.split() for text in self.when.split(" and ")] if self.when else []
        return (
            here
            and self.kind in (kind, "all")
            and all(_COMPARISONS[how](sizes[name], int(limit)) for name, how, limit in conditions)
        )


def look_up(table: tuple[Row, ...], architecture: str, kind: str = "all", **sizes: int) -> Row:
    """The first row of the table that fits."""
    return next(row for row in table if row.fits(architecture, kind, sizes))


def kind_of(element_size: int, precision: str) -> str:
    """The kind of operands of this many bytes, multiplied in this precision."""
    return "half" if element_size == 2 else "tf32" if precision != "ieee" else "fp32"


# ---------------------------------------------------------------------------------------------------------------------
# Attention


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Rows of queries and of keys a step, warps, pipeline stages, and whether tiles come through descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


ATTENTION = (
    Row(ANY, "fp32", "head_pad >= 128", AttentionConfig(16, 16, 8, 2), {"n": 1025, "d": 128},
        "Exactness is what float32 is used for here. Small tiles, because the operands of ordinary multiply-adds fill "
        "the registers: with four warps, or 32 keys a step, the tail spills."),
    Row(ANY, "fp32", "", AttentionConfig(32, 16, 8, 2), {"n": 1025}, "As above."),
    Row(("sm_90", "sm_100", "sm_103"), "tf32", "", AttentionConfig(64, 32, 4, 2, True), {"n": 1025},
        "TF32 needs V transposed through registers. Descriptors need fewer of them than pointers."),
    Row(ANY, "tf32", "", AttentionConfig(64, 32, 4, 2), {"n": 1025}, "As above, without the copy engine."),
    Row(NEW, "half", "head_pad >= 128", AttentionConfig(128, 128, 8, 2, True), {"n": 1025, "d": 128},
        "One program of two warpgroups; with 64 keys a step it would be one as well, with more instructions a key."),
    Row(NEW, "half", "n_keys <= 512", AttentionConfig(64, 64, 4, 2, True), {"n": 257},
        "Few key tiles: many small programs start and end at different times and fill each other's gaps."),
    Row(NEW, "half", "", AttentionConfig(128, 64, 8, 3, True), {"n": 1025},
        "128 query rows halve the reads of K and V from L2. Two programs, four warpgroups a multiprocessor, so softmax "
        "and products of different ones overlap. 128 keys a step need fewer instructions, but leave room for one "
        "program, whose two warpgroups go in step."),
    Row(("gfx942",), "half", "", AttentionConfig(128, 64, 8, 1), {"n": 1025}, "Four warps need too many registers."),
    Row(ANY, "half", "head_pad >= 128", AttentionConfig(128, 32, 8, 2), {"n": 1025, "d": 128},
        "101 KB of shared memory and mma.sync: sm_80, 86, 89, 120. 64 keys a step, or four warps, spill."),
    Row(ANY, "half", "", AttentionConfig(64, 64, 4, 2), {"n": 1025}, "As above, with room for more keys."),
)  # fmt: skip


def attention(architecture: str, element_size: int, head_pad: int, n_keys: int, precision: str) -> AttentionConfig:
    """The configuration for a head of `head_pad` columns (a power of two)."""
    kind = kind_of(element_size, precision)
    return look_up(ATTENTION, architecture, kind, head_pad=head_pad, n_keys=n_keys).config


@dataclasses.dataclass(frozen=True, slots=True)
class RotateConfig:
    """Elements of a head's tile (tokens times columns), heads and warps a program."""

    elements: int
    heads: int
    num_warps: int


ROTATE = (
    Row(ANY, "all", "", RotateConfig(2048, 4, 4), {"n": 1029},
        "16 bytes of a half type a thread and load, where halves are pairs. The tables, float32, are as many bytes as "
        "the reads and writes of one head: read once for four."),
)  # fmt: skip


def rotate() -> RotateConfig:
    """The configuration of rotary positions."""
    return look_up(ROTATE, "").config


# ---------------------------------------------------------------------------------------------------------------------
# Masks, from tokens and to labels


@dataclasses.dataclass(frozen=True, slots=True)
class MaskHeadConfig:
    """Patches a program, projected columns a chunk, depth of a step of the projection; the rest as for attention."""

    block_m: int
    block_d: int  # in the table the most: the widest of 256, 128 and 64 that divides d, else 64
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


MASK_HEAD = (
    Row(ANY, "fp32", "k_pad >= 128", MaskHeadConfig(32, 16, 16, 8, 2), {"n_cls": 150},
        "Ordinary multiply-adds hold whole rows of both operands in registers: 32 x 32 chunks against 256 classes "
        "spill, 16 columns at a time do not."),
    Row(ANY, "fp32", "", MaskHeadConfig(32, 32, 32, 4, 2), {"n_cls": 19}, "As above, with fewer classes."),
    Row(AMD, "tf32", "", MaskHeadConfig(64, 32, 32, 8, 2), {"n_cls": 150}, "64 KB of shared memory."),
    Row(ANY, "tf32", "", MaskHeadConfig(64, 64, 32, 8, 2), {"n_cls": 150},
        "TF32 needs the projection transposed through registers; with four warps ptxas then serialises the products."),
    Row(HOPPER, "half", "n_rows <= 8448", MaskHeadConfig(64, 128, 64, 4, 3, True), {"n_cls": 150},
        "Few rows: as long as programs of 64 do not outnumber the 132 multiprocessors, they end earlier."),
    Row(HOPPER, "half", "k_pad >= 128", MaskHeadConfig(128, 128, 64, 8, 3, True), {"batch": 16, "n_cls": 150},
        "As a plain product: 64 or 85 operations a byte from L2. 256 cosines and 128 columns of a chunk are 192 "
        "accumulator registers of 255 at two warpgroups."),
    Row(HOPPER, "half", "", MaskHeadConfig(128, 256, 64, 8, 3, True), {"batch": 16, "n_cls": 19},
        "As above; with few classes there is room for 256 columns."),
    Row(BLACKWELL, "half", "k_pad >= 128", MaskHeadConfig(64, 64, 64, 8, 3, True), {"n_cls": 150},
        "Accumulators are in tensor memory, which 128 x 128 chunks with 256 classes overflow (512 columns)."),
    Row(BLACKWELL, "half", "", MaskHeadConfig(128, 128, 64, 8, 3, True), {"n_cls": 19}, "As above, with room."),
    Row(AMD, "half", "", MaskHeadConfig(128, 64, 32, 8, 1), {"n_cls": 150},
        "64 KB of shared memory, of which a chunk of 256 classes takes 32."),
    Row(ANY, "half", "k_pad >= 128", MaskHeadConfig(64, 64, 64, 8, 3), {"n_cls": 150},
        "101 KB of shared memory and mma.sync. At four warps 256 cosines are 128 registers of accumulator, and "
        "operands come through registers too."),
    Row(ANY, "half", "", MaskHeadConfig(64, 64, 64, 4, 3), {"n_cls": 19}, "As above, with fewer cosines."),
)  # fmt: skip


def mask_head(architecture: str, element_size: int, k_pad: int, d: int, n_rows: int, precision: str) -> MaskHeadConfig:
    """The configuration for cosines with `k_pad` classes (a power of two from 16 to 256).

    Args:
        d: width. n_rows: patches of the whole batch.
    """
    config = look_up(MASK_HEAD, architecture, kind_of(element_size, precision), k_pad=k_pad, n_rows=n_rows).config
    chunk = next((size for size in (256, 128) if d % size == 0), 64)  # no part of a chunk beyond d at 192 to 1024
    return dataclasses.replace(config, block_d=min(config.block_d, chunk))


@dataclasses.dataclass(frozen=True, slots=True)
class UpsampleArgmaxConfig:
    """Rows of a tile at a time, warps."""

    block_y: int  # in the table for tiles of one column; wider ones have as many pixels
    num_warps: int


UPSAMPLE_ARGMAX = (
    Row(ANY, "all", "k_pad <= 256", UpsampleArgmaxConfig(256, 1), {"n_cls": 150},
        "A warp a tile: bounds and candidates are reductions over the classes, which then need no shared memory, and "
        "tiles differ in how many classes are left, so warps should not wait for each other. 256 pixels are 8 a "
        "thread."),
    Row(ANY, "all", "", UpsampleArgmaxConfig(256, 4), {"n_cls": 300}, "One warp would hold too many classes a thread."),
)  # fmt: skip


def upsample_argmax(architecture: str, block_x: int, k_pad: int) -> UpsampleArgmaxConfig:
    """The configuration for tiles of up to `block_x` columns and `k_pad` classes (both powers of two)."""
    config = look_up(UPSAMPLE_ARGMAX, architecture, k_pad=k_pad).config
    return dataclasses.replace(config, block_y=max(1, config.block_y // block_x))


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm


@dataclasses.dataclass(frozen=True, slots=True)
class LayerNormConfig:
    """Rows and columns a program, warps."""

    block_m: int
    block_n: int  # in the table the most: a power of two that holds a row, or a part of one
    num_warps: int


LAYERNORM = (
    Row(ANY, "all", "n <= 64", LayerNormConfig(64, 64, 4), {"n": 19},
        "About 32 values a thread, so several 16-byte loads in flight each."),
    Row(ANY, "all", "n <= 128", LayerNormConfig(32, 128, 4), {"n": 100}, "As above."),
    Row(ANY, "all", "n <= 256", LayerNormConfig(16, 256, 4), {"n": 192}, "As above."),
    Row(ANY, "all", "n <= 1024", LayerNormConfig(1, 1024, 1), {"n": 768},
        "One row a program, which is one warp's, so that the sums need no shared memory."),
    Row(ANY, "all", "n <= 2048", LayerNormConfig(1, 2048, 2), {"n": 1280}, "One row a program, 32 values a thread."),
    Row(ANY, "all", "n <= 4096", LayerNormConfig(1, 4096, 4), {"n": 4096}, "As above."),
    Row(ANY, "all", "", LayerNormConfig(1, 8192, 8), {"n": 10_000}, "As above; longer rows in parts."),
)  # fmt: skip
FOLD = (
    Row(ANY, "all", "", LayerNormConfig(4, 256, 4), {"m": 16_400, "d": 768},
        "Of a LayerNorm into weights: a warp a row, 8 values a thread and step."),
)  # fmt: skip


def layernorm(n: int) -> LayerNormConfig:
    """The configuration for rows of n columns."""
    config = look_up(LAYERNORM, "", n=n).config
    return dataclasses.replace(config, block_n=min(config.block_n, max(2, 1 << (n - 1).bit_length())))


def fold(k: int) -> LayerNormConfig:
    """The configuration for folding a LayerNorm into weights of k columns."""
    return look_up(FOLD, "").config


# ---------------------------------------------------------------------------------------------------------------------
# Products. m rows of x throughout.


@dataclasses.dataclass(frozen=True, slots=True)
class LinearConfig:
    """Rows, columns and depth of a step, row blocks a group (for the L2 cache); the rest as for attention."""

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def blocks(m: int, n: int) -> int:
    """Blocks of 128 x 128; 0 where 128 columns would waste half of the last one (192 is one and a half)."""
    return 0 if 0 < n % 128 <= 64 else -(-m // 128) * -(-n // 128)


_FEW, _FC1, _FC2 = {"m": 257, "residual": True}, {"m": 8200, "gelu": True}, {"m": 8200, "k": 3072, "residual": True}
LINEAR = (
    Row(NEW, "tf32", "", LinearConfig(128, 128, 32, 8, 8, 3, True), _FC1,
        "32 columns of float32 are the 128 bytes that the tensor cores' swizzled layout spans."),
    Row(AMD, "tf32", "", LinearConfig(64, 64, 32, 8, 4, 2), _FC1, "64 KB of shared memory; two stages are one buffer."),
    Row(ANY, "tf32", "", LinearConfig(64, 64, 32, 8, 4, 3), _FC1, "101 KB of shared memory."),
    Row(AMD, "fp32", "", LinearConfig(64, 64, 32, 8, 4, 2), _FC1, "As for TF32."),
    Row(ANY, "fp32", "", LinearConfig(64, 64, 32, 8, 4, 3), _FC1,
        "Ordinary multiply-adds are most of the loop's instructions, by pointers. Descriptors spill."),
    Row(NEW, "half", "blocks <= 131", LinearConfig(64, 64, 64, 8, 4, 4, True), _FEW,
        "Small blocks where enough programs matter more than reuse: fewer than one of 128 x 128 a multiprocessor. "
        "64 KB: three on a multiprocessor."),
    Row(NEW, "half", "blocks <= 263", LinearConfig(64, 128, 64, 8, 4, 3, True),
        {"m": 8200, "k": 1536, "n": 384, "residual": True},
        "Half a block more evenly spread: with fewer than two on each, some would have twice the work of others. "
        "72 KB: three on a multiprocessor."),
    Row(NEW, "half", "blocks >= 2112 and gelu == 0", LinearConfig(128, 256, 64, 8, 8, 4, True),
        {"m": 65_600, "k": 3072, "residual": True},
        "Reads a quarter less from L2 than 128 columns. One program fits, so its ends are exposed (a GELU would be "
        "too), and its 1 of 8 or more rounds may be partly empty."),
    Row(NEW, "half", "", LinearConfig(128, 128, 64, 8, 8, 3, True), _FC1,
        "96 KB: two programs on a multiprocessor, one computes while the other does its GELU or waits for its "
        "residual."),
    Row(AMD, "half", "blocks <= 131", LinearConfig(64, 64, 64, 8, 4, 2), _FEW, "As above."),
    Row(ANY, "half", "blocks <= 131", LinearConfig(64, 64, 64, 8, 4, 3), _FEW, "As above."),
    Row(("sm_80",), "half", "", LinearConfig(128, 128, 64, 8, 8, 3), _FC1, "96 KB of the 163."),
    Row(AMD, "half", "", LinearConfig(128, 128, 64, 8, 8, 2), _FC1, "32 KB of the 64; two stages are one buffer."),
    Row(ANY, "half", "", LinearConfig(128, 128, 32, 8, 8, 4), _FC1,
        "48 KB of the 99 on sm_86, 89 and 120. Pointers: descriptors save nothing with mma.sync."),
)  # fmt: skip


def linear(architecture: str, element_size: int, m: int, n: int, gelu: bool, precision: str) -> LinearConfig:
    """The configuration of our kernel for (m, k) times (n, k)^T."""
    kind = kind_of(element_size, precision)
    return look_up(LINEAR, architecture, kind, blocks=blocks(m, n), gelu=gelu).config


def linear_by_library(gelu: bool, residual: bool) -> bool:
    """Whether a linear layer is cuBLASLt's, which adds a bias too: where there is nothing else for an epilogue to save.

    cuBLASLt's own GELU is the tanh form, and its sum with a residual leaves no room for the bias.
    """
    return not (gelu or residual)


def layernorm_linear(architecture: str, element_size: int, m: int, k: int, gelu: bool, same_type: bool) -> str:
    """How LayerNorm and product are combined: "library" (with cuBLASLt), "separate" (with ours), "fold" or "rows".

    `same_type`: x has the type of the weights.
    """
    half = element_size == 2
    if half and k == 192 and architecture in ARCHITECTURES:
        # 2*192*n operations for (192 + n) * 2 bytes are bound by memory, and LayerNorm's result is a third of the
        # traffic of qkv. At 384 a row block and two stages of weights take 155 KB, one small program a
        # multiprocessor, and the product is no longer bound by memory: not there.
        return "rows"
    if linear_by_library(gelu, False):
        # What folding saves, one write of x, is a twentieth of qkv at k = 1,024: what cuBLASLt is ahead.
        return "library"
    if half and same_type and gelu and k >= 768 and m >= 16384:
        # Saves that write and costs reading and writing the weights once and a launch: even at about 12,000 rows.
        return "fold"
    return "separate"


_PADDED = {"batch": 32, "side": 500}
PIXELS_TO_TOKENS = (  # blocks: as for `linear`, and 0 too if rows of a patch are no multiple of 8 bytes
    Row(BLACKWELL, "fp32", "", LinearConfig(64, 64, 16, 8, 4, 3), {}, "Three products in TF32; eight warps spill."),
    Row(AMD, "fp32", "", LinearConfig(64, 64, 16, 8, 8, 2), {}, "As below."),
    Row(ANY, "fp32", "", LinearConfig(64, 64, 16, 8, 8, 3), {}, "32 columns a step spill with four warps."),
    Row(BLACKWELL, "tf32", "", LinearConfig(64, 64, 32, 8, 8, 3, True), {},
        "128 bytes of float32 a step, as in `linear`. 64 columns with four warps spill, 128 nearly."),
    Row(HOPPER, "tf32", "blocks >= 132", LinearConfig(64, 128, 32, 8, 4, 3, True), {},
        "128 bytes of float32 a step. 60 KB: three on a multiprocessor."),
    Row(("sm_90", "sm_103", "sm_120"), "tf32", "", LinearConfig(64, 64, 32, 8, 4, 3, True), {"batch": 1},
        "As above, for few rows."),
    Row(AMD, "tf32", "", LinearConfig(64, 64, 32, 8, 4, 2), {}, "As above, without the copy engine."),
    Row(ANY, "tf32", "", LinearConfig(64, 64, 32, 8, 4, 3), {}, "As above."),
    Row(("sm_90", "sm_100", "sm_103", "sm_120"), "half", "blocks <= 131",
        LinearConfig(64, 64, 64, 8, 4, 3, True), {"batch": 1},
        "As in `linear`. And where the rows of a patch are no multiple of 8 bytes, so that each thread holds a pointer "
        "to every two of them, which larger blocks have no registers for. 40 KB."),
    Row(AMD, "half", "blocks <= 131", LinearConfig(64, 64, 64, 8, 4, 2), {"batch": 1}, "As above."),
    Row(ANY, "half", "blocks <= 131", LinearConfig(64, 64, 64, 8, 4, 3), {"batch": 1}, "As above."),
    Row(NEW, "half", "padded == 1", LinearConfig(64, 128, 64, 8, 4, 3, True), _PADDED,
        "Three on a multiprocessor; as below it would be one."),
    Row(NEW, "half", "", LinearConfig(128, 128, 64, 8, 8, 3, True), {},
        "80 KB: two, one converts its bytes while the other multiplies. Converting is most of what the tensor cores "
        "take, and each column block converts anew, so not fewer columns; with 256 columns it would be one program, "
        "which does one after the other."),
    Row(("sm_103", "sm_120"), "half", "", LinearConfig(128, 64, 64, 8, 4, 3, True), {}, "As for sm_80."),
    Row(AMD, "half", "", LinearConfig(128, 64, 64, 8, 4, 2), {}, "As for sm_80."),
    Row(ANY, "half", "", LinearConfig(128, 64, 64, 8, 4, 3), {},
        "32 KB; on sm_80 the registers leave room for two."),
)  # fmt: skip


def pixels_to_tokens(
    architecture: str, element_size: int, rows: int, d: int, patch_size: int, padded: bool, precision: str
) -> LinearConfig:
    """The configuration for `rows` patches, of all images together, times (d, 3 P^2) weights.

    Args:
        padded: patches at the borders take biases of their own, a second table of which rows are gathered.
    """
    n_blocks = blocks(rows, d) if patch_size % 8 == 0 else 0
    kind = kind_of(element_size, precision)
    return look_up(PIXELS_TO_TOKENS, architecture, kind, blocks=n_blocks, padded=padded).config


@dataclasses.dataclass(frozen=True, slots=True)
class RowsConfig:
    """Rows a program, output columns a step, programs that share the columns; the rest as for attention."""

    block_m: int
    block_n: int
    split: int  # in the table the most: programs of one row block for as many as there are multiprocessors
    num_warps: int
    num_stages: int
    descriptors: bool = False


ROWS = (
    Row(NEW, "half", "", RowsConfig(64, 64, MULTIPROCESSORS, 4, 3, True), {"m": 8200, "d": 192},
        "104 KB with three stages of weights: two programs on a multiprocessor of sm_90. Few row blocks: several "
        "programs normalise the same one, which is cheap, and share the output columns."),
    Row(ANY, "half", "", RowsConfig(64, 64, MULTIPROCESSORS, 4, 2), {"m": 8200, "d": 192}, "As above."),
)  # fmt: skip


def rows(architecture: str, m: int, n: int) -> RowsConfig:
    """The configuration for LayerNorm and product in one kernel, at width 192."""
    config = look_up(ROWS, architecture, "half").config
    split = min(config.split // -(-m // config.block_m), -(-n // config.block_n))
    return dataclasses.replace(config, split=max(1, split))


@dataclasses.dataclass(frozen=True, slots=True)
class MlpConfig:
    """Rows a program, hidden columns a step; the rest as for attention."""

    block_m: int
    block_h: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


MLP = (
    Row(HOPPER, "half", "m <= 8448", MlpConfig(64, 32, 4, 5, True), {"m": 8200, "d": 192},
        "One program a multiprocessor at most, with its rows spread over as many as there are: room for more stages. "
        "With 64 columns a step, here and below, ptxas 13 serialises the products."),
    Row(HOPPER, "half", "m <= 16896", MlpConfig(64, 32, 4, 3, True), {"m": 16_400, "d": 192},
        "96 KB: two on a multiprocessor, out of step with each other."),
    Row(HOPPER, "half", "", MlpConfig(128, 32, 8, 5, True), {"m": 65_600, "d": 192},
        "168 KB. 128 rows halve the reads of the weights from L2."),
    Row(BLACKWELL, "half", "", MlpConfig(128, 64, 8, 2, True), {"m": 8200, "d": 192}, "Accumulators in tensor memory."),
    Row(("sm_120",), "half", "", MlpConfig(64, 32, 4, 2, True), {"m": 8200, "d": 192}, "48 KB; pointers would spill."),
    Row(ANY, "half", "", MlpConfig(64, 32, 4, 2), {"m": 8200, "d": 192},
        "48 KB. All registers, and a few more spilled outside the loop."),
)  # fmt: skip


def layernorm_mlp(architecture: str, element_size: int, d: int, scaled: bool = False) -> str:
    """How the MLP is cut into kernels: "single" or "split".

    At 384 a single kernel compiles without spills only for 64 rows (8 warps, 32 hidden columns a step), and 64 rows
    read all 2.4 MB of weights from L2 again: 300 MB at m = 8,200, twice the time of the products. At 192 it is 0.6 MB
    for up to 128 rows.

    scaled: with LayerScale, for which sm_80, 86 and 89 have no register left: it would spill.
    """
    full = scaled and architecture.startswith("sm_8")
    return "single" if element_size == 2 and d == 192 and architecture in ARCHITECTURES and not full else "split"


@functools.lru_cache(4096)  # asked on every call, unlike the others, which only a new shape asks
def mlp(architecture: str, m: int) -> MlpConfig:
    """The configuration of the single kernel at width 192."""
    return look_up(MLP, architecture, "half", m=m).config


TABLES = {  # of the forward pass: table -> the operator that its examples call. configs_backward.py has all of them
    "attention": ATTENTION,
    "rotate": ROTATE,
    "mask_head": MASK_HEAD,
    "upsample_argmax": UPSAMPLE_ARGMAX,
    "layernorm": LAYERNORM,
    "linear": LINEAR,
    "pixels_to_tokens": PIXELS_TO_TOKENS,
    "layernorm_linear": ROWS,
    "layernorm_mlp": MLP,
    "fold": FOLD,
}
