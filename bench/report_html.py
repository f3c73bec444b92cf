"""HTML of the report: elements that escape what they are given, tables that sort, the frame of the page.

Nothing is fetched: style and script are in the page, and the script only sorts and filters tables.
"""

import html
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from bench.report_rows import NO_VALUE
from bench.report_svg import css_variables

FILTER_FROM = 13  # rows from which a table gets a field to filter them


class Html(str):
    """Text that is HTML already. Everything else is escaped."""

    __slots__ = ()


def escaped(value: Any) -> str:
    """`value` as HTML; lists are joined, None is nothing."""
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return "".join(escaped(part) for part in value)
    return str(value) if isinstance(value, Html) else html.escape(str(value))


def tag(name: str, *children: Any, **attributes: Any) -> Html:
    """An element: `class_` for class, underscores for hyphens; attributes that are None are left out."""
    given = [(key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items() if value is not None]
    inside = "".join(f' {key}="{html.escape(str(value))}"' for key, value in given)
    return Html(f"<{name}{inside}>{escaped(children)}</{name}>")


@dataclass(frozen=True)
class Cell:
    """A cell. `sort`: what it is sorted by, if that is a number. `title`: shown when pointed at."""

    text: Any
    sort: float | None = None
    class_: str | None = None
    title: str | None = None


@dataclass(frozen=True)
class Head:
    """A column: its heading and what it means."""

    text: str
    hint: str | None = None


@dataclass(frozen=True)
class Line:
    """A row: one cell a column, and its class."""

    cells: Sequence[Cell]
    class_: str | None = None


def table(heads: Sequence[Head], lines: Sequence[Line], caption: str) -> Html:
    """A table that sorts by a click on a heading and scrolls by itself; columns without a value are left out.

    Args:
        caption: what the table is, for screen readers and the filter.
    """
    kept = [i for i in range(len(heads)) if i == 0 or any(line.cells[i].text != NO_VALUE for line in lines)]
    sides = [next((line.cells[i].class_ for line in lines if _is_text(line.cells[i])), None) for i in range(len(heads))]
    row = tag(
        "tr",
        [
            tag("th", tag("button", heads[i].text, type="button"), scope="col", title=heads[i].hint, class_=sides[i])
            for i in kept
        ],
    )
    body = [tag("tr", [_cell(line.cells[i], i == 0) for i in kept], class_=line.class_) for line in lines]
    found = tag(
        "div",
        tag(
            "table",
            tag("caption", caption),
            tag("thead", row),
            tag("tbody", body),
            class_="data",
        ),
        class_="scroll",
        tabindex="0",
        role="region",
        aria_label=caption,
    )
    if len(lines) < FILTER_FROM:
        return found
    field = Html(
        f'<input type="search" class="filter" placeholder="Filter {len(lines)} rows" '
        f'aria-label="Filter rows: {html.escape(caption)}">'
    )
    return Html(field + found)


def _is_text(cell: Cell) -> bool:
    return (cell.class_ or "").split(" ")[0] in ("text", "who", "check")


def _cell(cell: Cell, first: bool) -> Html:
    sort = None if cell.sort is None else f"{cell.sort:.9g}"
    return tag(
        "th" if first else "td",
        cell.text,
        class_=cell.class_,
        title=cell.title,
        data_v=sort,
        scope="row" if first else None,
    )


def section(id_: str, title: str, *children: Any, level: int = 2) -> Html:
    """A part of the page with a heading that can be linked."""
    heading = tag(f"h{level}", title, " ", tag("a", "#", href=f"#{id_}", class_="anchor", aria_label="link"), id=id_)
    return tag("section", heading, *children)


def figures(svgs: Iterable[str], caption: Any = None) -> Html:
    """Plots beside each other where there is room, below each other on a phone."""
    found = [tag("div", Html(svg), class_="plot") for svg in svgs]
    return tag("figure", tag("div", found, class_="plots"), caption and tag("figcaption", caption)) if found else Html()


def facts(pairs: Iterable[tuple[str, Any]]) -> Html:
    """Names and values, below each other."""
    return tag("dl", [tag("div", tag("dt", name), tag("dd", value)) for name, value in pairs])


def page(title: str, contents: Iterable[Sequence[tuple[str, str]]], body: Iterable[Any]) -> str:
    """The whole document. `contents`: lines of (anchor, text)."""
    lines = [tag("div", [tag("a", text, href=f"#{id_}") for id_, text in line]) for line in contents if line]
    links = tag("nav", lines, aria_label="Contents")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{html.escape(title)}</title><style>{_style()}</style>"
    )
    main = tag("main", tag("h1", title), links, list(body))
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{main}<script>{_SCRIPT}</script></body></html>\n'


def _style() -> str:
    dark = f"@media (prefers-color-scheme:dark){{:root{{{css_variables(True)};--tint:#262017}}}}"
    return f":root{{{css_variables(False)};--tint:#fff5ec}}{dark}{_STYLE}"


_STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--ground);color:var(--ink);font:15px/1.5
system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1240px;margin:0 auto;padding:16px}
h1{font-size:1.6rem;line-height:1.2;margin:.4em 0}
h2{font-size:1.25rem;margin:2.2em 0 .5em;border-bottom:1px solid var(--line);padding-bottom:.2em}
h3{font-size:1.05rem;margin:1.8em 0 .4em}
p{max-width:75ch;margin:.5em 0}
a{color:inherit}
.anchor{color:var(--soft);text-decoration:none;font-weight:400;opacity:.55}
nav div{display:flex;flex-wrap:wrap;gap:4px 14px;margin:6px 0;font-size:.93rem}
.badge{display:inline-block;border:1.5px solid var(--ink);border-radius:5px;padding:1px 9px;
font-weight:700;margin:0 6px 4px 0}
.badge.bad,.note{border-color:var(--bad)}
.note{border-left:4px solid var(--bad);padding:6px 12px;margin:10px 0;max-width:80ch}
dl{display:grid;grid-template-columns:repeat(auto-fit,minmax(250px,1fr));gap:4px 22px;margin:12px 0}
dl div{border-top:1px solid var(--line);padding:3px 0;min-width:0}
dt{color:var(--soft);font-size:.85rem}
dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow:auto;max-height:75vh;border:1px solid var(--line);border-radius:6px;margin:8px 0}
table{border-collapse:separate;border-spacing:0;font-size:.875rem;font-variant-numeric:tabular-nums;min-width:100%}
caption{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%)}
th,td{padding:4px 9px;text-align:right;white-space:nowrap;border-top:1px solid var(--line);background:var(--ground)}
.text{text-align:left;white-space:normal;min-width:13em}
tbody tr:first-child>*{border-top:0}
table:not(.sorted) tr.next>*{border-top:2px solid var(--soft)}
thead th{position:sticky;top:0;z-index:2;border-bottom:1px solid var(--soft);vertical-align:bottom;padding:0}
thead button{all:unset;cursor:pointer;display:block;padding:5px 9px;font-weight:600;width:100%;box-sizing:border-box}
thead button:focus-visible{outline:2px solid var(--ink);outline-offset:-2px}
th[aria-sort=ascending] button::after{content:" \\25B2"}
th[aria-sort=descending] button::after{content:" \\25BC"}
tr>:first-child{position:sticky;left:0;text-align:left;font-weight:400;z-index:1}
thead tr>:first-child{z-index:3}
tr.ours>*{background:var(--tint)}
tr.ours>.who{font-weight:700}
tr.gone>*{color:var(--soft);font-style:italic}
.who,.check{text-align:left}
.best{font-weight:700}
.slow{color:var(--bad);font-weight:700}
.soft{color:var(--soft)}
.filter{font:inherit;padding:3px 9px;border:1px solid var(--soft);border-radius:5px;background:var(--ground);
color:inherit;max-width:100%;margin-top:8px}
figure{margin:12px 0}
figcaption{color:var(--soft);font-size:.875rem;max-width:80ch}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(330px,100%),1fr));gap:14px}
.plot{border:1px solid var(--line);border-radius:6px;padding:4px;max-width:480px;min-width:0}
.plot svg{display:block;width:100%;height:auto}
.plot.broad{max-width:860px}
.plot svg.narrow{display:none}
.legend{display:flex;flex-wrap:wrap;gap:2px 16px;font-size:.875rem;margin:8px 0}
.legend span{display:inline-flex;align-items:center;gap:6px}
details{margin:10px 0}
summary{cursor:pointer}
li{margin:.2em 0}
@media (max-width:600px){main{padding:10px}.plot svg.wide{display:none}.plot svg.narrow{display:block}
table{font-size:.8rem}th,td{padding:4px 7px}thead button{padding:5px 7px}
tr>:first-child{white-space:normal;min-width:10em;max-width:10em}}
@media print{.scroll{max-height:none;overflow:visible}nav,.filter{display:none}}
""".replace("\n", " ")

_SCRIPT = """
document.querySelectorAll('table.data').forEach(function(t){
var body=t.tBodies[0],heads=[].slice.call(t.tHead.rows[0].cells);
function value(r,i){var c=r.cells[i];return c.dataset.v===undefined?null:+c.dataset.v}
heads.forEach(function(h,i){h.firstChild.onclick=function(){
var up=h.getAttribute('aria-sort')!=='ascending',rows=[].slice.call(body.rows);
var numeric=rows.some(function(r){return value(r,i)!==null});
heads.forEach(function(o){o.removeAttribute('aria-sort')});
h.setAttribute('aria-sort',up?'ascending':'descending');t.classList.add('sorted');
rows.sort(function(a,b){var x,y;
if(!numeric){x=a.cells[i].textContent;y=b.cells[i].textContent;return(up?1:-1)*x.localeCompare(y)}
x=value(a,i);y=value(b,i);if(x===null||y===null)return(x===null)-(y===null);return(up?1:-1)*(x-y)});
rows.forEach(function(r){body.appendChild(r)})}});
var box=t.parentNode.previousElementSibling;
if(box&&box.classList.contains('filter'))box.oninput=function(){
var words=box.value.toLowerCase().split(/\\s+/);
[].forEach.call(body.rows,function(r){var s=r.textContent.toLowerCase();
r.hidden=!words.every(function(w){return s.indexOf(w)>=0})})}});
""".strip().replace("\n", "")
