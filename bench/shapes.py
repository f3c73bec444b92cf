"""The sweep as data: what is measured, and by formula how much work each of it is.

Operations count matrix products only, two a multiply-add, as `torch.utils.flop_counter` does: softmax, LayerNorm, GELU
and interpolation are nowhere in them. Bytes are the fewest that have to move: every input read once, every output
written once. `floor` turns both into the time that no implementation can beat on a machine of given ceilings.
tests/bench/test_shapes.py compares the formulas with counted calls.
"""

import itertools
from typing import NamedTuple

WIDTHS = {  # d_model and layers; heads have 64 columns
    "T": (192, 12),
    "S": (384, 12),
    "B": (768, 12),
    "L": (1024, 24),
    "X": (64, 1),  # for smoke tests only; not of the paper
}
HEAD_DIM = 64
DECODER_LAYERS = 2
QUERIES, CELLS = 100, 4  # of EoMT: masks, and their cells along the side of a patch of 16
MAP_ROWS = 16  # queries whose attention rows are looked at, and columns of what is summed over queries
PATCHES = (8, 16, 32)
SIZES = (512, 640, 768, 1024)


class Work(NamedTuple):
    """Floating-point operations of matrix products, and the fewest bytes to move."""

    flops: int
    bytes: int

    def floor(self, flops_per_second: float, bytes_per_second: float) -> float:
        """Seconds that this takes at least."""
        return max(self.flops / flops_per_second, self.bytes / bytes_per_second)

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)


