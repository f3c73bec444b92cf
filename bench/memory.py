"""What a training step needs of a GPU's memory, and what fits: python -m bench.memory

By formula, not measured: bytes that every layer keeps for its backward pass under autocast to a half type, weights,
gradients and momenta in float32, and what the backward pass of one block needs besides. tests/bench/test_memory.py
compares what is kept with what PyTorch saves on a CPU, to the byte, and whole steps with what is allocated, to 10 %.
Prints two tables in Markdown: the largest batch of 512 x 512 images, and the side of the largest square image alone.
A cell is for cards of 24, 80 and 141 GB.
"""

import argparse
import bisect
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from tqdm import tqdm

from bench import shapes
from bench.shapes import DECODER_LAYERS, Shape
from segmenter.kernels.heads import lse_rows

CARDS = (24, 80, 141)  # GB
LEFT = 0.07  # of a card's memory, for CUDA itself and for what the allocator cannot use: an assumption
SIDE, MOST = 512, 1 << 15  # pixels of the table of batches; the largest batch, and side, that is looked at
HEAD = 1000  # classes of the ImageNet head that every checkpoint has: it is not trained
DROPOUT_MASK = 1  # bytes an element, on a GPU


class Way(NamedTuple):
    """One way to train. level: of `Segmenter.recompute`, with the kernels; None without them."""

    name: str
    level: int | None
    logits: bool = False  # whether the loss is made of the logits of pixels


WAYS = (
    Way("PyTorch", None, True),
    Way("--impl eager", None),
    *(Way(f"--recompute {level}", level) for level in range(4)),
)
# Bytes a token and column of activations that a block keeps.
LAYERED = 36  # by PyTorch: x, its norm, qkv, the result; x, its norm, the hidden layer before and after its GELU
FUSED = (24, 16, 10)  # by our kernels, by level: x, qkv, the result; x, the hidden layer
WHOLE = 4  # level 3: its input
# Beyond what is kept, while a block's gradients are computed: found by the allocations of small models.
WORK, WORK_EAGER, WORK_WHOLE, WORK_WEIGHTS = 20, 17, 29, 40  # the last: a square of the width


def block(way: Way, B: int, N: int, d: int, dropout: bool = False, mask: int = DROPOUT_MASK) -> int:
    """Bytes that a block keeps, half-precision copies of its weights included.

    Args:
        dropout: whether it is on, which makes the block run layer by layer. mask: bytes an element of what it drew.
    """
    heads, tokens, copies = d // shapes.HEAD_DIM, B * N, 2 * 12 * d * d
    if way.level == 3:
        return WHOLE * tokens * d
    if way.level is None or dropout:
        masks = 6 * mask * dropout  # of the projection, of the hidden layer and of the MLP's result
        return tokens * ((LAYERED + masks) * d + 16 + 4 * heads) + copies  # two LayerNorms' statistics, log-sum-exp
    return FUSED[way.level] * tokens * d + 4 * B * heads * lse_rows(N) + copies + 2 * 9 * d  # with its biases


def kept(shape: Shape, way: Way, dropout: bool = True, mask: int = DROPOUT_MASK) -> int:
    """Bytes that a forward pass, loss included, keeps for the backward pass.

    dropout: of the decoder, as published.
    """
    B, N, n, d, K, P = shape.batch, shape.tokens, shape.patches, shape.d_model, shape.n_cls, shape.patch
    image = 2 * 3 * B * shape.size**2 + 2 * 3 * P * P * d
    norm = 4 * d + 8  # its input, mean and deviation
    total = image + shape.n_layers * block(way, B, N, d) + B * N * norm
    total += 2 * B * n * d + 2 * d * d  # the decoder's first layer
    total += DECODER_LAYERS * block(way, B, n + K, d, dropout, mask) + B * (n + K) * norm
    if way.level is None:  # tokens, projections, both unit rows; norms; cosines, their statistics
        total += 6 * B * (n + K) * d + 2 * B * (n + K) + 2 * B * n * K + 8 * B * n + 4 * d * d
    else:
        total += 2 * B * (n + K) * d + 4 * d * d
    return total + 4 * B * n * K  # the gradient of the masks


def loss_work(shape: Shape, way: Way) -> int:
    """Bytes that the loss needs for a moment, when all that is kept is there."""
    B, K, S, P = shape.batch, shape.n_cls, shape.size, shape.patch
    if way.logits:  # log-probabilities, their gradient and that of the logits, in float32
        return 12 * B * K * S * S
    if way.level is None:  # `training.upsample_loss`, on a GPU: two tensors of wide rows, the pixels between two rows
        return 8 * B * (S // P) * S * K + 4 * B * P * S * K
    return 16 * B * (S // P + 1) ** 2 * K  # four corners of every cell


def step(shape: Shape, way: Way, dropout: bool = True, mask: int = DROPOUT_MASK) -> int:
    """Bytes at the peak of a training step with SGD: at the end of the forward pass, or of the backward pass."""
    parameters, d = shapes.parameters(shape), shape.d_model
    tokens = shape.batch * (shape.patches + shape.n_cls)
    work = WORK_EAGER if way.level is None else WORK_WHOLE if way.level == 3 else WORK
    work *= tokens * d
    there = 8 * parameters + 4 * HEAD * (d + 1) + (12 + 8) * shape.batch * shape.size**2  # momenta; images, labels
    first = kept(shape, way, dropout, mask) + max(loss_work(shape, way), work + WORK_WEIGHTS * d * d)
    return there + max(first, 4 * parameters + work)


def largest(fits: Callable[[int], bool], step: int = 1) -> int:
    """The largest multiple of `step` up to MOST that fits, 0 if none does; less fits where more does."""
    return step * bisect.bisect_left(range(step, MOST + 1, step), True, key=lambda n: not fits(n))


def row(model: str, patch: int, way: Way, of: str, n_cls: int) -> list[int]:
    """For each of CARDS the largest batch or side of a model."""

    def fits(n: int, gigabytes: int) -> bool:
        size, batch = (SIDE, n) if of == "batch" else (n, 1)
        return step(Shape(model, patch, size, batch, n_cls), way) <= (1 - LEFT) * gigabytes * 2**30

    return [largest(lambda n, card=card: fits(n, card), 1 if of == "batch" else patch) for card in CARDS]


def table(of: str, n_cls: int) -> str:
    """Markdown: models by ways, of the largest "batch" or "side"."""
    head = ["model", *(way.name for way in WAYS)]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model in tqdm("TSBL", desc=of, leave=False, disable=None):
        for patch in shapes.PATCHES:
            cells = [" / ".join(f"{n or '-'}" for n in row(model, patch, way, of, n_cls)) for way in WAYS]
            lines.append(f"| {Shape(model, patch, SIDE).name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=150, help="default 150, ADE20K's")
    args = parser.parse_args(arguments)
    for of, title in (("batch", f"Largest batch, {SIDE}x{SIDE}"), ("side", "Side of the largest square image")):
        print(f"{title}, on {', '.join(map(str, CARDS[:-1]))} and {CARDS[-1]} GB:\n\n{table(of, args.classes)}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
