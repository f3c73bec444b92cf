"""Which tile shape each kernel runs with: a reviewed table in code, one row a choice, each with its reason.

Nothing is tuned in the user's process. No row has been measured yet: the reasons are register counts, shared memory
and instruction counts of the compiled code (`python -m bench.compile_report` prints them). Architectures without rows
of their own take the safe defaults.
"""

import dataclasses

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
        # Exactness is what float32 is used for here. Small tiles: the operands of ordinary multiply-adds fill the
        # registers, and TF32 needs V transposed through them.
        if precision == "ieee":
            return AttentionConfig(32, 32, 4, 2)
        return AttentionConfig(64, 32, 4, 2)
    if architecture in ("sm_90", "sm_100"):
        if head_pad == 128:
            # 64 columns of scores keep scores, probabilities and the 128-wide accumulator in registers.
            return AttentionConfig(128, 64, 8, 2, descriptors)
        if n_keys <= 512:
            # Few key tiles: many small programs start and end at different times and fill each other's gaps.
            return AttentionConfig(64, 64, 4, 2, descriptors)
        # 128 query rows halve the reads of K and V from L2 (64 rows would end near 360 TFLOP/s); two warpgroups.
        return AttentionConfig(128, 128, 8, 2, descriptors)
    if architecture == "gfx942":
        return AttentionConfig(128, 64, 4, 1)
    # 101 KB of shared memory and mma.sync: sm_80, 86, 89, 120 and whatever is unknown.
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
        return MaskHeadConfig(64, 64, 32, 8, 2) if wide else MaskHeadConfig(64, 32, 32, 4, 2)
    block_d = next((size for size in (256, 128) if d % size == 0), 64)  # no part of a chunk beyond d at 192 to 1024
    if architecture == "sm_90":
        if n_rows <= 64 * 132:
            # Half as many rows a program while that gives every multiprocessor of 132 one at most. 250 registers.
            return MaskHeadConfig(64, min(block_d, 128), 64, 4, 3, descriptors)
        # As a plain product: 64 or 85 operations a byte from L2. 256 cosines and 128 columns of a chunk are 192
        # accumulator registers of 255 at two warpgroups; with few classes there is room for 256 columns.
        return MaskHeadConfig(128, min(block_d, 128) if wide else block_d, 64, 8, 3, descriptors)
    if architecture == "sm_100":
        # Accumulators are in tensor memory, which 128 x 128 chunks with 256 classes overflow (512 columns).
        if wide:
            return MaskHeadConfig(64, 64, 64, 8, 3, descriptors)
        return MaskHeadConfig(128, min(block_d, 128), 64, 8, 3, descriptors)
    if architecture == "gfx942":
        # 64 KB of shared memory, of which a chunk of 256 classes takes 32.
        return MaskHeadConfig(128, 64, 32, 8, 1)
    # 101 KB of shared memory and mma.sync: sm_80, 86, 89, 120 and whatever is unknown. 256 classes need eight warps:
    # four spill.
    return MaskHeadConfig(64, 64, 64, 8 if wide else 4, 3)


@dataclasses.dataclass(frozen=True, slots=True)
class LayerNormConfig:
    """Rows and columns a program, warps."""

    block_m: int
    block_n: int
    num_warps: int


def layernorm(n: int) -> LayerNormConfig:
    """The configuration for rows of n columns: about 32 values a thread, one or more 16-byte loads in flight each."""
    block_n = max(2, 1 << (min(n, 8192) - 1).bit_length())
    if block_n >= 512:
        # One row a program. Up to 1,024 columns it is one warp's, so that the sums need no shared memory.
        return LayerNormConfig(1, block_n, max(1, block_n // 1024))
    return LayerNormConfig(min(4096 // block_n, 64), block_n, 4)


def fold(k: int) -> LayerNormConfig:
    """The configuration for preparing weights of k columns."""
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


def linear(architecture: str, element_size: int, m: int, n: int, k: int, precision: str) -> LinearConfig:
    """The configuration for (m, k) times (n, k)^T."""
    descriptors = architecture in DESCRIPTOR_ARCHITECTURES
    if element_size == 4:
        return LinearConfig(64, 64, 32, 8, 4, 3)
    return LinearConfig(128, 128, 64, 8, 8, 3, descriptors)


def plain_product_by_library(gelu: bool, residual: bool) -> bool:
    """Whether `linear` is cuBLASLt's, which adds a bias too."""
    return not gelu and not residual


def layernorm_linear(
    architecture: str, element_size: int, m: int, n: int, k: int, gelu: bool, same_type: bool
) -> str:
    """How LayerNorm and product are combined."""
    if element_size == 2 and k == 192:
        return "rows"
    return "separate" if gelu else "library"


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
    descriptors = architecture in DESCRIPTOR_ARCHITECTURES
    return RowsConfig(64, 64, 1, 4, 3, descriptors)


@dataclasses.dataclass(frozen=True, slots=True)
class MlpConfig:
    """Rows a program, hidden columns a step; the rest as for attention."""

    block_m: int
    block_h: int
    num_warps: int
    num_stages: int
    descriptors: bool = False


def layernorm_mlp(architecture: str, element_size: int, m: int, d: int) -> str:
    """"single" or "split"."""
    return "single" if element_size == 2 and d == 192 else "split"


def mlp(architecture: str, m: int, d: int) -> MlpConfig:
    descriptors = architecture in DESCRIPTOR_ARCHITECTURES
    return MlpConfig(128, 64, 8, 2, descriptors)