class Shape(NamedTuple):
    """One point of the sweep: a model of the paper, square images of `size` pixels, `batch` of them at a time."""

    model: str
    patch: int
    size: int
    batch: int = 1
    n_cls: int = 150
    mask: bool = True

    @property
    def name(self) -> str:
        """The paper's name of the model."""
        return f"Seg-{self.model}{'-Mask' if self.mask else ''}/{self.patch}"

    @property
    def id(self) -> str:
        """For `pytest -k`: "S-patch16-512-b1"."""
        return f"{self.model}{'' if self.mask else '-linear'}-patch{self.patch}-{self.size}-b{self.batch}"

    @property
    def d_model(self) -> int:
        return WIDTHS[self.model][0]

    @property
    def n_layers(self) -> int:
        return WIDTHS[self.model][1]

    @property
    def n_heads(self) -> int:
        return self.d_model // HEAD_DIM

    @property
    def patches(self) -> int:
        """Patches of one image."""
        return (self.size // self.patch) ** 2

    @property
    def tokens(self) -> int:
        """Tokens of one image in the encoder: its patches and CLS."""
        return self.patches + 1


# ---------------------------------------------------------------------------------------------------------------------
# Operations. `item` is the size of an element in bytes.


def attention(shape: Shape, item: int) -> Work:
    """One layer of the encoder, packed qkv to output."""
    return _attention(shape.batch, shape.tokens, shape.d_model, item)


def attention_backward(shape: Shape, item: int) -> Work:
    """The gradient of qkv from q, k, v, the output, its gradient and the log-sum-exp: five products, not two."""
    B, N, d = shape.batch, shape.tokens, shape.d_model
    return Work(10 * B * N * N * d, item * 8 * B * N * d + 4 * B * shape.n_heads * N)


def layernorm_mlp(shape: Shape, item: int) -> Work:
    """One layer of the encoder: LayerNorm, fc1, GELU, fc2, residual."""
    M, d = shape.batch * shape.tokens, shape.d_model
    return Work(16 * M * d * d, item * (2 * M * d + 8 * d * d + 7 * d))


def mask_head(shape: Shape, item: int) -> Work:
    """Decoded patch and class tokens to class masks."""
    B, n, d, K = shape.batch, shape.patches, shape.d_model, shape.n_cls
    flops = 2 * B * n * d * d + 2 * B * K * d * d + 2 * B * n * K * d
    return Work(flops, item * (B * n * d + B * K * d + 2 * d * d + 2 * K + B * n * K))


def attention_rows(shape: Shape, item: int) -> Work:
    """Rows of the attention matrix, float32, of MAP_ROWS queries (if there are as many) an image and head."""
    B, N, d, R = shape.batch, shape.tokens, shape.d_model, min(MAP_ROWS, shape.tokens)
    return Work(2 * B * R * N * d, item * B * (R + N) * d + 4 * B * shape.n_heads * R * N)


def attention_statistics(shape: Shape, item: int) -> Work:
    """Six numbers of each row, float32; their sums are no matrix products."""
    B, N, d = shape.batch, shape.tokens, shape.d_model
    return Work(2 * B * N * N * d, item * 2 * B * N * d + 6 * 4 * B * shape.n_heads * N)


def attention_transposed(shape: Shape, item: int) -> Work:
    """The transposed matrix times MAP_ROWS columns, float32 in and out."""
    B, N, d, columns = shape.batch, shape.tokens, shape.d_model, shape.n_heads * MAP_ROWS
    return Work(2 * B * N * N * (d + columns), item * 2 * B * N * d + 2 * 4 * B * N * columns)


def layernorm_mlp_scaled(shape: Shape, item: int) -> Work:
    """`layernorm_mlp` whose branch has a factor a column."""
    return layernorm_mlp(shape, item) + Work(0, item * shape.d_model)


def rotate(shape: Shape, item: int) -> Work:
    """Queries and keys of one layer turned by the tables of their patches; no matrix products."""
    B, N, d = shape.batch, shape.tokens, shape.d_model
    return Work(0, item * (4 * B * N * d + 2 * shape.patches * HEAD_DIM))


def queries_to_labels(shape: Shape, item: int) -> Work:
    """Masks and classes of QUERIES queries to one byte (two above 256 classes) a pixel."""
    B, pixels, K, label = shape.batch, shape.size**2, shape.n_cls, 1 if shape.n_cls <= 256 else 2
    inputs = B * QUERIES * (CELLS**2 * shape.patches + K + 1)
    return Work(2 * B * QUERIES * K * pixels, item * inputs + label * B * pixels)


def layernorm(shape: Shape, item: int) -> Work:
    """Of the tokens of one layer of the encoder."""
    M, d = shape.batch * shape.tokens, shape.d_model
    return Work(0, item * (2 * M * d + 2 * d))


def linear(shape: Shape, item: int) -> Work:
    """fc1 of one layer of the encoder, with its GELU."""
    M, d = shape.batch * shape.tokens, shape.d_model
    return Work(8 * M * d * d, item * (5 * M * d + 4 * d * d + 4 * d))


def attention_half(shape: Shape, item: int) -> Work:
    """One layer of the encoder: LayerNorm, qkv, attention, projection, residual."""
    B, N, d = shape.batch, shape.tokens, shape.d_model
    return Work(8 * B * N * d * d + 4 * B * N * N * d, item * (2 * B * N * d + 4 * d * d + 6 * d))


def pixels_to_tokens(shape: Shape, item: int) -> Work:
    """Bytes of images to tokens: normalisation, patch embedding, CLS, positions."""
    B, n, d, k = shape.batch, shape.patches, shape.d_model, 3 * shape.patch**2
    return Work(2 * B * n * k * d, 3 * B * shape.size**2 + item * (k * d + 2 * d + (B + 1) * (n + 1) * d))


def layernorm_backward(shape: Shape, item: int) -> Work:
    """The gradients of x, weight and bias. Here and below: from the arguments and the result's gradient."""
    M, d = shape.batch * shape.tokens, shape.d_model
    return _backward(layernorm(shape, item), item * (M * d + 2 * d))


def linear_backward(shape: Shape, item: int) -> Work:
    M, d = shape.batch * shape.tokens, shape.d_model
    return _backward(linear(shape, item), item * (M * d + 4 * d * d + 4 * d))


def layernorm_mlp_backward(shape: Shape, item: int) -> Work:
    """Without fc1, which may have been kept or is computed again."""
    M, d = shape.batch * shape.tokens, shape.d_model
    return _backward(layernorm_mlp(shape, item), item * (M * d + 8 * d * d + 7 * d))


def attention_half_backward(shape: Shape, item: int) -> Work:
    """Without qkv, likewise; the five products of `attention_backward`."""
    B, N, d = shape.batch, shape.tokens, shape.d_model
    work = _backward(attention_half(shape, item), item * (B * N * d + 4 * d * d + 6 * d))
    return work._replace(flops=work.flops + 2 * B * N * N * d)


def mask_head_backward(shape: Shape, item: int) -> Work:
    B, n, d, K = shape.batch, shape.patches, shape.d_model, shape.n_cls
    return _backward(mask_head(shape, item), item * (B * n * d + B * K * d + 2 * d * d + 2 * K))


def pixels_to_tokens_backward(shape: Shape, item: int) -> Work:
    """Of all but the pixels, which are bytes: one product, not two."""
    n, d, k = shape.patches, shape.d_model, 3 * shape.patch**2
    return _backward(pixels_to_tokens(shape, item), item * (k * d + 2 * d + (n + 1) * d), products=1)


def _backward(forward: Work, gradients: int, products: int = 2) -> Work:
    """Reads the arguments and, in place of writing the result, its gradient; writes so many bytes of gradients."""
    return Work(products * forward.flops, forward.bytes + gradients)


def masks_to_labels(shape: Shape, item: int) -> Work:
    """Low-resolution masks to one byte (two above 256 classes) a pixel."""
    label = 1 if shape.n_cls <= 256 else 2
    return Work(0, item * shape.batch * shape.patches * shape.n_cls + label * shape.batch * shape.size**2)


def loss(shape: Shape, item: int) -> Work:
    """Cross-entropy of the upsampled masks and its gradient by the masks; the target is int64."""
    masks = item * shape.batch * shape.patches * shape.n_cls
    return Work(0, 2 * masks + 8 * shape.batch * shape.size**2)


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


def model(shape: Shape, item: int) -> Work:
    """uint8 images to uint8 labels. Weights are read once; nothing in between has to leave the chip."""
    pixels = shape.batch * shape.size**2
    return Work(forward_flops(shape), item * parameters(shape) + 3 * pixels + pixels)


def train_step(shape: Shape, item: int) -> Work:
    """Forward, backward and SGD with momentum, which reads weights, gradients and momenta and writes two of them.

    The products are those of the forward pass three times, but nobody wants the gradient of the pixels, and those of
    explicit attention: recomputing the scores instead of keeping them costs a fifth product, which is not counted.
    """
    pixels, P = shape.batch * shape.size**2, shape.patch
    patch_embed = 2 * shape.batch * shape.patches * 3 * P * P * shape.d_model
    bytes_ = 5 * 4 * parameters(shape) + 4 * 3 * pixels + 8 * pixels
    return Work(3 * forward_flops(shape) - patch_embed, bytes_)


def forward_flops(shape: Shape) -> int:
    """Operations from normalised images to low-resolution masks."""
    B, n, d, K = shape.batch, shape.patches, shape.d_model, shape.n_cls
    total = 2 * B * n * 3 * shape.patch**2 * d
    total += shape.n_layers * _block_flops(B, shape.tokens, d)
    if not shape.mask:
        return total + 2 * B * n * d * K
    return total + 2 * B * n * d * d + DECODER_LAYERS * _block_flops(B, n + K, d) + mask_head(shape, 0).flops


def parameters(shape: Shape) -> int:
    """Weights that inference reads, the published ImageNet head left out."""
    d, K, P = shape.d_model, shape.n_cls, shape.patch
    block = 12 * d * d + 13 * d
    total = 3 * P * P * d + d + d + shape.tokens * d + shape.n_layers * block + 2 * d
    if not shape.mask:
        return total + d * K + K
    return total + K * d + 2 * d * d + DECODER_LAYERS * block + d * d + d + 2 * d + 2 * K


def _attention(B: int, N: int, d: int, item: int) -> Work:
    return Work(4 * B * N * N * d, item * 4 * B * N * d)


def _block_flops(B: int, N: int, d: int) -> int:
    return 24 * B * N * d * d + _attention(B, N, d, 0).flops


# ---------------------------------------------------------------------------------------------------------------------
# The sweep, most telling first

GPU_CORE = (
    Shape("L", 16, 640, 8),
    Shape("B", 16, 512, 8),
    Shape("B", 8, 512, 4),
    Shape("S", 16, 512, 8),
    Shape("T", 16, 512, 8),
    Shape("B", 32, 512, 8),
    Shape("B", 16, 512, 1),
    Shape("S", 8, 1024, 1),
)
GPU_FULL = (
    *(Shape(m, p, s, b) for b, s, p, m in itertools.product((8, 1), SIZES, (16, 8, 32), "LBST")),
    *(Shape(m, p, 2048, 1) for p, m in itertools.product((16, 8), "TSBL")),
)
GPU_TRAINING = tuple(Shape(m, p, 512, 8) for p, m in itertools.product((16, 8, 32), "LBST"))  # of steps, besides
CPU_CORE = (Shape("S", 16, 512), Shape("S", 32, 512), Shape("T", 8, 256))
CPU_FULL = tuple(Shape(m, p, s) for s, p, m in itertools.product((512, 640), (32, 16, 8), "TSBL"))
SMOKE = (Shape("X", 8, 40, 2, n_cls=7),)
SWEEPS = {"smoke": (SMOKE, SMOKE), "core": (GPU_CORE, CPU_CORE), "full": (GPU_FULL, CPU_FULL)}


def sweep(name: str, on_gpu: bool) -> list[Shape]:
    """Shapes of the sweep "smoke", "core" or "full" (which starts with the core), without repetition."""
    chosen = [SWEEPS[name]] if name != "full" else [SWEEPS["core"], SWEEPS["full"]]
    return list(dict.fromkeys(shape for gpu, cpu in chosen for shape in (gpu if on_gpu else cpu)))


def training(name: str, on_gpu: bool) -> list[Shape]:
    """Shapes of training steps in this sweep: its own as far as they are `trainable`, and on a GPU every model."""
    every = GPU_TRAINING if on_gpu and name != "smoke" else ()
    return [shape for shape in dict.fromkeys((*sweep(name, on_gpu), *every)) if trainable(shape, on_gpu)]


def trainable(shape: Shape, on_gpu: bool) -> bool:
    """Whether a training step is worth its time: on a CPU only where a forward pass takes about a second at most."""
    return on_gpu or forward_flops(shape) < 3e10
