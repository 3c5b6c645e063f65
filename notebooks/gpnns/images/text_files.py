"""Text files of any program, and values of tables, as text."""

from __future__ import annotations

import codecs
import io
import json
import math
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO


def read_json(path: Path) -> Any:
    """The content of a .json file; ValueError names a damaged one."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); correct it, or get it again") from error


AS_UTF8 = "save the file as UTF-8 (Excel: 'CSV UTF-8'; iconv -f CP1252 -t UTF-8)"


def read_text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a text file, one at a time: UTF-8, or UTF-16 with its mark (Excel's "Unicode text").

    Raises ValueError with file and line for another encoding: to guess it would change letters without a word.
    """
    with open(path, "rb") as file:
        yield from decode_lines(file, path)


def decode_lines(file: BinaryIO, where: str | Path) -> Iterator[str]:
    """The lines of an open file, like `read_text_lines`; `where` it lies, for the messages."""
    encoding = "utf-16" if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    file.seek(0)
    number = 0
    with io.TextIOWrapper(file, encoding) as text:
        try:
            for number, line in enumerate(text, 1):
                if "\0" in line:
                    raise ValueError(f"{where}, line {number} holds zero bytes: {AS_UTF8}")
                yield line
        except UnicodeDecodeError as error:
            broken = error.object[max(0, error.start - 12) : error.start + 4]
            said = f"is not {error.encoding} ({broken!r}): {AS_UTF8}"
            raise ValueError(f"{where}, after line {number}, {said}") from error


def decode_text(content: bytes, where: str) -> str:
    """The bytes of a text as a string, like `read_text_lines`."""
    return "".join(decode_lines(io.BytesIO(content), where))


def read_text(path: str | Path) -> str:
    """A text file as a whole, like `read_text_lines`."""
    return "".join(read_text_lines(path))


def to_printable(text: str | Path) -> str:
    """A name in the one form that is compared and shown: accents joined to their letters (NFC; file systems also
    store them apart), bytes that are no UTF-8 as \\xe9."""
    return unicodedata.normalize("NFC", os.fsencode(text).decode("utf-8", "backslashreplace"))


def to_text(value: object) -> str:
    """A value of a table or a JSON file as text: 3.0 is "3", what is missing (None, NaN) is "". ValueError for others."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError(f"a {type(value).__name__} ({str(value)[:60]}) where one text or number belongs")
    return unicodedata.normalize("NFC", str(value).strip())


def to_texts(value: object, between: str | None = None) -> list[str]:
    """Captions as a list of texts: one text, several with `between` between them, or a list of texts."""
    if isinstance(value, (list, tuple)):
        texts = [text for one in value for text in to_texts(one)]
    else:
        texts = to_text(value).split(between) if between else [to_text(value)]
    return [text.strip() for text in texts if text.strip()]
