"""What the pages hold: blocks of code, command lines, links, names of files."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md")),
    *sorted((ROOT / "examples").rglob("README.md")),
    *sorted([*(ROOT / "docs").glob("*.md"), *(ROOT / "bench" / "results").glob("README.md")]),
]


class Block(NamedTuple):
    """Code of a page. `language`: what the fence says, "sh" for indented lines. `line`: number of its first line."""

    language: str
    text: str
    line: int


def blocks(text: str) -> Iterator[Block]:
    """Fenced blocks, and lines that are indented by four blanks after an empty line."""
    lines, i = text.splitlines(), 0
    while i < len(lines):
        fence, end = re.match(r"```(\w*)$", lines[i]), i + 1
        if fence:
            while lines[end] != "```":
                end += 1
            yield Block(fence[1], "\n".join(lines[i + 1 : end]) + "\n", i + 2)
        elif lines[i].startswith("    ") and not lines[i - 1]:
            while end < len(lines) and lines[end].startswith("    "):
                end += 1
            yield Block("sh", "\n".join(line[4:] for line in lines[i:end]) + "\n", i + 1)
        i = end + bool(fence)


def commands(text: str) -> Iterator[list[str]]:
    """The words of each command of a page, without comments; `a && b` are two."""
    for block in blocks(text):
        if block.language != "sh":
            continue
        for line in block.text.replace("\\\n", " ").splitlines():
            words: list[str] = []
            for word in [*shlex.split(line, comments=True), "&&"]:
                if word != "&&":
                    words.append(word)
                elif words:
                    yield words
                    words = []


def prose(text: str) -> str:
    """The page without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(text: str) -> set[str]:
    """What `#...` links to the page may end with: its headings, as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(text: str) -> list[str]:
    return re.findall(r"\]\(([^)\s]+)\)", prose(text))


def quoted(text: str) -> list[str]:
    """What stands in back-quotes, outside blocks."""
    return re.findall(r"`([^`\n]+)`", prose(text))
