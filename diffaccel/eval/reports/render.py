"""Tables as Markdown and LaTeX for people, and as CSV with every digit for programs."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from diffaccel.eval.reports.layout import Cell, layout
from diffaccel.eval.reports.table import Table
from diffaccel.eval.statistics.jackknife import Estimate

_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "[": "{[}",  # after a line's \\ it would be read as a length
    "]": "{]}",
    "*": "{*}",  # \\* forbids a page break
    "—": r"\textemdash{}",
    "↓": r"$\downarrow$",
    "↑": r"$\uparrow$",
    "→": r"$\rightarrow$",
    "±": r"$\pm$",
    "\u00d7": r"$\times$",
    "Δ": r"$\Delta$",
} | {c: f"\\{c}" for c in "_%&#${}"}


def markdown(table: Table) -> str:
    """GitHub's Markdown: heading, table with aligned numbers, footnotes."""
    text = layout(table)
    cells = [[_markdown_cell(line.cells[j]) for line in text.lines] for j in range(len(table.columns))]
    columns = [["method", *(escape_markdown(line.name) + _superscript(line.notes) for line in text.lines)]]
    columns += [[escape_markdown(h), *_aligned(column)] for h, column in zip(text.headings, cells, strict=True)]
    widths = [max(map(len, column)) for column in columns]
    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    rows = [[column[i] for column in columns] for i in range(len(text.lines) + 1)]
    out = [f"### {escape_markdown(table.title)}", ""]
    for row in (rows[0], rule, *rows[1:]):
        first, *rest = (cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        out.append("| " + " | ".join([row[0].ljust(len(first)), *rest]) + " |")
    out.append("")
    out += [f"- <sup>{i}</sup> {escape_markdown(note)}" for i, note in enumerate(text.notes, 1)]
    out += [f"- {escape_markdown(remark)}" for remark in text.remarks]
    return "\n".join(out) + "\n"


def escape_markdown(text: str) -> str:
    r"""Text that Markdown shows as it is, on one line; `_` inside a word and `[x]` mean nothing there and are left."""
    text = re.sub(r"[\\`*|<>&~$#]", r"\\\g<0>", " ".join(text.split()))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)
    return re.sub(r"\](?=[(\[:])", r"\\]", text)


def _markdown_cell(cell: Cell) -> tuple[str, str]:
    number = f"**{cell.number}**" if cell.bold else cell.number
    return number + _superscript((cell.note,) if cell.note else ()), f" ± {cell.error}" if cell.error else ""


def _superscript(notes: Sequence[int]) -> str:
    return f"<sup>{','.join(map(str, notes))}</sup>" if notes else ""


def _aligned(cells: Sequence[tuple[str, str]]) -> list[str]:
    """Numbers and errors of a column, with the signs ± below each other in the source too."""
    before, after = (max(len(cell[i]) for cell in cells) for i in (0, 1))
    return [f"{number.rjust(before)}{error.ljust(after)}" for number, error in cells]


def csv_text(table: Table) -> str:
    """One line per row with every digit: value, and `se`, `corrected` and `n` where a column has them.

    Headings have the unit but no arrow. A missing number is `n/a`, which pandas reads as missing, with the reason in
    `notes`; infinities are `inf`.
    """
    parts = [(column, part) for column in table.columns for part in _parts(table, column.key)]
    out = io.StringIO()
    write = csv.writer(out, lineterminator="\n").writerow
    names = [f"{c.title} ({c.unit})" if c.unit else c.title for c, _ in parts]
    names = [name if part == "value" else f"{name} {part}" for name, (_, part) in zip(names, parts, strict=True)]
    write(["method", *names, "protocol", "notes"])
    for row in table.rows:
        reasons = [f"{c.title}: {row.values[c.key]}" for c in table.columns if isinstance(row.values.get(c.key), str)]
        cells = []
        for column, part in parts:
            value = row.values.get(column.key)
            if isinstance(value, Estimate):
                number = getattr(value, part)
                cells.append("" if number is None else repr(int(number) if part == "n" else float(number)))
            else:
                cells.append("n/a" if isinstance(value, str) and part == "value" else "")
        write([row.name, *cells, row.protocol, "; ".join([*row.notes, *reasons])])
    return out.getvalue()


def _parts(table: Table, key: str) -> list[str]:
    found = [value for row in table.rows if isinstance(value := row.values.get(key), Estimate)]
    has = {"se": any(e.se is not None for e in found), "corrected": any(e.corrected is not None for e in found)}
    return ["value", *(part for part in has if has[part]), *(["n"] if any(e.n for e in found) else [])]


def latex(table: Table) -> str:
    r"""A `table` environment; the document needs the package booktabs.

    A column with standard errors is two of the tabular, so that the signs ± stand below each other.
    """
    text = layout(table)
    shape = "".join("r@{}l" if errors else "r" for errors in text.with_errors)
    headings = [
        rf"\multicolumn{{2}}{{c}}{{{escape_latex(h)}}}" if errors else rf"\multicolumn{{1}}{{c}}{{{escape_latex(h)}}}"
        for h, errors in zip(text.headings, text.with_errors, strict=True)
    ]
    out = [
        r"% needs \usepackage{booktabs}",
        r"\begin{table}[tb]",
        r"\centering",
        rf"\caption{{{escape_latex(table.title)}}}",
        rf"\begin{{tabular}}{{l{shape}}}",
        r"\toprule",
        " & ".join(["method", *headings]) + r" \\",
        r"\midrule",
    ]
    for line in text.lines:
        cells = [_latex_cell(cell, errors) for cell, errors in zip(line.cells, text.with_errors, strict=True)]
        out.append(" & ".join([escape_latex(line.name) + _latex_mark(line.notes), *cells]) + r" \\")
    notes = [rf"\textsuperscript{{{i}}} {escape_latex(note)}" for i, note in enumerate(text.notes, 1)]
    notes += [escape_latex(remark) for remark in text.remarks]
    out += [r"\bottomrule", r"\end{tabular}", r"\par\smallskip", r"\begin{minipage}{\linewidth}\footnotesize"]
    return "\n".join([*out, *(f"{note}\\par" for note in notes), r"\end{minipage}", r"\end{table}"]) + "\n"


def escape_latex(text: str) -> str:
    """Text that LaTeX sets as it is, on one line."""
    words = "".join(_LATEX.get(c, c) for c in " ".join(text.split()))
    return words.replace("--", "-{}-")  # two hyphens would become a dash


def _latex_cell(cell: Cell, errors: bool) -> str:
    if cell.number.lstrip("+-").replace(".", "").isdigit():
        number = rf"$\mathbf{{{cell.number}}}$" if cell.bold else f"${cell.number}$"
    else:
        number = {"inf": r"$\infty$", "-inf": r"$-\infty$"}.get(cell.number, escape_latex(cell.number))
    number += _latex_mark((cell.note,) if cell.note else ())
    if not errors:
        return number
    return number + (rf" & $\,\pm\,{cell.error}$" if cell.error else " &")


def _latex_mark(notes: Sequence[int]) -> str:
    return rf"\textsuperscript{{{','.join(map(str, notes))}}}" if notes else ""
