"""What `bench.tune` chooses from: rows of the tables in `segmenter.kernels.configs`, and for each the other
configurations that are tried with its example call.

A configuration is tried by putting it in the place of what a look-up in its table finds, in this process and for as
long as `Bucket.in_force` lasts. The package itself is not changed.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
from collections.abc import Callable, Collection, Iterator
from typing import Any
from unittest import mock

import torch
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

from bench import shapes, timing
from bench.compile import aot
from bench.compile.cases import WIDTHS, Case, case_of_row
from segmenter.kernels import configs, launch, repeat
from segmenter.kernels.configs import Row
from segmenter.kernels.configs_backward import TABLES

MAX_STEPS = 2  # how far from the shipped row, in steps on the grid, all fields together
DESCRIPTORS = ("sm_90", "sm_100", "sm_103", "sm_120")  # architectures that have them
_WARPS, _STAGES, _BOTH = (1, 2, 4, 8), (1, 2, 3, 4, 5), (False, True)
_PRODUCT = {"block_m": (32, 64, 128, 256), "block_n": (32, 64, 128, 256), "block_k": (16, 32, 64, 128),
            "group_m": (4, 8, 16), "num_warps": (4, 8), "num_stages": _STAGES, "descriptors": _BOTH}  # fmt: skip
_ATTENTION = {"block_m": (16, 32, 64, 128), "block_n": (16, 32, 64, 128), "num_warps": (4, 8), "num_stages": _STAGES,
              "descriptors": _BOTH}  # fmt: skip
# Table -> field -> values to try. A field that is left out stays as it is: derived ones, which a table only bounds.
GRIDS: dict[str, dict[str, tuple]] = {
    **dict.fromkeys(("attention", "attention_dkdv", "attention_dq"), _ATTENTION),
    "attention_rows": _ATTENTION | {"block_n": (32, 64, 128, 256), "descriptors": (False,)},
    **dict.fromkeys(("attention_statistics", "attention_transposed"), _ATTENTION | {"descriptors": (False,)}),
    "rotate": {"elements": (512, 1024, 2048, 4096, 8192), "heads": (1, 2, 4, 8), "num_warps": _WARPS},
    "attention_delta": {"block_m": (16, 32, 64, 128), "num_warps": _WARPS},
    "mask_head": {"block_m": (32, 64, 128), "block_d": (16, 32, 64, 128, 256), "block_k": (16, 32, 64, 128),
                  "num_warps": (4, 8), "num_stages": _STAGES, "descriptors": _BOTH},
    "mask_head_backward": {"block_m": (16, 32, 64, 128), "block_d": (16, 32, 64, 128), "num_warps": (4, 8, 16),
                           "num_stages": _STAGES, "descriptors": _BOTH},
    "unit_rows": {"elements": (1024, 2048, 4096, 8192), "num_warps": _WARPS},
    "partial_sums": {"block_s": (8, 16, 32, 64), "block_n": (32, 64, 128, 256), "num_warps": _WARPS},
    "patch_weights": {"block_m": (16, 32, 64, 128), "block_n": (32, 64, 128), "block_k": (32, 64, 128, 256),
                      "num_warps": (4, 8), "num_stages": _STAGES},
    "upsample_argmax": {"block_y": (64, 128, 256, 512, 1024), "num_warps": _WARPS},
    "queries_argmax": {"block_y": (1, 2, 4, 8), "block_x": (8, 16, 32), "block_q": (16, 32, 64), "num_warps": (4, 8),
                       "num_stages": (1, 2, 3)},
    "upsample_cross_entropy": {"block_x": (1, 2, 4, 8, 16, 32), "num_warps": _WARPS},
    "layernorm": {"block_m": (1, 2, 4, 8, 16, 32, 64, 128), "num_warps": _WARPS},
    "layernorm_backward": {"block_m": (1, 2, 4, 8, 16, 32, 64), "num_warps": (1, 2, 4, 8, 16)},
    "column_sums": {"block_m": (8, 16, 32, 64, 128), "block_n": (32, 64, 128, 256), "num_warps": _WARPS},
    **dict.fromkeys(("linear", "gelu_backward"), _PRODUCT),
    "pixels_to_tokens": _PRODUCT,
    "layernorm_linear": {"block_m": (32, 64, 128), "block_n": (32, 64, 128), "num_warps": (4, 8),
                         "num_stages": _STAGES, "descriptors": _BOTH},
    "layernorm_mlp": {"block_m": (32, 64, 128), "block_h": (16, 32, 64, 128), "num_warps": (4, 8),
                      "num_stages": _STAGES, "descriptors": _BOTH},
    "fold": {"block_m": (1, 2, 4, 8, 16), "block_n": (128, 256, 512, 1024), "num_warps": _WARPS},
}  # fmt: skip
# Calls of a table's operator in a forward pass of Seg-B; 1 for what is not listed.
_LAYERS = shapes.WIDTHS["B"][1] + shapes.DECODER_LAYERS
_CALLS = {"linear": 2 * _LAYERS, "layernorm": 2 * _LAYERS} | dict.fromkeys(
    ("attention", "layernorm_linear", "layernorm_mlp"), _LAYERS
)
_OPERATIONS_A_BYTE = 300  # of a large GPU's tensor cores and memory, to compare one kind of work with the other
# Sizes of the same calls that the interpreter can compute; widths that choose a kernel stay.
TINY = {
    **dict.fromkeys(("attention", "attention_delta", "attention_dkdv", "attention_dq"), {"n": 70, "heads": 2}),
    **dict.fromkeys(("attention_rows", "attention_transposed"), {"n": 70, "r": 3}),
    "attention_statistics": {"n": 65, "side": 8},
    "rotate": {"n": 70, "side": 8},
    "mask_head": {"batch": 1, "patches": 40, "d": 64},
    **dict.fromkeys(("mask_head_backward", "unit_rows", "partial_sums"), {"batch": 1, "patches": 40, "d": 64}),
    "upsample_argmax": {"side": 64},
    "queries_argmax": {"queries": 5, "side": 32},
    "upsample_cross_entropy": {"side": 32},
    "layernorm": {"m": 70},
    **dict.fromkeys(("layernorm_backward", "column_sums"), {"m": 70}),
    "linear": {"m": 70, "k": 96, "n": 136},
    "pixels_to_tokens": {"batch": 1, "d": 64},
    "patch_weights": {"batch": 1, "side": 32, "patch": 8, "d": 64},
    "layernorm_linear": {"m": 70},
    "layernorm_mlp": {"m": 70},
    "gelu_backward": {"m": 70, "d": 96},
    "fold": {"m": 70, "d": 128},
}


@dataclasses.dataclass(frozen=True)
class Bucket:
    """A row of a table, by their numbers, on an architecture. `tiny`: for the interpreter."""

    table: str
    index: int
    architecture: str
    tiny: bool = False

    @property
    def row(self) -> Row:
        return TABLES[self.table][self.index]

    @functools.cached_property
    def case(self) -> Case:
        """The row's example call."""
        case = case_of_row(self.table, self.row)
        if not self.tiny:
            return case
        sizes = dict(case.sizes) | TINY[self.table]
        if self.table == "pixels_to_tokens":
            sizes["side"] = 40 if sizes.get("side") else 32  # padded or not, as in the example
        # Released interpreters cannot compute bfloat16; the rows of float16 are the same.
        return dataclasses.replace(case, dtype=case.dtype.replace("bf16", "fp16"), sizes=tuple(sizes.items()))

    @property
    def name(self) -> str:
        """For results and people: "attention sm_90 half n=1025"."""
        return " ".join(filter(None, (self.table, self.architecture, self.row.kind, self.case.what)))

    @contextlib.contextmanager
    def in_force(self, config: Any, asked: Callable[[], Any] = lambda: None) -> Iterator[None]:
        """Within it calls that look into the row's table find this configuration; `asked` is called each time."""
        table, look_up = TABLES[self.table], configs.look_up

        def found(where: tuple[Row, ...], *args: Any, **sizes: int) -> Row:
            row = look_up(where, *args, **sizes)
            if where is not table:
                return row
            asked()
            return dataclasses.replace(row, config=config)

        with contextlib.ExitStack() as stack:
            for forget in (configs.mlp.cache_clear, repeat.forget):
                forget()
                stack.callback(forget)
            stack.enter_context(mock.patch.object(configs, "look_up", found))
            if self.table == "fold":  # chosen for many rows only
                stack.enter_context(mock.patch.object(configs, "layernorm_linear", lambda *args: "fold"))
            yield

    def launches(self, config: Any) -> tuple[list[launch.Launch], int]:
        """What the example launches with this configuration, and which of these launches it is for."""
        at: list[int] = []
        with aot.recording(self.architecture) as launches, self.in_force(config, lambda: at.append(len(launches))):
            self.case.call()()
        return launches, at[0]

    def arguments(self) -> tuple[Callable, dict[str, Any]]:
        """The public function of the example and its arguments, all of them, in order."""
        call = self.case.call()
        bound = inspect.signature(call.func).bind(*call.args, **call.keywords)
        bound.apply_defaults()
        return call.func, bound.arguments

    @functools.cached_property
    def work(self) -> shapes.Work:
        """Operations by the operator's formula, and bytes of arguments and result."""
        fn, arguments = self.arguments()
        meta = tree_map_only(torch.Tensor, lambda tensor: tensor.to("meta"), tuple(arguments.values()))
        with torch.no_grad(), launch.recorded(self.architecture), FlopCounterMode(display=False) as counter:
            result = fn(*meta)
        return shapes.Work(counter.get_total_flops(), timing.tensor_bytes(meta) + timing.tensor_bytes(result))

    @property
    def value(self) -> float:
        """About how much of a forward pass it is, in units of its own: what is tuned first."""
        sizes = dict(self.case.sizes)
        usual = sizes.get("d", 64) != 128 and (self.table != "layernorm" or sizes["n"] in WIDTHS)  # of these models
        batch = sizes.get("batch", 32 if self.table == "pixels_to_tokens" else 2)
        tokens = {"attention": 2 * sizes.get("n", 0), "layernorm": 8200}.get(self.table, sizes.get("m", 1024 * batch))
        return (_CALLS.get(self.table, 1) if usual else 1) * self.work.floor(_OPERATIONS_A_BYTE, 1) / tokens


