"""Which tile shape each kernel runs with: a reviewed table in code, one row a choice, each with its reason.

Nothing is tuned in the user's process. No row has been measured yet: the reasons are register counts, shared memory
and instruction counts of the compiled code (`python -m bench.compile_report` prints them). Architectures without rows
of their own take the safe defaults.
"""

import dataclasses

import torch

FLOATS = (torch.bfloat16, torch.float16, torch.float32)  # what kernels take
MAX_HEAD_DIM = 128  # of attention; a multiple of 8

# Shared memory that one program may use, in bytes (CUDA C programming guide, table of compute capabilities).
SHARED_MEMORY = {
    "sm_80": 166_912,
    "sm_86": 101_376,
    "sm_89": 101_376,
    "sm_90": 232_448,
    "sm_100": 232_448,
    "sm_120": 101_376,
    "gfx942": 65_536,
}
ARCHITECTURES = tuple(SHARED_MEMORY)  # those that every configuration is compiled and checked for
DESCRIPTOR_ARCHITECTURES = ("sm_90", "sm_100", "sm_103", "sm_120")  # they have the bulk tensor copy engine


@dataclasses.dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Rows of queries and of keys a step, warps, pipeline stages, and whether tiles come through descriptors."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def attention(architecture: str, element_size: int, head_pad: int, n_keys: int, precision: str) -> AttentionConfig:
    """The configuration for a head of `head_pad` columns (a power of two)."""
    descriptors = architecture in DESCRIPTOR_ARCHITECTURES
    if element_size == 4:
        # Exactness is what float32 is used for here. Small tiles, because the operands of ordinary multiply-adds fill
        # the registers: with four warps, or 32 keys a step, the tail spills.
        if precision == "ieee":
            return AttentionConfig(16 if head_pad == 128 else 32, 16, 8, 2)
        # TF32 needs V transposed through registers. Descriptors need 40 of them less than pointers.
        return AttentionConfig(64, 32, 4, 2, descriptors and architecture != "sm_120")
    if architecture in ("sm_90", "sm_100"):
        if head_pad == 128:
            # One program of two warpgroups, with 64 keys a step as well, which need 20 to 34 % more instructions.
            return AttentionConfig(128, 128, 8, 2, descriptors)
        if n_keys <= 512:
            # Few key tiles: many small programs start and end at different times and fill each other's gaps.
            return AttentionConfig(64, 64, 4, 2, descriptors)
        # 128 query rows halve the reads of K and V from L2 (64 rows would end near 360 TFLOP/s). 108 registers and
        # 64 KB: two programs, four warpgroups a multiprocessor, so softmax and products of different ones overlap. 128
        # keys a step need 15 % fewer instructions but 156 registers: one program, whose two warpgroups go in step.
        return AttentionConfig(128, 64, 8, 3, descriptors)
    if architecture == "gfx942":
        return AttentionConfig(128, 64, 8, 1)  # 150 registers at head_dim 64; four warps take 260
    # 101 KB of shared memory and mma.sync: sm_80, 86, 89, 120 and whatever is unknown.
    if head_pad == 128:
        return AttentionConfig(128, 32, 8, 2)  # 64 keys a step, or four warps, spill
    return AttentionConfig(64, 64, 4, 2)


