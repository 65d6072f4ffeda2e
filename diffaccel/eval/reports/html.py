"""A report as one HTML file that holds all it shows and asks nothing of any network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from PIL import Image

from diffaccel.eval.reports.grids import Grid
from diffaccel.eval.reports.layout import Cell, Layout, heading, layout
from diffaccel.eval.reports.plots import Plot
from diffaccel.eval.reports.table import Table, Value
from diffaccel.eval.statistics.jackknife import Estimate

_STYLE = """
:root{color-scheme:light dark;--back:#f4f6f8;--paper:#fff;--ink:#1d2530;--soft:#5c6775;--line:#dfe4ea;
--mark:#0b66c3;--tint:#eef4fb}
@media(prefers-color-scheme:dark){
:root{--back:#0d1117;--paper:#161b22;--ink:#e6ebf1;--soft:#9aa6b5;--line:#29313b;--mark:#6cb2ff;--tint:#1a2533}}
*{box-sizing:border-box}
body{margin:0;padding:24px 16px 48px;background:var(--back);color:var(--ink);font:15px/1.5 system-ui,sans-serif}
main{max-width:1180px;margin:auto}
h1{font-size:26px;line-height:1.2;margin:0 0 20px}
h2{font-size:18px;line-height:1.3;margin:0 0 12px}
section{background:var(--paper);border:1px solid var(--line);border-radius:10px;padding:18px 20px;
margin:0 0 18px;min-width:0}
.scroll{overflow-x:auto;max-width:100%}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th,td{padding:7px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
th:first-child,td:first-child{text-align:left;position:sticky;left:0;background:var(--paper);white-space:normal;
min-width:250px;overflow-wrap:break-word}
thead th{border-bottom:2px solid var(--line);vertical-align:bottom;white-space:normal}
thead button{font:inherit;font-weight:600;color:inherit;background:none;border:0;padding:0;
cursor:pointer;text-align:inherit}
thead span{white-space:nowrap}
thead button:hover{color:var(--mark)}
th[aria-sort=ascending] button::after{content:" ▴";color:var(--mark)}
th[aria-sort=descending] button::after{content:" ▾";color:var(--mark)}
tbody th{font-weight:500}
tr.baseline th,tr.baseline td{background:var(--tint)}
.tag{font-size:12px;color:var(--soft);border:1px solid var(--line);border-radius:9px;padding:0 7px;
margin-left:6px;white-space:nowrap}
td b{color:var(--mark)}
.se{display:inline-block;color:var(--soft);text-align:left;white-space:pre}
.none{color:var(--soft)}
sup{line-height:0}
.notes{font-size:13px;color:var(--soft);margin:12px 0 0;padding-left:0;list-style:none;overflow-wrap:anywhere}
.plots{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,520px),1fr));gap:18px;margin:0 0 18px}
.plots section{margin:0}
svg{display:block;width:100%;min-width:480px;max-width:760px;height:auto;margin:auto}
.grid img{display:block;max-width:max(100%,620px);height:auto;border-radius:6px}
details{font-size:13px}
summary{cursor:pointer;font-size:15px}
pre{overflow-x:auto;white-space:pre-wrap;overflow-wrap:anywhere;font-size:12px;line-height:1.45}
@media(max-width:600px){body{padding:16px 8px 32px}section{padding:14px 12px}th,td{padding:6px 9px}
th:first-child,td:first-child{min-width:0;width:136px;max-width:136px;overflow-wrap:anywhere}}
"""

# A click sorts upwards, the next one downwards, the third restores the order with the baseline first.
_SCRIPT = """
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0], first = [...body.rows], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector("button").addEventListener("click", () => {
    const now = {none: "ascending", ascending: "descending", descending: "none"}[head.getAttribute("aria-sort")];
    heads.forEach(h => h.setAttribute("aria-sort", "none"));
    head.setAttribute("aria-sort", now);
    const sign = now === "descending" ? -1 : 1, key = row => row.cells[column].dataset.v;
    body.append(...(now === "none" ? first : [...first].sort((a, b) => {
      const x = key(a), y = key(b);
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
      return sign * (column ? parseFloat(x) - parseFloat(y) || 0 : x.localeCompare(y));
    })));
  }));
}
"""


def html_report(
    title: str,
    tables: Sequence[Table],
    plots: Sequence[Plot] = (),
    grids: Sequence[Grid] = (),
    manifest: Mapping[str, Any] | None = None,
) -> str:
    """The whole page: tables that can be sorted, plots, pictures as data URIs, manifests folded away.

    All text is escaped. The page's own policy forbids every request and every script but the one that sorts, so that
    nothing in a prompt could run even if an escape were forgotten.
    """
    allowed = base64.b64encode(hashlib.sha256(_SCRIPT.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{allowed}'"
    manifests = {"Manifest": manifest} | {f"Manifest of {t.title}": t.manifest for t in tables}
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body><main>",
        f"<h1>{escape(title)}</h1>",
        *map(_table, tables),
        '<div class="plots">' if plots else "",
        *map(_plot, plots),
        "</div>" if plots else "",
        *map(_grid, grids),
        *(_folded(name, found) for name, found in manifests.items() if found),
        f"</main><script>{_SCRIPT}</script></body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _table(table: Table) -> str:
    shown = layout(table)
    heads = _head("method") + "".join(_head(c.title, heading(c).removeprefix(c.title)) for c in table.columns)
    rows = [_row(table, shown, i) for i in range(len(table.rows))]
    notes = [f"<li>{_mark((i,))} {escape(note)}</li>" for i, note in enumerate(shown.notes, 1)]
    notes += [f"<li>{escape(remark)}</li>" for remark in shown.remarks]
    return "\n".join(
        [
            f'<section><h2>{escape(table.title)}</h2><div class="scroll" tabindex="0"><table>',
            f"<thead><tr>{heads}</tr></thead><tbody>",
            *rows,
            f'</tbody></table></div><ul class="notes">{"".join(notes)}</ul></section>',
        ]
    )


def _head(title: str, unit: str = "") -> str:
    """A heading that may break before its unit and arrow, nowhere else."""
    words = f"<span>{escape(title)}</span>" + (f" <span>{escape(unit.strip())}</span>" if unit else "")
    return f'<th scope="col" aria-sort="none"><button type="button">{words}</button></th>'


def _row(table: Table, shown: Layout, i: int) -> str:
    line, row = shown.lines[i], table.rows[i]
    tag = ' <span class="tag">baseline</span>' if i == 0 and len(table.rows) > 1 else ""
    widths = [max(len(other.cells[j].error) for other in shown.lines) for j in range(len(table.columns))]
    cells = [
        _cell(cell, row.values.get(column.key), width)
        for cell, column, width in zip(line.cells, table.columns, widths, strict=True)
    ]
    kind = ' class="baseline"' if i == 0 else ""
    name = f'<th scope="row" data-v="{escape(line.name)}">{escape(line.name)}{_mark(line.notes)}{tag}</th>'
    return f"<tr{kind}>{name}{''.join(cells)}</tr>"


def _cell(cell: Cell, value: Value, width: int) -> str:
    """A number; the error's place is kept where there is none, so that the points stand below each other."""
    words = f"<b>{cell.number}</b>" if cell.bold else escape(cell.number)
    error = f'<span class="se" style="width:{width + 3}ch">{f" ± {cell.error}" if cell.error else ""}</span>'
    words += _mark((cell.note,) if cell.note else ()) + (error if width else "")
    if not isinstance(value, Estimate):
        return f'<td class="none">{words}</td>'
    hints = [f"n = {value.n}"] if value.n else []
    hints += [f"less its bias {value.corrected:.6g}"] if value.corrected is not None else []
    title = f' title="{", ".join(hints)}"' if hints else ""
    number = {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value.value), repr(float(value.value)))
    return f'<td data-v="{number}"{title}>{words}</td>'


def _mark(notes: Sequence[int]) -> str:
    return f"<sup>{','.join(map(str, notes))}</sup>" if notes else ""


def _plot(plot: Plot) -> str:
    note = f'<p class="notes">{escape(plot.note)}</p>' if plot.note else ""
    return f'<section><h2>{escape(plot.title)}</h2><div class="scroll" tabindex="0">{plot.svg}</div>{note}</section>'


def _grid(grid: Grid) -> str:
    notes = "".join(f"<li>{escape(note)}</li>" for note in grid.notes)
    return (
        f'<section class="grid"><h2>{escape(grid.title)}</h2><div class="scroll" tabindex="0">'
        f'<img src="{data_uri(grid.picture)}" width="{grid.picture.width}" height="{grid.picture.height}" '
        f'alt="{escape(grid.title)}"></div><ul class="notes">{notes}</ul></section>'
    )


def data_uri(picture: Image.Image) -> str:
    """A picture as a PNG inside an address."""
    out = io.BytesIO()
    picture.save(out, format="PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def _folded(name: str, manifest: Mapping[str, Any]) -> str:
    words = escape(json.dumps(manifest, indent=2, ensure_ascii=False))
    return f"<section><details><summary>{escape(name)}</summary><pre>{words}</pre></details></section>"
