"""The papers' tables (data/published) and the course's own, read from .csv files."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import gpnns_utils as gu

# --- the papers' tables ----------------------------------------------------------------------------------------------


def load_published(name: str) -> list[dict]:
    """A table of the papers, data/published/<name>.csv: one dict per row, numbers as float, empty cells as None."""
    path = gu.DATA / "published" / f"{name}.csv"
    if not path.exists():
        raise FileNotFoundError(
            f"no published table {name!r}; there are {', '.join(sorted(p.stem for p in path.parent.glob('*.csv')))}"
        )
    return read_numbers(path)


def read_numbers(path: Path) -> list[dict]:
    """A small table of the course, such as data/claims.csv: one dict per row, numbers as int or float, empty cells as None."""
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    return [{key: None if value == "" else parse_number(value) for key, value in row.items()} for row in rows]


def write_numbers(path: Path, rows: list[dict]) -> None:
    """Write rows of the same columns as a table that `read_numbers` reads, whole or not at all."""
    text = io.StringIO()
    table = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    gu.write_atomically(path, lambda file: file.write(text.getvalue().encode()))


def load_curve(name: str) -> list[dict]:
    """The points of one curve of data/claims_curves.csv, which `make claims` writes: {"curve", "line", "label", "x", "y", "low",
    "high"}."""
    return [row for row in read_numbers(gu.DATA / "claims_curves.csv") if row["curve"] == name]


def parse_number(text: str) -> float | int | str:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text
