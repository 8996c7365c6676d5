"""Text files that users bring: UTF-8, or what a byte order mark says; anything else is an error with a remedy.

Excel writes "CSV UTF-8" with a byte order mark, "Unicode text" as UTF-16 with tabs, and plain "CSV" in the code page of
the machine; PowerShell's `>` writes UTF-16. The first two are read as they are. A code page can't be told from the bytes,
so it is never guessed: in another one the same bytes are other letters.
"""

import codecs
import csv
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# The longer marks first: UTF-32-LE's begins with UTF-16-LE's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD = 4096  # bytes that tell UTF-16 without a mark: ASCII letters have a zero beside them
_DELIMITERS = (",", ";", "\t")


class TextEncodingError(ValueError):
    """A text file in an encoding that isn't UTF-8 and that no byte order mark names. The message says what to do."""


def text_encoding(head: bytes) -> str:
    """Return the encoding of a text that begins with these bytes (four or more): by its byte order mark, else UTF-8."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def decode_text(data: bytes, source: str | os.PathLike) -> str:
    """Decode a text file's bytes, without its byte order mark.

    Args:
        data: the whole file.
        source: what messages call it.

    Raises:
        TextEncodingError: the bytes are not in the encoding that the file claims; says where, and how to convert it.
    """
    encoding = text_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _explained(source, data, encoding, error) from error
    if encoding == "utf-8" and b"\0" in data[:_HEAD]:
        raise _without_mark(source, data)
    return text


def read_text(path: str | os.PathLike) -> str:
    """Return a text file's contents, line ends as "\\n". Raises TextEncodingError, OSError."""
    return io.StringIO(decode_text(Path(path).read_bytes(), path), newline=None).read()


def read_lines(path: str | os.PathLike) -> list[str]:
    """Return a text file's lines, split at line ends alone: str.splitlines also splits at others that texts contain."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_json(path: str | os.PathLike) -> Any:
    """Return a JSON file's value.

    Raises:
        ValueError: broken JSON, or another encoding (TextEncodingError); names the file.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}). Check the file at that place, or write it again."
        ) from error


@contextmanager
def open_text(path: str | os.PathLike, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for reading piece by piece; for files too large for `read_text`, and for the csv module.

    Args:
        path: the file.
        newline: as for `open`; "" for the csv module.

    Raises:
        TextEncodingError: while it is read within the block, as for `decode_text`.
    """
    with open(path, "rb") as stream:
        head = stream.read(_HEAD)
    encoding = text_encoding(head)
    if encoding == "utf-8" and b"\0" in head:
        raise _without_mark(path, head)
    with open(path, encoding=encoding, newline=newline) as stream:
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise _explained(path, Path(path).read_bytes(), encoding, error) from error


@contextmanager
def open_csv(path: str | os.PathLike) -> Iterator[csv.DictReader]:
    """Open a table with a header line: a DictReader of its rows, separated by commas, semicolons or tabs.

    Excel separates by semicolons where commas are decimal, and by tabs in "Unicode text". What occurs most often in the
    header line, outside of quotes, separates.
    """
    with open_text(path, newline="") as stream:
        header = stream.readline()
        stream.seek(0)
        yield csv.DictReader(stream, delimiter=_delimiter(header))


def _delimiter(header: str) -> str:
    outside = "".join(header.split('"')[::2])
    return max(_DELIMITERS, key=outside.count)  # the first of equals: a comma


def _explained(source: str | os.PathLike, data: bytes, encoding: str, error: UnicodeDecodeError) -> TextEncodingError:
    """Name the place in the whole file; the error of a stream counts from its last chunk."""
    try:
        data.decode(encoding)
    except UnicodeDecodeError as found:
        error = found
    if encoding not in ("utf-8", "utf-8-sig"):
        name = encoding.upper()
        return TextEncodingError(
            f"{source}: begins with the byte order mark of {name}, but what follows is not {name} ({error.reason}). It was "
            f"cut short or joined from several files: write it again, as UTF-8."
        )
    if b"\0" in data[:_HEAD]:
        return _without_mark(source, data)
    place = f"byte 0x{error.object[error.start]:02x} in line {error.object.count(10, 0, error.start) + 1}"
    guess = "Windows-1252, as of Excel's plain CSV, or another code page"
    return TextEncodingError(_message(source, place, guess, "WINDOWS-1252"))


def _without_mark(source: str | os.PathLike, data: bytes) -> TextEncodingError:
    name = "UTF-16LE" if data.find(0) % 2 else "UTF-16BE"
    return TextEncodingError(
        _message(source, "zero bytes among its letters", f"{name} without a byte order mark", name)
    )


def _message(source: str | os.PathLike, found: str, guess: str, name: str) -> str:
    return (
        f"{source}: not UTF-8 ({found}); it looks like {guess}. Expected UTF-8, or UTF-8, UTF-16 or UTF-32 with a byte "
        f"order mark. Save it as UTF-8 (in Excel: 'CSV UTF-8'), or convert it: iconv -f {name} -t UTF-8 OLD > NEW."
    )
