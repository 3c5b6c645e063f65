"""Text files of any program, and values of tables, as text."""

from __future__ import annotations

import codecs
import json
import math
import os
import unicodedata
from collections.abc import Iterator
from pathlib import Path


def read_json(path: Path):
    """The content of a .json file; ValueError names a damaged one."""
    text = read_text(path)
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is damaged ({error}); correct it, or get it again") from error


# --- texts -----------------------------------------------------------------------------------------------------------

MARKS = {  # what a program may write first, so that others know how it encodes letters; of UTF-32 the first half is UTF-16's
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


def find_encoding(begin: bytes) -> str:
    """UTF-8, or what a byte-order mark says (Excel's "Unicode text" is UTF-16)."""
    return next((name for mark, name in MARKS.items() if begin.startswith(mark)), "utf-8")


def read_text_lines(path: str | Path) -> Iterator[str]:
    """The lines of a text file, one at a time.

    Raises ValueError with file and line for another encoding: to guess it would change letters without a word.
    """
    with open(path, "rb") as file:
        encoding = find_encoding(file.read(4))
    number = 0
    with open(path, encoding=encoding) as file:
        try:
            for number, line in enumerate(file, 1):
                if "\0" in line:
                    raise ValueError(f"{path}, line {number} holds zero bytes: {AS_UTF8}")
                yield line
        except UnicodeDecodeError as error:
            raise ValueError(f"{path}, after line {number}, {explain_bad_text(error)}") from error


def decode_text(content: bytes, where: str) -> str:
    """The bytes of a text as a string, like `text_lines`; `where` they were found, for the message."""
    try:
        return content.decode(find_encoding(content))
    except UnicodeDecodeError as error:
        raise ValueError(f"{where} {explain_bad_text(error)}") from error


def explain_bad_text(error: UnicodeDecodeError) -> str:
    broken = error.object[max(0, error.start - 12) : error.start + 4]
    return f"is not {error.encoding} ({broken!r}): {AS_UTF8}"


AS_UTF8 = "save the file as UTF-8 (Excel: 'CSV UTF-8'; iconv -f CP1252 -t UTF-8)"


def read_text(path: str | Path) -> str:
    """A text file as a whole, read like `text_lines`."""
    return "".join(read_text_lines(path))


def to_printable(text: str | Path) -> str:
    """A name in the one form that is compared and shown: accents joined to their letters (NFC; file systems also
    store them apart), bytes that are no UTF-8 as \\xe9."""
    return unicodedata.normalize("NFC", os.fsencode(text).decode("utf-8", "backslashreplace"))


def to_text(value) -> str:
    """A value of a table or a JSON file as text: 3.0 is "3", what is missing (None, NaN) is "". ValueError for others."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, (str, int, float)) or isinstance(value, bool):
        raise ValueError(f"a {type(value).__name__} ({str(value)[:60]}) where one text or number belongs")
    return unicodedata.normalize("NFC", str(value).strip())


def to_texts(value, between: str | None = None) -> list[str]:
    """Captions as a list of texts: one text, several with `between` between them, or a list of texts."""
    if isinstance(value, (list, tuple)):
        texts = [text for one in value for text in to_texts(one)]
    else:
        texts = to_text(value).split(between) if between else [to_text(value)]
    return [text.strip() for text in texts if text.strip()]
