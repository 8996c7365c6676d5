"""Tables and lists at addresses: which they are, their local copies, and what is next to them."""

import posixpath
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath

from samf.data.ct_rate.sources import is_hub_name
from samf.data.file_kinds import has_volume_suffix
from samf.model.ct_download import file_path, is_address, local_path, redacted

TABLE_SUFFIXES = (".csv", ".tsv", ".json", ".jsonl", ".parquet")


def address_suffix(address: str) -> str:
    """Return the ending of an address's file name, in lower case; its query doesn't count."""
    return PurePosixPath(redacted(address)).suffix.lower()


def is_file_address(source: object) -> bool:
    """Return whether `source` is the address of a file or folder, and not of a whole data set on the Hub."""
    return is_address(source) and not is_hub_name(str(source))


def names_file(address: str) -> bool:
    """Return whether an address's ending is that of a table, a list or a volume; folders may have other dots."""
    return address_suffix(address) in (*TABLE_SUFFIXES, ".txt") or has_volume_suffix(redacted(address))


@contextmanager
def local_table(source: str | Path) -> Iterator[Path]:
    """Yield the local path of a table or list, which is fetched if it is an address; errors of the block name the address.

    Args:
        source: a path or address.

    Raises:
        CTReadError: not to be fetched; the message says why.
    """
    source = file_path(str(source))
    if not is_file_address(source):
        yield Path(source).expanduser()
        return
    path = local_path(source, keep_name=True)
    try:
        yield path
    except (ValueError, OSError) as error:
        if str(path) not in str(error):
            raise
        kind = OSError if isinstance(error, OSError) else ValueError
        raise kind(str(error).replace(str(path), redacted(source))) from error


def folder_of(address: str) -> str:
    """Return the address of the folder that a file is in."""
    return (
        redacted(address).rstrip("/").rpartition("/")[0] if address.startswith("http") else address.rpartition("/")[0]
    )


def join_address(folder: str, name: str) -> str:
    """Return the address of a file by its path below a folder.

    Args:
        folder: the folder's address.
        name: the path, which may begin with "../".
    """
    scheme, _, path = folder.partition("://")
    name = urllib.parse.quote(name) if scheme.lower().startswith("http") else name
    return f"{scheme}://{posixpath.normpath(f'{path}/{name}')}"
