"""Files of records, such as pairs or captions: JSON, JSON lines, CSV or TSV."""

import contextlib
import csv
import io
import itertools
import json
from pathlib import Path

from common.cli import UserError, expecting


def read_text(path) -> str:
    with expecting(path, "text in UTF-8"):
        # Spreadsheets begin their files with a byte order mark.
        return Path(path).read_text(encoding="utf-8-sig")


def parse_records(path):
    """The JSON value in a file, or the list of the values of its lines, or the rows of its table,
    lists of str."""
    text = read_text(path)
    with expecting(path, "JSON, JSON lines, CSV or TSV"):
        if text.lstrip()[:1] in ("[", "{"):
            with contextlib.suppress(json.JSONDecodeError):
                return json.loads(text)
            records = []
            # Not splitlines(), which also splits at characters that JSON allows in a text.
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    with expecting(f"{path}, line {number}", "JSON, or a JSON value in each line"):
                        records.append(json.loads(line))
            return records
        delimiter = "\t" if "\t" in text.partition("\n")[0] else ","
        try:
            rows = list(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
            rows = [row for row in rows if row]
            # A cell that holds a tab runs from one stray quote to another, over lines.
            if delimiter == "," or not any("\t" in cell for row in rows for cell in row):
                return rows
        except csv.Error:
            if delimiter == ",":
                raise
        # In tab-separated sets such as GLUE's, quote characters quote nothing.
        return [line.rstrip("\r").split(delimiter) for line in text.split("\n") if line.strip()]


def read_records(path, fields: dict, bare_columns: int = 0) -> list[tuple[str, dict]]:
    """[(place, {field: value})] of a file, whatever its form; absent fields are absent.

    bare_columns: a table without names in its first row has this many columns, the first `fields`.
    """
    records = parse_records(path)
    if isinstance(records, dict):
        # A dict of numbered records, or a single line of JSON lines.
        values = list(records.values())
        records = values if all(isinstance(value, dict) for value in values) else [records]
    if records and isinstance(records[0], list):
        columns = [str(cell).strip().lower() for cell in records[0]]
        if set(columns) & set(itertools.chain(*fields.values())):
            records = records[1:]
        else:
            columns = list(fields)[:bare_columns]
        rows, records = records, []
        for number, row in enumerate(rows, 1):
            with expecting(f"{path}, row {number}", f"{len(columns)} cells at most, with quotes "
                                                    "around a text that holds the delimiter"):
                # Spreadsheets may end a row with empty cells.
                if any(row[len(columns):]):
                    raise ValueError(f"there are {len(row)}")
                records.append(dict(zip(columns, row)))
    found = []
    for number, record in enumerate(records, 1):
        place = f"{path}, record {number}"
        with expecting(place, f"fields such as {', '.join(list(fields)[:3])}"):
            record = {name.lower(): value for name, value in record.items()}
        # Reversed, since the last entry wins in a dict: the first of the names has precedence.
        found.append((place, {field: record[name] for field, names in fields.items()
                              for name in reversed(names) if name in record}))
    if not found:
        raise UserError(f"{path} is empty: expected {', '.join(list(fields)[:3])}")
    return found


def read_lines(path) -> list[str]:
    """The lines of a file that are not blank, of which there must be some."""
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty")
    return lines
