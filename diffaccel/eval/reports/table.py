"""The table of a comparison as data: columns, rows, why a number is missing, and under which protocol all was made."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from diffaccel.eval.errors import DataError, ProtocolMismatch
from diffaccel.eval.statistics.jackknife import Estimate

Better = Literal["lower", "higher", ""]
Value = Estimate | str | None
DELTA = "delta:"  # key of a column of differences = this and the key of the column that is compared


@dataclass(frozen=True)
class Column:
    """One measure.

    Attributes:
        key: name in `Row.values`.
        title: heading, with the network a number depends on: `FD[emoji-clip]`.
        unit: such as `ms`, in brackets after the title; an infinite number of `dB` is shown as "identical".
        better: which way is better; empty where neither is.
        digits: digits after the point.
        delta: whether these are paired differences, row minus baseline; made by `delta_column`.
    """

    key: str
    title: str
    unit: str = ""
    better: Better = ""
    digits: int = 3
    delta: bool = False


def delta_column(column: Column, digits: int | None = None) -> Column:
    """The column of paired differences to the baseline that belongs to `column`; its key is `delta:` + the key."""
    digits = column.digits if digits is None else digits
    return Column(DELTA + column.key, f"Δ {column.title}", column.unit, "", digits, delta=True)


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: method, as it stands in the first column.
        values: `Column.key` -> number; a string is the reason why there is none ("no weights"), None or a missing
            key means that there is nothing to tell (the baseline's difference to itself).
        protocol: digest of all that numbers must have in common to be compared.
        protocol_text: the same for people, shown under the table.
        pictures: run folder.
        notes: remarks on this row, shown under the table.
    """

    name: str
    values: Mapping[str, Value]
    protocol: str
    protocol_text: str
    pictures: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """Rows of one protocol; the first is the baseline.

    Attributes:
        title: heading.
        columns: measures in the order they are shown.
        rows: methods, the baseline first.
        footnotes: remarks on the whole table.
        manifest: JSON values: weights, versions, prompts, seeds.

    Raises:
        ProtocolMismatch: if rows were made under different protocols; `split_by_protocol` makes a table of each.
        DataError: if a number is NaN, or the baseline differs from itself.
        ValueError: if names repeat, there is no row, or a value has no column.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    footnotes: tuple[str, ...] = ()
    manifest: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_names(self)
        protocols = dict.fromkeys(row.protocol for row in self.rows)
        if len(protocols) > 1:
            raise ProtocolMismatch(
                f"rows of {len(protocols)} protocols ({', '.join(protocols)}) cannot share the table {self.title!r}: "
                "their numbers do not compare; use split_by_protocol"
            )
        for row in self.rows:
            for key, value in row.values.items():
                _check_value(value, f"{key!r} of {row.name!r}")
        for column in self.columns:
            own = self.rows[0].values.get(column.key)
            if column.delta and isinstance(own, Estimate) and own.value != 0:
                raise DataError(
                    f"the baseline {self.rows[0].name!r} differs from itself by {own.value:g} in {column.title!r}: the "
                    "differences were taken to another row, perhaps one of another protocol"
                )

    def column(self, key: str) -> Column:
        """The column of a key; KeyError with what there is if there is none."""
        for column in self.columns:
            if column.key == key:
                return column
        raise KeyError(f"the table has no column {key!r}; it has {', '.join(c.key for c in self.columns)}")


def split_by_protocol(
    title: str,
    columns: Sequence[Column],
    rows: Sequence[Row],
    *,
    footnotes: Sequence[str] = (),
    manifest: dict[str, Any] | None = None,
) -> list[Table]:
    """One table for each protocol, in the order in which they first appear; the first row of each is its baseline.

    Differences must have been taken to the baseline of the same protocol, which `Table` checks.
    """
    by_protocol: dict[str, list[Row]] = {}
    for row in rows:
        by_protocol.setdefault(row.protocol, []).append(row)
    table = lambda name, part: Table(name, tuple(columns), tuple(part), tuple(footnotes), manifest or {})  # noqa: E731
    if len(by_protocol) == 1:
        return [table(title, rows)]
    return [table(f"{title} (protocol {digest[:8]})", part) for digest, part in by_protocol.items()]


def table_to_dict(table: Table) -> dict[str, Any]:
    """JSON values of a table; infinities are strings, which JSON has no numbers for."""
    data = asdict(table)
    for row in data["rows"]:
        row["values"] = {key: _value_to_json(value) for key, value in row["values"].items()}
    return data


def table_from_dict(data: Mapping[str, Any]) -> Table:
    """The table that `table_to_dict` wrote."""
    rows = (
        Row(
            **row | {"values": {k: _value_from_json(v) for k, v in row["values"].items()}, "notes": tuple(row["notes"])}
        )
        for row in data["rows"]
    )
    columns = tuple(Column(**column) for column in data["columns"])
    return Table(data["title"], columns, tuple(rows), tuple(data["footnotes"]), data["manifest"])


def table_to_json(table: Table) -> str:
    """Lossless JSON text: `table_from_json` gives an equal table (the manifest's tuples become lists)."""
    return json.dumps(table_to_dict(table), indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def table_from_json(text: str) -> Table:
    """The table of `table_to_json`."""
    return table_from_dict(json.loads(text))


def _value_to_json(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {name: str(x) if isinstance(x, float) and math.isinf(x) else x for name, x in value.items()}


def _value_from_json(value: Any) -> Value:
    if not isinstance(value, dict):
        return value
    numbers: dict[str, Any] = {name: float(x) if isinstance(x, str) else x for name, x in value.items()}
    return Estimate(**numbers)


def _check_names(table: Table) -> None:
    keys, names = [c.key for c in table.columns], [row.name for row in table.rows]
    if not names:
        raise ValueError(f"the table {table.title!r} has no rows")
    for what, found in (("column keys", keys), ("row names", names)):
        twice = sorted({name for name in found if found.count(name) > 1})
        if twice:
            raise ValueError(f"{what} must differ from each other; twice: {', '.join(twice)}")
    for row in table.rows:
        stray = sorted(set(row.values) - set(keys))
        if stray:
            raise ValueError(f"row {row.name!r} has values without a column: {', '.join(stray)}")
    for column in table.columns:
        if column.delta and column.key.removeprefix(DELTA) not in set(keys) - {column.key}:
            raise ValueError(f"the differences {column.key!r} belong to no column; make them with delta_column")


def _check_value(value: Value, where: str) -> None:
    if isinstance(value, str) and not value:
        raise ValueError(f"{where} is an empty string; a missing number is given as the reason why it is missing")
    if not isinstance(value, Estimate):
        return
    if any(x is not None and math.isnan(x) for x in (value.value, value.se, value.corrected)):
        raise DataError(f"{where} is NaN: the measurement failed; give the reason as a string where there is no number")
    if value.se is not None and not 0 <= value.se < math.inf:
        raise DataError(f"the standard error of {where} must be finite and not negative, not {value.se}")
