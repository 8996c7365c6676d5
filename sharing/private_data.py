"""Keep this machine and the patients of a run out of what is pushed."""

import json
import os
import re
import tempfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from samf.sharing.errors import ShareError
from samf.utils.files import write_json

# Keys whose local path means nothing elsewhere, so that not even its last part is of use.
_ORIGINS = ("_name_or_path", "name_or_path", "is_local", "local_files_only", "_commit_hash")
# Somebody's home folder, on any system.
_HOME = re.compile(rb"(?:/home/|/Users/|\b[A-Za-z]:\\{1,2}Users\\{1,2})[\w.-]+")
_HEADER_BYTES = 8  # of a safetensors file: the length of its header
_SHORTEST_ID = 5  # shorter ids of patients are words like any other
_NOT_OF_THE_RUN = (".py", ".png")
_VOCABULARY = ("tokenizer.json", "vocab.json", "merges.txt", "added_tokens.json")
_WORD = re.compile(rb"[\w.-]+")
_ID_KEYS = ("patient_id", "scan_id", "volume_id", "id")


def scrub_json_files(folder: Path) -> None:
    """Replace the local paths in a folder's JSON files: by nothing where they say where something came from, else by names.

    The vocabulary in tokenizer.json isn't touched.
    """
    for path in sorted(folder.glob("*.json")):
        if path.is_symlink() or path.name == "tokenizer.json":
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        scrubbed = _scrubbed(content)
        if scrubbed != content:
            write_json(path, scrubbed)


def _scrubbed(value: Any) -> Any:
    if isinstance(value, dict):
        kept = {key: entry for key, entry in value.items() if not (key in _ORIGINS and _is_local(entry))}
        return {key: _scrubbed(entry) for key, entry in kept.items()}
    if isinstance(value, list):
        return [_scrubbed(entry) for entry in value]
    return PureWindowsPath(value).name if isinstance(value, str) and _is_path(value) else value  # either kind of path


def _is_local(value: Any) -> bool:
    """Return whether the value of a key of `_ORIGINS` belongs to this machine: a path, or the flags of a local load."""
    return isinstance(value, bool) or (isinstance(value, str) and _is_path(value))


def _is_path(text: str) -> bool:
    return bool(re.match(r"(?:/[\w.@-]+){2,}/?$|[A-Za-z]:[\\/]|~[\\/]|\\\\\w", text)) and "\n" not in text


def check_private_data(folder: Path, source: Path, pattern: str = "*") -> None:
    """Raise ShareError where a file to be pushed names a folder of this machine, or a scan or patient of the run.

    Weights are searched in their headers. Code is that of the package, whose examples may have any path and scan.

    Args:
        folder: what will be pushed.
        source: the run's folder, which may hold predictions.
        pattern: of the files that are looked at.
    """
    paths, ids = local_paths(source), patient_ids(source)
    words = {name for name in ids if _WORD.fullmatch(name)}
    for path in sorted(path for path in folder.rglob(pattern) if path.is_file() and path.suffix not in _NOT_OF_THE_RUN):
        content = _searchable(path)
        places = {
            "a folder of this machine": _start(paths.search(content)),
            "a home folder": _start(_HOME.search(content)),
            "a scan or patient": None if path.name in _VOCABULARY else _find_id(content, words, ids - words),
        }
        for what, place in places.items():
            if place is not None:
                line = content.count(b"\n", 0, place) + 1
                raise ShareError(
                    f"{path.relative_to(folder)}, line {line}: names {what}, and would be public. Remove it from "
                    f"{source / path.name if (source / path.name).exists() else 'the model'} and push again."
                )


def _start(match: re.Match[bytes] | None) -> int | None:
    return None if match is None else match.start()


def _searchable(path: Path) -> bytes:
    if path.suffix != ".safetensors":
        return path.read_bytes()
    with path.open("rb") as file:
        return file.read(int.from_bytes(file.read(_HEADER_BYTES), "little"))


def local_paths(source: Path) -> re.Pattern[bytes]:
    """Return an expression for the paths of this machine: the run's folder, the working folder, home, temporary files."""
    folders = {
        Path.home(),
        Path.cwd(),
        source.resolve(),
        source.resolve().parent,
        Path(tempfile.gettempdir()).resolve(),
    }
    named = sorted({str(path) for path in folders if len(path.parts) > 1}, key=len, reverse=True)
    forms = [form for name in named for form in dict.fromkeys((name, name.replace("\\", "\\\\")))]
    return re.compile(rb"(?<![\w./-])(?:" + b"|".join(re.escape(os.fsencode(form)) for form in forms) + rb")[/\\]\w")


def patient_ids(source: Path) -> set[bytes]:
    """Return the scans and patients that the run's predictions and failures name, without bare numbers.

    A number is also a size, a step or a token.
    """
    found = {name for path in _listings(source) for name in _ids_of(path)}
    return {name.encode() for name in found if len(name) >= _SHORTEST_ID and not name.isdigit()}


def _find_id(content: bytes, words: set[bytes], phrases: Collection[bytes]) -> int | None:
    """Return where a text names one of many ids, which are words or phrases; None = nowhere."""
    if words:
        for match in _WORD.finditer(content):
            if match[0] in words or match[0].rstrip(b".-") in words:
                return match.start()
    return next((place for name in phrases if (place := content.find(name)) >= 0), None)


def _listings(source: Path) -> Iterator[Path]:
    for pattern in ("*.jsonl", "*/*.jsonl", "*/*/*.jsonl"):
        yield from source.glob(pattern)


def _ids_of(path: Path) -> Iterable[str]:
    with path.open(encoding="utf-8", errors="replace") as lines:
        for line in lines:
            try:
                row = json.loads(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield from (str(row[key]) for key in _ID_KEYS if row.get(key))
