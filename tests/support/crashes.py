"""Stands for a compiler in a process of its own; imports nothing, so that such processes start fast."""

import os
from typing import Any


def compiled(bucket: Any, number: int) -> str:
    """Ends the process at number 1. Else says how Triton would run there."""
    if number == 1:
        os._exit(1)
    return f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', '')}"
