"""Prompts of a run: read from files, each with an id that its noise and its pairs hang on."""

from __future__ import annotations

import codecs
import csv
import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffaccel.eval.errors import DataError

EMOJI = Path(__file__).parent.parent / "data" / "emoji.jsonl"
_KEYS = ("prompt", "caption", "text")
_ACCEPTED = "prompts are read from .jsonl, .csv, .tsv, .txt and COCO annotations in .json"
_Entry = tuple[str | None, str, str]  # id where the source gives one, text, place for messages


@dataclass(frozen=True)
class Prompt:
    """A prompt.

    Attributes:
        id: its name in a run, unique there. Noise is drawn from it, and runs are paired by it.
        text: what the pipeline is given.
    """

    id: str
    text: str


def read_prompts(source: str | Path | Sequence[str], limit: int | None = None) -> list[Prompt]:
    """Prompts in the order of their source.

    A prompt without an id has its text as id, and a repeated text "TEXT#2", "TEXT#3", so that each has noise of its
    own. The ids of the first n prompts are the same whatever the limit. White space around a prompt is removed.

    Args:
        source: one of
            - a `.jsonl` file: an object in each line with `prompt`, `caption` or `text`, and `id` if wanted;
            - a `.csv` or `.tsv` file with such a column in its first line, in any case (`Prompt` of PartiPrompts);
            - a `.txt` file: one prompt a line;
            - a `.json` file of COCO captions: one caption for each picture, the first by annotation id, ordered by
              `image_id`, which becomes the id. Papers draw their 30,000 at random: name the rule with the numbers;
            - "emoji": the 1,905 captions that come with this package (see `data/README.md` there);
            - a list of strings.
        limit: at most so many, from the beginning; fewer if the source has fewer.

    Raises:
        DataError: if the file is missing, damaged, has no prompts or one that is empty, or repeats an id.
        ValueError: if `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, not {limit}")
    if isinstance(source, str | Path):
        path = EMOJI if source == "emoji" else Path(source)
        entries, name = _read(path), str(path)
    else:
        entries, name = [(None, text, f"prompt {i} of the list") for i, text in enumerate(source)], "the list"
    if not entries:
        raise DataError(f"{name} has no prompts")
    return _named([(id, _checked(text, place), place) for id, text, place in entries])[:limit]


def prompts_hash(prompts: Sequence[Prompt]) -> str:
    """SHA-256 of ids and texts, in order: of `[[id, text], ...]` as ASCII JSON without spaces."""
    pairs = json.dumps([[prompt.id, prompt.text] for prompt in prompts], separators=(",", ":"))
    return hashlib.sha256(pairs.encode()).hexdigest()


def _read(path: Path) -> list[_Entry]:
    readers: dict[str, Callable[[str, str], Iterator[_Entry]]] = {
        ".jsonl": _jsonl,
        ".csv": _csv,
        ".tsv": _tsv,
        ".txt": _txt,
        ".json": _coco,
    }
    if path.suffix.lower() not in readers:
        raise DataError(f"{path} is not a list of prompts: {_ACCEPTED}")
    try:
        data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}, line {line} is not UTF-8; save the file in that encoding") from error
    return list(readers[path.suffix.lower()](text, str(path)))


def _lines(text: str, path: str) -> Iterator[tuple[str, str]]:
    """Lines that are not blank, with their places; only line feeds part them, prompts may hold other breaks."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield line.removesuffix("\r"), f"{path}, line {number}"


def _txt(text: str, path: str) -> Iterator[_Entry]:
    for line, place in _lines(text, path):
        yield None, line, place


def _jsonl(text: str, path: str) -> Iterator[_Entry]:
    for line, place in _lines(text, path):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is not JSON ({error}); write one object a line") from error
        if not isinstance(record, dict):
            raise DataError(f'{place} is not a JSON object; write {{"prompt": "..."}}')
        yield _entry(record, place)


def _csv(text: str, path: str) -> Iterator[_Entry]:
    rows = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        yield from _table(((row, f"{path}, line {rows.line_num}") for row in rows), path)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num} is not CSV: {error}") from error


def _tsv(text: str, path: str) -> Iterator[_Entry]:
    """Tables with tabs quote a field as CSV does or not at all: quotes around a whole field are taken off."""

    def field(raw: str) -> str:
        return raw[1:-1].replace('""', '"') if re.fullmatch(r'"(?:[^"]|"")*"', raw) else raw

    rows = (([field(raw) for raw in line.split("\t")], place) for line, place in _lines(text, path))
    yield from _table(rows, path)


def _table(rows: Iterator[tuple[list[str], str]], path: str) -> Iterator[_Entry]:
    """Entries of the rows below the header; a row is its fields and its place."""
    header = [name.strip().lower() for name in next(rows, ([], ""))[0]]
    if not set(header) & set(_KEYS):
        columns = ", ".join(header) or "none"
        raise DataError(f"{path} has no column named {_or(_KEYS)} in its first line; its columns are {columns}")
    for row, place in rows:
        if not any(row):
            continue
        if len(row) != len(header):
            raise DataError(f"{place} has {len(row)} fields, the first line {len(header)}; quote prompts with commas")
        record = dict(zip(header, row, strict=True))
        yield _entry(record | {"id": record.get("id") or None}, place)


def _coco(text: str, path: str) -> Iterator[_Entry]:
    try:
        annotations = json.loads(text)["annotations"]
        ordered = sorted(annotations, key=lambda annotation: annotation["id"], reverse=True)
        first = {annotation["image_id"]: annotation["caption"] for annotation in ordered}  # the lowest id comes last
        pictures = sorted(first)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{path} is not a COCO captions file (annotations with id, image_id and caption); {_ACCEPTED}"
        ) from error
    for picture in pictures:
        yield str(picture), first[picture], f"{path}, image {picture}"


def _entry(record: Mapping[str, Any], place: str) -> _Entry:
    key = next((key for key in _KEYS if key in record), None)
    if key is None:
        raise DataError(f"{place} has no {_or(_KEYS)}; its keys are {', '.join(record) or 'none'}")
    id = record.get("id")
    if isinstance(id, bool) or not isinstance(id, str | int | None) or id == "":
        raise DataError(f"{place} has the id {id!r}; an id is a string or a whole number, or left out")
    return None if id is None else str(id), record[key], place


def _checked(text: Any, place: str) -> str:
    """The text without white space around it."""
    if not isinstance(text, str):
        raise DataError(f"{place} must have a string as prompt, not {text!r}")
    if not text.strip():
        raise DataError(f"{place} is an empty prompt; remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"{place} holds half of a surrogate pair, which is no character") from error
    return text.strip()


def _named(entries: Sequence[_Entry]) -> list[Prompt]:
    """The prompts, each with an id of its own."""
    taken: dict[str, str] = {}
    for id, _, place in entries:
        if id is not None and id in taken:
            raise DataError(f"{place} repeats the id {id!r} of {taken[id]}; ids must differ")
        if id is not None:
            taken[id] = place
    prompts, seen = [], Counter()
    for id, text, place in entries:
        while id is None:
            seen[text] += 1
            name = text if seen[text] == 1 else f"{text}#{seen[text]}"
            id = None if name in taken else name
            taken.setdefault(name, place)
        prompts.append(Prompt(id, text))
    return prompts


def _or(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"
