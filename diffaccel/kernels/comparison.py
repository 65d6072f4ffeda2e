"""A dense and a sparse edit beside one another, in words and as a table."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from diffaccel.kernels.report import EditReport

CLOSE = 1.05  # a ratio of two times, each measured once, that says nothing


@dataclass(frozen=True)
class Comparison:
    """An edit, made twice.

    Attributes:
        pictures: by "dense" and "sparse".
        reports: likewise, of what was measured.
        difference: root mean square difference of the two in the mask, of 1.
        edits, dense_seconds, sparse_seconds: of all edits of this picture; the reference is in the sparse ones.
        recomputed: the picture before, with the mask and the recomputed boxes drawn in.
    """

    pictures: dict[str, Image.Image]
    reports: dict[str, EditReport]
    difference: float
    edits: int
    dense_seconds: float
    sparse_seconds: float
    recomputed: Image.Image

    def verdict(self) -> str:
        """Who was faster, in a sentence or two; nothing that was not measured."""
        dense, sparse = self.reports["dense"], self.reports["sparse"]
        times = f"sparse {sparse.seconds:.2f} s, dense {dense.seconds:.2f} s, end to end, measured once each"
        if "sparse" not in sparse.calls:
            first = f"**No gain: this edit ran dense.** It took {sparse.seconds:.2f} s, dense {dense.seconds:.2f} s."
        elif dense.seconds > CLOSE * sparse.seconds:
            first = f"**Sparse was {dense.seconds / sparse.seconds:.1f} times as fast as dense**: {times}."
        elif sparse.seconds > CLOSE * dense.seconds:
            first = f"**Sparse lost: it was {sparse.seconds / dense.seconds:.1f} times as slow as dense**: {times}."
        else:
            first = f"**Sparse and dense took about the same time**: {times}."
        reference = (
            f"Counting the {sparse.reference_seconds:.2f} s that the reference (the first picture) took, "
            f"sparse has taken {self.sparse_seconds:.2f} s so far, and dense {self.dense_seconds:.2f} s."
        )
        return " ".join([first, reference, *([f"Note: {sparse.note}."] if sparse.note else [])])

    def table(self) -> str:
        """What was measured, as a table in Markdown."""
        dense, sparse = self.reports["dense"], self.reports["sparse"]
        calls = [one.call_seconds.get(kind, one.call_seconds.get("dense")) for kind, one in self.reports.items()]
        rows = [
            ("this edit, end to end", *_times(dense.seconds, sparse.seconds)),
            ("one call of the network (median)", *_times(*calls)),
            ("calls of the network", _calls(dense), _calls(sparse), ""),
            (f"all edits so far ({self.edits}), reference included", *_times(self.dense_seconds, self.sparse_seconds)),
            ("share of the picture that was recomputed", f"{dense.share:.0%}", f"{sparse.share:.0%}", ""),
            ("seam: change just around the mask, of 1", _error(dense.seam), _error(sparse.seam), ""),
            ("difference to dense in the mask, of 1", "", _error(self.difference), ""),
            *(("probe: error of a call in the mask", "", f"{error[2]:.2%}", "") for error in sparse.probes[-1:]),
            ("memory for kept features", "", f"{sparse.memory / 2**20:,.0f} MiB", ""),
        ]
        return "\n".join(f"| {' | '.join(row)} |" for row in [("", "dense", "sparse", "gain"), ("---",) * 4, *rows])


def _times(dense: float | None, sparse: float | None) -> tuple[str, str, str]:
    """Two times, and by what factor the second is the shorter one."""
    texts = ["" if seconds is None else f"{seconds:.3f} s" for seconds in (dense, sparse)]
    return texts[0], texts[1], "" if dense is None or sparse is None else f"{dense / sparse:.2f}x"


def _calls(report: EditReport) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in report.calls.items())


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
