"""Files of rows: JSONL, JSON, CSV, TSV, Parquet (each also gzipped where that is common) and data sets of ``datasets``.

path ──► read_table ──► Row(where, value)          a row as a mapping of column → value
                        Row(where, problem=...)    a row that is none, with the reason: the reader decides its fate
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_ray.errors import DataError

FORMS = ".jsonl, .ndjson, .json, .csv, .tsv (also with .gz), .parquet"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One row of a table."""

    where: str
    """Its place as a person finds it: "FILE line 7"."""
    value: Mapping[str, Any] | None
    """Column → value; None where the row cannot be read at all."""
    problem: str = ""
    """Why it cannot be read, and the remedy."""
    text: str = ""
    """The row as it stands in the file, where it cannot be read."""


def read_table(path: str | Path) -> Iterator[Row]:
    """Every row of a file, a folder that ``datasets`` has saved, or a data set of the hub; blank lines are passed over.

    Args:
        path: a data set of the hub is written ``ORG/NAME``, or ``ORG/NAME:SPLIT``.

    Raises:
        DataError: the whole cannot be read: it is missing, not UTF-8, or of no known form.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        yield from _saved_dataset(file)
        return
    if not file.is_file():
        if not isinstance(path, Path) and _HUB_NAME.fullmatch(path) and not file.suffix:
            yield from _hub_dataset(path)
            return
        raise DataError(f"{path}: there is no such file or folder; name one of the forms {FORMS}")
    suffixes = [suffix.lower() for suffix in file.suffixes]
    packed = suffixes[-1:] == [".gz"]
    form = (suffixes[:-1] if packed else suffixes)[-1:]
    match form:
        case [".jsonl"] | [".ndjson"]:
            yield from _json_lines(file, _read_text(file, packed))
        case [".json"]:
            yield from _json_array(file, _read_text(file, packed))
        case [".csv"] | [".tsv"]:
            yield from _delimited(file, _read_text(file, packed), "," if form == [".csv"] else "\t")
        case [".parquet"] if not packed:
            yield from _parquet(file)
        case _:
            raise DataError(f"{path}: its ending says no form that can be read; use one of {FORMS}")


def _read_text(file: Path, packed: bool) -> str:
    try:
        content = file.read_bytes()
        if packed:
            content = gzip.decompress(content)
        return content.removeprefix(b"\xef\xbb\xbf").decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 (byte {error.start}); save it as UTF-8") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{file} cannot be read: {error}") from error


def _json_lines(file: Path, text: str) -> Iterator[Row]:
    # Not splitlines(): a text may hold U+2028, which it takes for an end of line and JSON does not.
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield _json_row(f"{file} line {number}", line)


def _json_row(where: str, line: str) -> Row:
    try:
        return _row(where, json.loads(line), line)
    except (json.JSONDecodeError, RecursionError) as error:
        reason = f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else "too deep"
        return Row(where=where, value=None, problem=f"is not JSON ({reason}); write one JSON object a line", text=line)


def _row(where: str, value: Any, text: str) -> Row:
    if isinstance(value, dict):
        return Row(where=where, value=value)
    return Row(where=where, value=None, problem=f"holds a {type(value).__name__}; a row is a JSON object", text=text)


def _json_array(file: Path, text: str) -> Iterator[Row]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file} is not JSON ({error}); one object a line is called .jsonl") from error
    if not isinstance(content, list):
        raise DataError(f"{file} holds a {type(content).__name__}; a .json file of rows is one array of objects")
    for number, value in enumerate(content, start=1):
        yield _row(f"{file} item {number}", value, json.dumps(value, ensure_ascii=False))


def _delimited(file: Path, text: str, delimiter: str) -> Iterator[Row]:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, None)
        if not header or len(set(header)) != len(header):
            raise DataError(f"{file} line 1 must name each column once; it is {header}")
        begin = reader.line_num + 1
        for values in reader:
            where, begin = f"{file} line {begin}", reader.line_num + 1
            if not values:
                continue
            if len(values) == len(header):
                yield Row(where=where, value=dict(zip(header, values, strict=True)))
            else:
                problem = (
                    f"has {len(values)} fields and line 1 names {len(header)} columns; quote what holds a {delimiter!r}"
                )
                yield Row(where=where, value=None, problem=problem, text=delimiter.join(values))
    except csv.Error as error:
        raise DataError(
            f"{file} line {reader.line_num}: {error}; save it again as {file.suffix[1:].upper()}"
        ) from error


def _parquet(file: Path) -> Iterator[Row]:
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for batch in table.iter_batches():
                for value in batch.to_pylist():
                    number += 1
                    yield Row(where=f"{file} row {number}", value=value)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file} is no Parquet file that can be read: {error}") from error


def _saved_dataset(folder: Path) -> Iterator[Row]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except (OSError, ValueError) as error:
        raise DataError(
            f"{folder} is no folder that datasets.save_to_disk has written ({error}); name a file of the forms {FORMS}"
        ) from error
    yield from _dataset_rows(str(folder), found, split=None)


def _hub_dataset(name: str) -> Iterator[Row]:
    import datasets

    repository, _, split = name.partition(":")
    try:
        found = datasets.load_dataset(repository)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{name} is no file here, and the hub gives no data set of that name: {' '.join(str(error).split())[:300]}"
        ) from error
    yield from _dataset_rows(name, found, split=split or None)


def _dataset_rows(name: str, found: Any, *, split: str | None) -> Iterator[Row]:
    """The wanted split; without a word "train", or the only one."""
    if isinstance(found, dict):
        choice = split or ("train" if "train" in found else next(iter(found)) if len(found) == 1 else None)
        if choice not in found:
            raise DataError(
                f"{name} has the splits {', '.join(found)}; name one of them, as in NAME:{next(iter(found))}"
            )
        found = found[choice]
    rows: Iterable[Mapping[str, Any]] = found
    for number, value in enumerate(rows, start=1):
        yield Row(where=f"{name} row {number}", value=value)
