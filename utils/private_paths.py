"""Messages without the paths of this machine."""

import re
from collections.abc import Mapping
from pathlib import Path

# A path goes on until a blank or a mark of punctuation; a full stop ends it only where the sentence ends with it.
_TAIL = r"\S*?(?=[:,;)'\"\s]|\.(?:\s|$)|$)"


def without_paths(message: str, names: Mapping[Path, str]) -> str:
    """Return a message in which paths have other names.

    Args:
        message: of a reader.
        names: of files and folders, the more specific first; what is in a folder has its name, too.
    """
    for path, name in names.items():
        message = re.sub(rf"{re.escape(str(path))}(?=$|[/:,;)'\".\s]){_TAIL}", lambda _, name=name: name, message)
    return message
