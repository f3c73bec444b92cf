"""Tables for HTML and Markdown, and the page of a report, which needs nothing else.

    page("Title", [Section("times", "Times", [table, "A paragraph.", html.plots([to_svg(figure)])])])

`html` holds the macros of bench/report_blocks.jinja. They escape every text; what is markup already is a `Markup`.
"""

import base64
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

NO_VALUE = "–"  # an en dash: nothing known, nothing measured
TEXT_LOOKS = ("text", "who", "check")  # of cells that are read and not compared: set to the left


def image(svg: str) -> Markup:
    """A plot as an element that needs no file; the plot's title is read out in its place."""
    title = Markup(re.search("<title>(.*?)</title>", svg, re.DOTALL)[1]).unescape()
    data = base64.b64encode(svg.encode()).decode()
    return Markup('<img alt="{}" src="data:image/svg+xml;base64,{}">').format(title, data)


OPTIONS = {"autoescape": True, "undefined": StrictUndefined, "trim_blocks": True, "lstrip_blocks": True}
templates = Environment(loader=FileSystemLoader(Path(__file__).parent), **OPTIONS)
templates.globals["image"] = image
html: Any = templates.get_template("report_blocks.jinja").module


class Cell(NamedTuple):
    """A cell.

    Attributes:
        sort: what it is sorted by, if that is a number. look: its CSS classes. title: shown when pointed at.
    """

    text: Any
    sort: float | None = None
    look: str = ""
    title: str | None = None


class Column(NamedTuple):
    """A column: its heading, what it means, and its cell of an item, for `Table.of`."""

    name: str
    hint: str | None = None
    cell: Callable[[Any], Cell] | None = None


class Line(NamedTuple):
    """A row: one cell a column. look: "ours" or "gone" (not measured)."""

    cells: Sequence[Cell]
    look: str = ""


class Table(NamedTuple):
    """A table for every form that a report takes; it may be a block of a section. Columns without a value are left out.

    Attributes:
        caption: what it is, for screen readers and the filter.
    """

    caption: str
    columns: Sequence[Column]
    lines: Sequence[Line]

    @classmethod
    def of(cls, caption: str, columns: Sequence[Column], items: Iterable[Any], look=lambda item: "") -> "Table":
        """A line for each item; `look` gives the line's."""
        return cls(caption, columns, [Line([column.cell(item) for column in columns], look(item)) for item in items])

    def only(self, *names: str) -> "Table":
        """The columns of these names, in this order."""
        chosen = [next(i for i, column in enumerate(self.columns) if column.name == name) for name in names]
        lines = [Line([line.cells[i] for i in chosen], line.look) for line in self.lines]
        return Table(self.caption, [self.columns[i] for i in chosen], lines)

    @property
    def kept(self) -> list[int]:
        """Indices of the columns that have a value."""
        columns = range(len(self.columns))
        return [i for i in columns if i == 0 or any(line.cells[i].text != NO_VALUE for line in self.lines)]

    def side(self, i: int) -> str:
        """The look of a column of text, "" of one of numbers."""
        looks = (line.cells[i].look.partition(" ")[0] for line in self.lines)
        return next((look for look in looks if look in TEXT_LOOKS), "")

    def __html__(self) -> Markup:
        return html.table(self)

    def markdown(self) -> str:
        """For a README. Bold is what is slower, and the name of what is ours."""
        kept = self.kept
        rows = [[_markdown(line.cells[i], i == 0 and "ours" in line.look) for i in kept] for line in self.lines]
        rule = ["---" if i == 0 or self.side(i) else "---:" for i in kept]
        heads = [self.columns[i].name for i in kept]
        return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, rule, *rows))


def _markdown(cell: Cell, bold: bool) -> str:
    text = markdown_text(cell.text)
    return f"**{text}**" if bold or "slow" in cell.look else text


def markdown_text(value: Any) -> str:
    """One line of Markdown that shows `value` as it is."""
    return re.sub(r"([|*])", r"\\\1", " ".join(str(value).split())).replace("<", "&lt;")


class Section(NamedTuple):
    """A part of the page with a heading that can be linked. It may be a block of another one.

    Attributes:
        blocks: strings are paragraphs, other markup stands as it is; None is left out.
        contents: its name in the list of contents, "" for none. group: those of one share a line of that list.
    """

    id: str
    title: str
    blocks: Sequence[Any]
    contents: str = ""
    group: int = 0
    level: int = 2

    def __html__(self) -> Markup:
        return html.section(self)


def page(title: str, sections: Sequence[Section]) -> str:
    """The whole document."""
    listed = itertools.groupby((one for one in sections if one.contents), key=lambda one: one.group)
    contents = [list(group) for _, group in listed]
    return templates.get_template("report_page.jinja").render(title=title, sections=sections, contents=contents)
