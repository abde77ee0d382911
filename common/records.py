"""Files of records, such as pairs or captions: JSON, JSON lines, CSV, TSV or plain lines."""

import contextlib
import csv
import io
import itertools
import json
import re
from pathlib import Path

from common.cli import UserError, expecting, note


def read_text(path) -> str:
    with expecting(path, "text in UTF-8"):
        # Spreadsheets begin their files with a byte order mark.
        return Path(path).read_text(encoding="utf-8-sig")


def parse_records(path):
    """A file's JSON value, or the list of its lines' values, or its table's rows, each a list of
    str."""
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
        reader = csv.reader(io.StringIO(text), delimiter=delimiter, strict=True,
                            skipinitialspace=delimiter == ",")
        try:
            rows = [row for row in reader if any(row)]
        except csv.Error as error:
            if delimiter == ",":
                raise ValueError(f"line {reader.line_num}: {error}") from None
        else:
            # A cell with a tab in it was read from one stray quote to another.
            if delimiter == "," or not any("\t" in cell for row in rows for cell in row):
                return rows
        # In tab-separated sets such as GLUE's, quote characters quote nothing.
        return [line.split("\t") for line in text.split("\n") if line.strip()]


def read_records(path, fields: dict, bare_columns: int = 0) -> list[tuple[str, dict]]:
    """[(place, {field: value})] of a file, whatever its form; absent fields are absent.

    fields: {field: the names that files have for it}, in any letter case; the first has precedence.
    bare_columns: a table without names in its first row has this many columns, the first `fields`.
    """
    records = parse_records(path)
    if isinstance(records, dict):
        # A dict of numbered records, or a single line of JSON lines.
        values = list(records.values())
        records = values if all(isinstance(value, dict) for value in values) else [records]
    known_names = set(itertools.chain(*fields.values()))
    if records and isinstance(records[0], list):
        columns = [str(cell).strip().lower() for cell in records[0]]
        if known_names.isdisjoint(columns):
            note(f"{path}: its first row names no known field, so it is read as data: {columns}")
            columns = list(fields)[:bare_columns]
        else:
            records = records[1:]
        rows, records = records, []
        for number, row in enumerate(rows, 1):
            with expecting(f"{path}, row {number}", f"{len(columns)} cells at most, with quotes "
                                                    "around a text that holds the delimiter"):
                # Spreadsheets may end a row with empty cells.
                if any(row[len(columns):]):
                    raise ValueError(f"there are {len(row)}")
                records.append(dict(zip(columns, row)))
    found, others = [], {}
    for number, record in enumerate(records, 1):
        place = f"{path}, record {number}"
        with expecting(place, f"fields such as {', '.join(list(fields)[:3])}"):
            record = {name.lower(): value for name, value in record.items()}
        others |= dict.fromkeys(record.keys() - known_names)
        # Reversed, since the last entry wins in a dict.
        found.append((place, {field: record[name] for field, names in fields.items()
                              for name in reversed(names) if name in record}))
    if not found:
        raise UserError(f"{path} is empty: expected {', '.join(list(fields)[:3])}")
    if others:
        note(f"{path}: fields that are not read: {', '.join(sorted(others))}")
    return found


def read_lines(path) -> list[str]:
    """The lines of a file that are not blank, of which there must be some."""
    lines = [line.strip() for line in read_text(path).split("\n") if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty")
    return lines


def fix_surrogates(text: str) -> str:
    """Replaces half surrogate pairs by ?. Captions cut in mid-emoji have them, and tokenizers
    refuse them."""
    return text.encode("utf-8", errors="replace").decode()


# A list of texts as str() writes it. List columns of CSV files and img2dataset's .txt have such.
PYTHON_LIST = re.compile(r"\[(['\"].*['\"])?\]\s*", re.DOTALL)


def checked_text(value) -> str:
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"{value!r} is no text")
    if PYTHON_LIST.fullmatch(value):
        raise ValueError(f"{value} is a list in Python's notation: write a row or a field for each "
                         "of its texts, or JSON")
    return fix_surrogates(value)


def checked_texts(value) -> list[str]:
    return [checked_text(text) for text in (value if isinstance(value, list) else [value])]


CAPTION_FIELDS = {"image": ["image", "filename", "file_name"],
                  "captions": ["captions", "caption", "sentences", "text"], "split": ["split"]}


def read_captions(path, split: str = "") -> list[tuple[str, str | None]]:
    """[(caption, image name, or None where none is named)] of COCO's JSON, of Karpathy's, or of
    records or rows. split: leaves out those that name another."""
    data = parse_records(path)
    with expecting(path, "captions: COCO's or Karpathy's JSON, or records of image and caption"):
        if isinstance(data, dict) and "annotations" in data:
            names = {image["id"]: image["file_name"] for image in data["images"]}
            records = [(path, {"image": names[annotation["image_id"]],
                               "captions": annotation["caption"]})
                       for annotation in data["annotations"]]
        elif isinstance(data, dict) and "images" in data:
            records = [(path, {"image": image["filename"], "captions": image["sentences"],
                               "split": image["split"]}) for image in data["images"]]
        else:
            records = read_records(path, CAPTION_FIELDS, bare_columns=2)
    captions = []
    for place, record in records:
        if split and record.get("split", split) != split:
            note(f"{path}: only the captions of the split {split} are read")
            continue
        with expecting(place, "a caption or several, and, where known, its image"):
            # Flickr's lines number the captions of an image: 1.jpg#0.
            image = record.get("image") and re.sub(r"(\.\w+)#\d+$", r"\1",
                                                   checked_text(record["image"]))
            texts = record["captions"]
            for text in texts if isinstance(texts, list) else [texts]:
                # Karpathy's sentences also hold their tokens.
                text = checked_text(text["raw"] if isinstance(text, dict) else text)
                captions.append((text, image))
    if not captions:
        of_split = f" of the split {split}" if split else ""
        raise UserError(f"{path}: there is no caption{of_split} in it")
    return captions