@dataclasses.dataclass(frozen=True, slots=True)
class MaskHeadConfig:
    """Patches a program, projected columns a chunk, depth of a step of the projection; the rest as for attention."""

    block_m: int
    block_d: int
    block_k: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def mask_head(architecture: str, element_size: int, k_pad: int, d: int, n_rows: int, precision: str) -> MaskHeadConfig:
    """The configuration for cosines with `k_pad` classes (a power of two from 16 to 256).

    Args:
        d: width. n_rows: patches of the whole batch.
    """
    descriptors = architecture in DESCRIPTOR_ARCHITECTURES
    wide = k_pad > 64
    if element_size == 4:
        if precision == "ieee":
            # Ordinary multiply-adds hold whole rows of both operands in registers: 32 x 32 chunks against 256 classes
            # spill 5 KB a thread, 16 columns at a time none.
            return MaskHeadConfig(32, 16, 16, 8, 2) if wide else MaskHeadConfig(32, 32, 32, 4, 2)
        # TF32 needs the projection transposed through registers; with four warps ptxas then serialises the products.
        return MaskHeadConfig(64, 32 if architecture.startswith("gfx") else 64, 32, 8, 2)
    block_d = next((size for size in (256, 128) if d % size == 0), 64)  # no part of a chunk beyond d at 192 to 1024
    if architecture == "sm_90":
        if n_rows <= 64 * 132:
            # Few rows: as long as programs of 64 rows do not outnumber the 132 multiprocessors, they end earlier.
            return MaskHeadConfig(64, min(block_d, 128), 64, 4, 3, descriptors)
        # As a plain product: 64 or 85 operations a byte from L2. 256 cosines and 128 columns of a chunk are 192
        # accumulator registers of 255 at two warpgroups; with few classes there is room for 256 columns. Either way
        # 250 registers in all.
        return MaskHeadConfig(128, min(block_d, 128) if wide else block_d, 64, 8, 3, descriptors)
    if architecture == "sm_100":
        # Accumulators are in tensor memory, which 128 x 128 chunks with 256 classes overflow (512 columns).
        if wide:
            return MaskHeadConfig(64, 64, 64, 8, 3, descriptors)
        return MaskHeadConfig(128, min(block_d, 128), 64, 8, 3, descriptors)
    if architecture.startswith("gfx"):
        # 64 KB of shared memory, of which a chunk of 256 classes takes 32.
        return MaskHeadConfig(128, 64, 32, 8, 1)
    # 101 KB of shared memory and mma.sync: sm_80, 86, 89, 120 and whatever is unknown. At four warps 256 cosines are
    # 128 registers of accumulator, and operands come through registers too.
    return MaskHeadConfig(64, 64, 64, 8 if wide else 4, 3)


# ---------------------------------------------------------------------------------------------------------------------
# LayerNorm, linear layers, MLP. m rows of x throughout.

MULTIPROCESSORS = 132  # of an H100 or H200; the others named above have 60 to 304. Only used to cut work into pieces.


@dataclasses.dataclass(frozen=True, slots=True)
class LayerNormConfig:
    """Rows and columns a program, warps."""

    block_m: int
    block_n: int
    num_warps: int


