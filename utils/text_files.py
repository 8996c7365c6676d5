"""Text files from users, in UTF-8 or the encoding of their byte order mark; anything else is an error with a remedy.

Excel writes "CSV UTF-8" with a byte order mark, "Unicode text" as UTF-16 with tabs, and plain "CSV" in the code page of
the machine; PowerShell's `>` writes UTF-16. All but the code page are read. A code page is never guessed, because the same
bytes are other letters in another one.
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

# UTF-32 before UTF-16, because its little-endian mark begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_HEAD = 4096  # bytes searched for zeros, which UTF-16 without a mark has next to ASCII letters
_DELIMITERS = (",", ";", "\t")


class TextEncodingError(ValueError):
    """A text file that is neither UTF-8 nor in the encoding of its byte order mark; the message says how to convert it."""


def _text_encoding(head: bytes) -> str:
    """Return the encoding named by the byte order mark in the first four bytes or more of a text, else UTF-8."""
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), "utf-8")


def decode_text(data: bytes, source: str | os.PathLike) -> str:
    """Decode the bytes of a text file, without its byte order mark.

    Args:
        data: the whole file.
        source: its name in messages.

    Raises:
        TextEncodingError: the bytes don't fit the encoding; says where, and how to convert the file.
    """
    encoding = _text_encoding(data)
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        raise _explained(source, data, encoding, error) from error
    if encoding == "utf-8" and b"\0" in data[:_HEAD]:
        raise _without_mark(source, data)
    return text


def read_text(path: str | os.PathLike) -> str:
    """Return the content of a text file with "\\n" as line ends. Raises TextEncodingError or OSError."""
    return io.StringIO(decode_text(Path(path).read_bytes(), path), newline=None).read()


def read_lines(path: str | os.PathLike) -> list[str]:
    """Return the lines of a text file, split only at line ends; str.splitlines splits at other characters as well."""
    lines = read_text(path).split("\n")
    return lines[:-1] if lines[-1] == "" else lines


def read_json(path: str | os.PathLike) -> Any:
    """Return the value of a JSON file.

    Raises:
        ValueError: broken JSON, or an unknown encoding (TextEncodingError); names the file.
    """
    try:
        return json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}: not valid JSON ({error}). Check the file at that place, or write it again."
        ) from error


@contextmanager
def open_text(path: str | os.PathLike, newline: str | None = None) -> Iterator[TextIO]:
    """Open a text file for reading in pieces: a file too large for `read_text`, or one for the csv module.

    Args:
        path: the file.
        newline: as for `open`; "" for the csv module.

    Raises:
        TextEncodingError: within the block, when the bytes read don't fit the encoding.
    """
    with open(path, "rb") as stream:
        head = stream.read(_HEAD)
    encoding = _text_encoding(head)
    if encoding == "utf-8" and b"\0" in head:
        raise _without_mark(path, head)
    with open(path, encoding=encoding, newline=newline) as stream:
        try:
            yield stream
        except UnicodeDecodeError as error:
            raise _explained(path, Path(path).read_bytes(), encoding, error) from error


@contextmanager
def open_csv(path: str | os.PathLike) -> Iterator[csv.DictReader]:
    """Open a table with a header line as a DictReader.

    The delimiter is the comma, semicolon or tab that is most frequent in the header outside of quotes: Excel writes
    semicolons where the comma is the decimal sign, and tabs in "Unicode text".
    """
    with open_text(path, newline="") as stream:
        header = stream.readline()
        stream.seek(0)
        yield csv.DictReader(stream, delimiter=_delimiter(header))


def _delimiter(header: str) -> str:
    outside = "".join(header.split('"')[::2])
    return max(_DELIMITERS, key=outside.count)  # a comma where several are equally frequent


def _explained(source: str | os.PathLike, data: bytes, encoding: str, error: UnicodeDecodeError) -> TextEncodingError:
    """Return an error with the position in the whole file; the one of a stream counts from its last chunk."""
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
