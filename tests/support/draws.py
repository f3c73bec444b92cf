"""What random cases of kernels are made of: tensors, types, layouts and tiles, each drawn from a seed."""

import dataclasses
import random
from collections.abc import Callable

import torch

from segmenter.kernels import configs
from tests.support.layouts import LAYOUTS
from tests.support.parity import DEVICE

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
HALF = 1.2  # of attention in half types: few keys and few values; test_attention.py asks for 0.65 of long rows
LENGTHS = (1, 2, 3, 5, 15, 16, 17, 31, 33, 34, 47, 63, 64, 65, 66, 67)
FAR_LENGTHS = (95, 97, 127, 128, 129, 130, 131, 193, 194, 200)


@dataclasses.dataclass
class Case:
    """Arguments, what runs on them, and what defines the result."""

    args: tuple
    call: Callable
    definition: Callable
    what: str
    max_ratio: float = 3.0  # the worst of a few elements: chance is larger than in the tests of one operator
    frobenius: float = 1.1
    terms: int = 0  # products in the sum of one element, as for `assert_parity`
    labels: bool = False  # the result is equal or wrong


class Draw:
    """Everything random about one case comes from here."""

    def __init__(self, op: str, seed: int):
        self.random = random.Random(f"{op} {seed}")
        self.generator = torch.Generator().manual_seed(self.random.randrange(2**31))
        self.layouts: list[str] = []

    def choice(self, options):
        return self.random.choice(list(options))

    def maybe(self, probability: float) -> bool:
        return self.random.random() < probability

    def tensor(self, *shape: int, dtype: torch.dtype, scale: float = 1.0, mean: float = 0.0, plain: float = 0.3):
        """Normal numbers in a random layout that keeps the shape."""
        t = torch.randn(*shape, generator=self.generator) * scale + mean
        return self.placed(t.to(dtype).to(DEVICE), plain)

    def placed(self, t: torch.Tensor, plain: float = 0.3) -> torch.Tensor:
        """t in a random layout that keeps the shape."""
        name = "contiguous" if self.maybe(plain) else self.choice(LAYOUTS)
        placed = LAYOUTS[name](t)
        if placed.shape != t.shape:
            name, placed = "contiguous", t
        self.layouts.append(name)
        return placed

    def images(self, B: int, H: int, W: int) -> torch.Tensor:
        """Bytes, dense or a crop of larger images, with rows at multiples of 16 or not."""
        pixels = torch.randint(0, 256, (B, H, W, 3), generator=self.generator).byte().to(DEVICE)
        around = self.choice((0, 0, 1, 16))
        wide = torch.full((B, H + 2, W + 2 * around, 3), 77, dtype=torch.uint8, device=DEVICE)
        self.layouts.append(f"{around} pixels around")
        wide[:, 1 : H + 1, around : around + W] = pixels
        return wide[:, 1 : H + 1, around : around + W]

    def dtype(self) -> torch.dtype:
        return self.choice((torch.float32, torch.float16, torch.float16, torch.bfloat16, torch.bfloat16))

    def magnitude(self) -> float:
        return self.choice((1.0, 1.0, 1.0, 1e-3, 0.1, 4.0))

    def batch(self) -> tuple[int, ...]:
        """Leading dimensions of a tensor of rows."""
        shape = self.choice([(self.choice(LENGTHS),), (2, self.choice(LENGTHS)), (2, 1, self.choice((1, 3, 7)))])
        return shape if self.maybe(0.9) else (self.choice(FAR_LENGTHS),)


def attention_config(draw: Draw, dtype: torch.dtype) -> configs.AttentionConfig | None:
    if draw.maybe(0.4):
        return None
    sizes = (16, 32, 64) if dtype == torch.float32 else (16, 32, 64, 128)
    return configs.AttentionConfig(draw.choice(sizes), draw.choice(sizes), 4, 2, draw.maybe(0.6))


def widths(draw: Draw) -> tuple[int, int]:
    return draw.choice((8, 16, 17, 32, 48, 64, 72, 96, 100, 192)), draw.choice((1, 8, 31, 32, 64, 65, 96, 130, 192))


def linear_config(draw: Draw, dtype: torch.dtype) -> configs.LinearConfig | None:
    if draw.maybe(0.4):
        return None
    block = draw.choice((32, 64))
    return configs.LinearConfig(block, draw.choice((32, 64)), 32, draw.choice((1, 3, 8)), 4, 2, draw.maybe(0.5))
