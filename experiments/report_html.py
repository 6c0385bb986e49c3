"""The page of a report: one file of HTML, which needs no other file and no network."""

from __future__ import annotations

import base64
import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

import matplotlib
from matplotlib.figure import Figure

from .report_page import printable, styles

if TYPE_CHECKING:
    from .finished import RunGroup

EMBEDDED = 8_000_000  # bytes of pictures in one page; further ones are linked
GLYPHS = dict(zip("os^DvPX<>h*|x+", "●■▲◆▼✚✖◀▶⬢★|×+", strict=True))  # of markers

STYLE = """
:root { color-scheme: light; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 76rem; padding: 0 1rem; color: #222; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h1, summary, figcaption, dd { overflow-wrap: anywhere; } [hidden] { display: none !important; }
input { font: inherit; padding: .3rem .6rem; width: min(20rem, 100%); box-sizing: border-box; margin-bottom: .75rem; }
table { border-collapse: collapse; font-size: .8125rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .45rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: #fff; }
td:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
th { border-bottom: 2px solid #222; }
th button { font: inherit; font-weight: bold; border: 0; background: none; padding: 0; cursor: pointer; }
th[aria-sort=ascending] button::after { content: " ▲"; } th[aria-sort=descending] button::after { content: " ▼"; }
.wide { overflow-x: auto; }
.panels { display: flex; flex-wrap: wrap; gap: .5rem; } .panels > * { flex: 1 1 18rem; max-width: 26rem; }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; font-size: .875rem; }
svg, img { width: 100%; height: auto; } .small { max-width: 44rem; }
p.notes, ul.left-out { font-size: .875rem; color: #555; max-width: 60rem; overflow-wrap: anywhere; }
details { border-bottom: 1px solid #ddd; padding: .4rem 0; } summary { cursor: pointer; }
figure { margin: 0; } figcaption { font-size: .75rem; color: #555; }
dl { font-size: .8125rem; columns: 20rem; } dl div { break-inside: avoid; } dt { display: inline; color: #555; }
dd { display: inline; margin: 0 0 0 .5rem; }
@media (max-width: 40rem) {
  body { margin: 1rem auto; }
  table, tbody, tr, td { display: block; } tr { padding: .5rem 0; border-bottom: 1px solid #999; }
  thead { display: block; } thead tr { display: flex; flex-wrap: wrap; gap: .2rem .9rem; }
  th { border: 0; padding: .2rem 0; position: static; }
  td { display: flex; justify-content: space-between; gap: 1rem; border: 0; padding: .1rem 0; }
  td:first-child { font-weight: bold; position: static; } td:not(:first-child)::before { content: attr(data-label); }
  td:empty { display: none; }
}
@media print { body { margin: 0; font-size: 11px; } input, details { display: none; }
  table { font-size: 8px; } th, td { padding: .15rem .3rem; } svg, tr { break-inside: avoid; } }
"""

SCRIPT = """
const table = document.querySelector("table"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const number = text => /^[+-]?[\\d.,]+(?! of)( |$)/.test(text) ? parseFloat(text.replace(/,/g, "")) : null;
heads.forEach((head, i) => head.firstElementChild.addEventListener("click", () => {
  const rows = [...body.rows], text = row => row.cells[i].textContent;
  const numeric = i > 0 && rows.some(row => number(text(row)) !== null);
  const falls = head.ariaSort ? head.ariaSort === "ascending" : numeric;
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", falls ? "descending" : "ascending");
  const less = numeric ? (a, b) => number(a) - number(b) : (a, b) => a.localeCompare(b);
  const last = row => numeric ? number(text(row)) === null : text(row) === "";
  rows.sort((a, b) => last(a) - last(b) || (falls ? -1 : 1) * (last(a) ? 0 : less(text(a), text(b))));
  body.append(...rows);
}));
document.querySelector("input").addEventListener("input", event => {
  const words = event.target.value.toLowerCase().split(/\\s+/);
  const shown = text => words.every(word => text.toLowerCase().includes(word));
  for (const row of body.rows) row.hidden = !shown(row.textContent);
  for (const run of document.querySelectorAll("details")) run.hidden = !shown(run.firstElementChild.textContent);
});
"""