def layernorm(n: int) -> LayerNormConfig:
    """The configuration for rows of n columns: about 32 values a thread, so several 16-byte loads in flight each."""
    block_n = max(2, 1 << (min(n, 8192) - 1).bit_length())
    if block_n >= 512:
        # One row a program. Up to 1,024 columns it is one warp's, so that the sums need no shared memory.
        return LayerNormConfig(1, block_n, max(1, block_n // 1024))
    return LayerNormConfig(min(4096 // block_n, 64), block_n, 4)


def fold(k: int) -> LayerNormConfig:
    """The configuration for folding a LayerNorm into weights of k columns: a warp a row, 8 values a thread and step."""
    return LayerNormConfig(4, 256, 4)


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


def linear(architecture: str, element_size: int, m: int, n: int, gelu: bool, precision: str) -> LinearConfig:
    """The configuration of our kernel for (m, k) times (n, k)^T."""
    descriptors = architecture in DESCRIPTOR_ARCHITECTURES
    programs = -(-m // 128) * -(-n // 128)
    # Smaller blocks where 128 columns would waste half of the last one (192 is one and a half), and where enough
    # programs matter more than reuse.
    small = 0 < n % 128 <= 64 or programs < MULTIPROCESSORS
    if precision != "ieee":
        # TF32: 32 columns of float32 are the 128 bytes that the tensor cores' swizzled layout spans.
        if architecture in ("sm_90", "sm_100"):
            return LinearConfig(128, 128, 32, 8, 8, 3, descriptors)
        return LinearConfig(64, 64, 32, 8, 4, 2 if architecture.startswith("gfx") else 3)
    if element_size == 4:
        # Ordinary multiply-adds: 86 % of the loop's instructions, with 128 registers by pointers. Descriptors spill.
        return LinearConfig(64, 64, 32, 8, 4, 2 if architecture.startswith("gfx") else 3)
    if architecture in ("sm_90", "sm_100"):
        if small:
            # 64 KB and about 60 registers: three on a multiprocessor.
            return LinearConfig(64, 64, 64, 8, 4, 4, descriptors)
        if programs < 2 * MULTIPROCESSORS:
            # Half a block more evenly spread: with fewer than two on each, some would have twice the work of others.
            # 72 KB and about 100 registers: three on a multiprocessor.
            return LinearConfig(64, 128, 64, 8, 4, 3, descriptors)
        if not gelu and programs >= 16 * MULTIPROCESSORS:
            # Reads a quarter less from L2 than 128 columns. One program fits, so its ends are exposed (a GELU would
            # be too), and its 1 of 8 or more rounds may be partly empty.
            return LinearConfig(128, 256, 64, 8, 8, 4, descriptors)
        # 96 KB and about 100 registers: two programs on a multiprocessor, one computes while the other does its GELU
        # or waits for its residual.
        return LinearConfig(128, 128, 64, 8, 8, 3, descriptors)
    if small:
        return LinearConfig(64, 64, 64, 8, 4, 2 if architecture.startswith("gfx") else 3)
    if architecture == "sm_80":
        return LinearConfig(128, 128, 64, 8, 8, 3)
    if architecture.startswith("gfx"):
        return LinearConfig(128, 128, 64, 8, 8, 2)  # 32 KB of the 64; two stages are one buffer there
    # 48 KB of the 99 on sm_86, 89 and 120. Pointers: descriptors save nothing with mma.sync.
    return LinearConfig(128, 128, 32, 8, 8, 4)


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
        # What folding saves, one write of x (8 us at m = 16,384, k = 1,024), is 5 % of qkv: what cuBLASLt is ahead.
        return "library"
    if half and same_type and gelu and k >= 768 and m >= 16384:
        # Saves that write and costs reading and writing the weights once and a launch: even at about 12,000 rows.
        return "fold"
    return "separate"


def pixels_to_tokens(
    architecture: str, element_size: int, rows: int, d: int, patch_size: int, padded: bool, precision: str
) -> LinearConfig:
    """The configuration for `rows` patches, of all pictures together, times (d, 3 P^2) weights.

    Args:
        padded: patches at the borders take biases of their own, a second table of which rows are gathered.
    """
    descriptors = architecture in DESCRIPTOR_ARCHITECTURES
    stages = 2 if architecture.startswith("gfx") else 3
    programs = -(-rows // 128) * -(-d // 128)
    # As in `linear`. And where the rows of a patch are no multiple of 8 bytes, so that each thread holds a pointer to
    # every two of them: 128 registers instead of more than there are.
    small = 0 < d % 128 <= 64 or programs < MULTIPROCESSORS or patch_size % 8 != 0
    new = architecture in ("sm_90", "sm_100")
    if element_size == 4 and precision == "ieee":
        # 128 registers; 32 columns a step spill with four warps. On sm_100 it is three products in TF32: about 100
        # registers, and eight warps spill.
        return LinearConfig(64, 64, 16, 8, 4 if architecture == "sm_100" else 8, stages)
    if element_size == 4:
        # 128 bytes of float32 a step, as in `linear`. 148 registers, 60 KB: three on a multiprocessor of sm_90; on
        # sm_100 they would be 254, and 64 columns with four warps spill 8 bytes.
        if architecture == "sm_100":
            return LinearConfig(64, 64, 32, 8, 8, 3, descriptors)
        return LinearConfig(64, 128 if new and not small else 64, 32, 8, 4, stages, descriptors)
    if small:
        return LinearConfig(64, 64, 64, 8, 4, stages, descriptors)  # 40 KB, at most 128 registers
    if new and padded:
        return LinearConfig(64, 128, 64, 8, 4, 3, descriptors)  # 150 registers: three; as below they would be one
    if new:
        # 128 registers, 80 KB: two, one converts its bytes while the other multiplies. 186 instructions a step and warp
        # are three quarters of what the tensor cores take, and each column block converts anew, so not fewer columns;
        # 256 columns take 210 registers: one program, which does one after the other.
        return LinearConfig(128, 128, 64, 8, 8, 3, descriptors)
    return LinearConfig(128, 64, 64, 8, 4, stages, descriptors)  # 168 registers, 32 KB: three on sm_80


@dataclasses.dataclass(frozen=True, slots=True)
class RowsConfig:
    """Rows a program, output columns a step, programs that share the columns; the rest as for attention."""

    block_m: int
    block_n: int
    split: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def rows(architecture: str, m: int, n: int) -> RowsConfig:
    """The configuration for LayerNorm and product in one kernel, at width 192."""
    # 128 registers, 104 KB with three stages of weights: two programs on a multiprocessor of sm_90. Few row blocks:
    # several programs normalise the same one, which is cheap, and share the output columns.
    split = max(1, min(MULTIPROCESSORS // -(-m // 64), -(-n // 64)))
    if architecture in ("sm_90", "sm_100"):
        return RowsConfig(64, 64, split, 4, 3, True)
    return RowsConfig(64, 64, split, 4, 2)


@dataclasses.dataclass(frozen=True, slots=True)
class MlpConfig:
    """Rows a program, hidden columns a step; the rest as for attention."""

    block_m: int
    block_h: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def layernorm_mlp(architecture: str, element_size: int, d: int) -> str:
    """How the MLP is cut into kernels: "single" or "split".

    At 384 a single kernel compiles without spills only for 64 rows (8 warps, 32 hidden columns a step, 213 registers),
    and 64 rows read all 2.4 MB of weights from L2 again: 300 MB at m = 8,200, twice the time of the products. At 192
    it is 0.6 MB for up to 128 rows.
    """
    return "single" if element_size == 2 and d == 192 and architecture in ARCHITECTURES else "split"


def mlp(architecture: str, m: int) -> MlpConfig:
    """The configuration of the single kernel at width 192."""
    if architecture == "sm_90":
        if m <= 64 * MULTIPROCESSORS:
            # One program a multiprocessor at most, with its rows spread over as many as there are. 212 registers.
            return MlpConfig(64, 64, 4, 3, True)
        if m <= 128 * MULTIPROCESSORS:
            # 96 KB and 180 registers: two on a multiprocessor, out of step with each other.
            return MlpConfig(64, 32, 4, 3, True)
        # 209 registers, 192 KB. 128 rows halve the reads of the weights from L2 (64 would end near 350 TFLOP/s).
        return MlpConfig(128, 64, 8, 3, True)
    if architecture == "sm_100":
        return MlpConfig(128, 64, 8, 2, True)  # the accumulators are in tensor memory: 150 registers
    if architecture == "sm_120":
        return MlpConfig(64, 32, 4, 2, True)  # 226 registers, 48 KB; pointers would spill 56 bytes
    return MlpConfig(64, 32, 4, 2)  # 48 KB. 255 registers, up to 18 more spilled outside the loop


# ---------------------------------------------------------------------------------------------------------------------
# Masks to labels


@dataclasses.dataclass(frozen=True, slots=True)
class UpsampleArgmaxConfig:
    """Rows of a tile at a time, warps."""

    block_y: int
    num_warps: int


def upsample_argmax(architecture: str, block_x: int, k_pad: int) -> UpsampleArgmaxConfig:
    """The configuration for tiles of up to `block_x` columns and `k_pad` classes (both powers of two)."""
    # A warp a tile: bounds and candidates are reductions over the classes, which then need no shared memory, and tiles
    # differ in how many classes are left, so warps should not wait for each other. 256 pixels are 8 a thread.
    return UpsampleArgmaxConfig(max(1, 256 // block_x), 1 if k_pad <= 256 else 4)
