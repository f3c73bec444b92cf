"""Types of command-line arguments: what is wrong with one is said by what was wanted."""

import argparse
from collections.abc import Callable


def checked(check: Callable[[str], object], wanted: str) -> Callable[[str], object]:
    """An argparse type whose error says what was wanted."""

    def parse(text: str) -> object:
        try:
            return check(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}") from None

    return parse


def number(kind: type, low: float, high: float = float("inf")) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            raise ValueError
        return value

    return parse


def numbers(*words: str) -> Callable[[str], object]:
    """Several integers, each once, or one of these words."""

    def parse(text: str) -> str | tuple[int, ...]:
        return text if text in words else tuple(dict.fromkeys(map(number(int, 0), text.split(","))))

    said = f", or {' or '.join(words)}" if words else ""
    return checked(parse, f"an integer from 0, several with commas{said}")


def some_of(names: tuple[str, ...], none: bool = False) -> Callable[[str], object]:
    """Some of these names with commas, each once; where `none`, that word stands for none of them."""

    def parse(text: str) -> tuple[str, ...]:
        found = () if none and text == "none" else tuple(dict.fromkeys(text.split(",")))
        if not set(found) <= set(names):
            raise ValueError
        return found

    return checked(parse, f"{'none, or ' * none}some of {', '.join(names)} with commas")


def _pair(text: str) -> tuple[int, int]:
    rows, columns = map(number(int, 1), text.split("x"))
    return rows, columns


def _hxw(text: str) -> tuple[tuple[int, int], ...]:
    sizes = tuple(tuple(map(number(int, 1), size.split("x"))) for size in text.split(","))
    if len(sizes) < 2 or any(len(size) != 2 for size in sizes):
        raise ValueError
    return sizes


rows_columns = checked(_pair, "two integers such as 14x16")
one_size = checked(lambda text: _pair(text) if "x" in text else number(int, 1)(text), "an integer, or two as 224x256")
im_size = checked(lambda text: text if text == "own" else number(int, 1)(text), "an integer from 1, or own")
ratio = checked(number(float, 1), "a number from 1")


def _split_names(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if not all(names):
        raise ValueError
    return names


positive_int = checked(number(int, 1), "an integer from 1")
fraction = checked(number(float, 0, 1), "a number in 0..1")
scales = checked(lambda text: tuple(map(number(float, 0.01, 100), text.split(","))), "numbers such as 0.75,1,1.25")
words = checked(_split_names, "names with commas such as train,val")
sizes = checked(_hxw, "two sizes or more such as 512x512,385x521")
index = checked(number(int, 0), "an integer from 0")
coordinate = checked(number(float, -1e9, 1e9), "a number of pixels")
label_kinds = some_of(("png", "raw", "npy"), none=True)