def page(
    title: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    notes: str,
    pictures: str,
    runs: str,
    skipped: Sequence[str],
) -> str:
    """One page, whose table can be sorted and filtered.

    Args:
        title: of the page.
        header: of the table.
        rows: of the table.
        notes: below it.
        pictures: HTML, of `drawn`.
        runs: HTML, of `details`.
        skipped: runs that were left out, and why.
    """
    head = "".join(f"<th><button>{html.escape(name)}</button></th>" for name in header)
    body = "\n".join(f"<tr>{''.join(map(_cell, header, row))}</tr>" for row in rows)
    left_out = "".join(f"<li>{html.escape(line)}</li>" for line in skipped)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(title)}</title><style>{STYLE}</style></head><body>
<h1>{html.escape(title)}</h1>
<input type="search" placeholder="Filter, such as: hebbian lr=0.1" aria-label="Filter rows and runs">
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>
{body}
</tbody></table></div>
<p class="notes">{html.escape(notes)}</p>
{pictures}
<h2>Runs</h2>
{runs}
{f'<h2>Left out</h2><ul class="left-out">{left_out}</ul>' if skipped else ""}
<script>{SCRIPT}</script>
</body></html>
"""


def _cell(name: str, text: str) -> str:
    return f'<td data-label="{html.escape(name)}">{html.escape(text)}</td>'


def drawn(groups: list[RunGroup], panels: Sequence[Figure], bars: Figure) -> str:
    """The pictures of training runs, with one legend for all of them."""
    legend = "".join(
        f'<li><span style="color:{of["color"]}">{GLYPHS[of["marker"]]}</span> {html.escape(group.label)}</li>'
        for of, group in zip(styles(groups), groups, strict=True)
    )
    courses = "".join(f"<div>{_svg(panel)}</div>" for panel in panels)
    return f"""<h2>Accuracy against epochs, seconds and forward passes</h2>
<ul class="legend">{legend}</ul><div class="panels">{courses}</div>
<h2>Final accuracy</h2><div class="small">{_svg(bars)}</div>"""


def details(groups: list[RunGroup], out: Path) -> str:
    """For each group: links to the folders of its runs, the pictures of the first one, and its options.

    Args:
        groups: labelled.
        out: the folder of the page.
    """
    parts, left = [], EMBEDDED
    for group in groups:
        links = ", ".join(
            f'<a href="{_address(run.folder, out)}/">seed {run.summary["seed"]}</a>' for run in group.runs
        )
        pictures = ""
        for picture in sorted(filter(Path.is_file, group.runs[0].folder.glob("*.png"))):
            content = picture.read_bytes()
            left -= len(content)
            source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
            if left < 0:
                source = _address(picture, out)
            name = html.escape(printable(picture.stem.replace("_", " ")))
            pictures += (
                f'<figure><img alt="{name}" loading="lazy" src="{source}"><figcaption>{name}</figcaption></figure>'
            )
        options = "".join(
            f"<div><dt>{html.escape(str(key))}</dt><dd>{html.escape(str(value))}</dd></div>"
            for key, value in group.options.items()
        )
        parts.append(
            f"<details><summary>{html.escape(group.label)}</summary><p>Folders: {links}</p>"
            f'<div class="panels">{pictures}</div><dl>{options}</dl></details>'
        )
    return "\n".join(parts)


def _address(path: Path, out: Path) -> str:
    """A path as an address in the page, relative to its folder."""
    return quote(os.fsencode(os.path.relpath(path.resolve(), out.resolve())))


def _svg(figure: Figure) -> str:
    """The figure as an element of the page."""
    text = io.StringIO()
    # Fixed ids: the same runs give the same page.
    with matplotlib.rc_context({"svg.fonttype": "path", "svg.hashsalt": "bioopt"}):
        figure.savefig(text, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    return text.getvalue()[text.getvalue().index("<svg") :]
