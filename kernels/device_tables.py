"""Small tables on the device that kernels read, made once for a shape and kept.

A table is kept while it is among the last MAX_TABLES kinds that were asked for, or as many before them, which kernels
under way may still read; and for good once a CUDA graph has its address.
"""

from collections.abc import Callable
from typing import Any

import torch

MAX_TABLES = 256  # kinds that are kept, and as many again: some 40 bytes a pixel of height and width, more per window

Tables = tuple[torch.Tensor, ...]
_TABLES: dict[Any, Tables] = {}
_OLD_TABLES: dict[Any, Tables] = {}  # of before _TABLES was full
_CAPTURED: dict[Any, Tables] = {}  # never freed


def kept(key: tuple, make: Callable[..., Tables], *arguments: Any) -> Tables:
    """`make(*arguments)`, or what it gave for this key before.

    Args:
        key: tells everything that the tables depend on, the device among it, and which kernel they are for.
    """
    tables = _TABLES.get(key) or _OLD_TABLES.get(key)
    if tables is None:
        tables = make(*arguments)
    if key not in _TABLES:
        if len(_TABLES) >= MAX_TABLES:
            _OLD_TABLES.clear()
            _OLD_TABLES.update(_TABLES)
            _TABLES.clear()
        _TABLES[key] = tables
    if tables[0].is_cuda and torch.cuda.is_current_stream_capturing():
        _CAPTURED[key] = tables
    return tables
