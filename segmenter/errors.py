"""Errors about what comes from outside: one line that can be printed, whatever is in the names and texts it quotes."""

import errno
import re

# what failed allocations are called that are no MemoryError: on the CPU, on GPUs, and outside torch's allocator
_NO_MEMORY = re.compile(r"out of memory|(can't allocate|not enough) memory|bad_alloc|ALLOC_FAILED")


class InputError(ValueError):
    """Something given cannot be used. The message says what was wrong and what to do; it is `printable`."""

    def __init__(self, message: str = ""):
        super().__init__(printable(str(message)))


def printable(text: object) -> str:
    """`text` with every character that would steer a terminal, or cannot be seen, as an escape such as \\x1b.

    Line feeds stay. Lone surrogates, which stand for bytes of file names that are not UTF-8, become escapes too.
    """
    text = str(text)
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def cause(error: BaseException, limit: int = 200) -> str:
    """What an exception says, on one line of at most `limit` characters; its type if it says nothing."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        text = f"{text}; make room and try again"
    elif isinstance(error, ModuleNotFoundError):
        text = f"the module {error.name} is not installed"
    elif isinstance(error, RecursionError):
        text = "nested too deeply"
    elif isinstance(error, MemoryError):
        text = text or "not enough memory"
    text = " ".join(printable(text).split())
    return (text if len(text) <= limit else f"{text[: limit - 3]}...") or type(error).__name__


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a CPU or a GPU."""
    import torch  # here, because the command line's --help needs none

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and bool(_NO_MEMORY.search(str(error)))