def buckets(architecture: str, kind: str, tables: Collection[str] = ()) -> list[Bucket]:
    """The rows that an architecture takes for "half", "fp32" or "tf32", the most valuable first."""
    found = [
        Bucket(table, i, architecture)
        for table, rows in TABLES.items()
        for i, row in enumerate(rows)
        if (not tables or table in tables) and row.kind in (kind, "all" if kind == "half" else kind)
        if architecture in case_of_row(table, row).architectures
    ]
    return sorted(found, key=lambda bucket: -bucket.value)


def candidates(bucket: Bucket) -> list[tuple[int, Any]]:
    """(steps on the grid, configuration): the shipped one, then what is nearest to it. No two launch the same."""
    shipped, grid = bucket.row.config, GRIDS[bucket.table]
    fields = {name: values for name, values in grid.items() if getattr(shipped, name) in values}
    if bucket.architecture not in DESCRIPTORS:
        fields.pop("descriptors", None)
    start = {name: values.index(getattr(shipped, name)) for name, values in fields.items()}
    found: dict[Any, tuple[int, Any]] = {}
    moves = itertools.product(*(range(len(values)) for values in fields.values()))
    at = [(sum(abs(i - j) for i, j in zip(move, start.values(), strict=True)), move) for move in moves]
    for steps, move in sorted(at):
        if steps > MAX_STEPS:
            break
        chosen = {name: values[i] for (name, values), i in zip(fields.items(), move, strict=True)}
        config = dataclasses.replace(shipped, **chosen)
        plan = (lambda launches, i: launches[i].plan)(*bucket.launches(config))
        found.setdefault((plan.grid, plan.tiles, plan.scalars, *plan.options.items()), (steps, config))
    return list(found.values())
