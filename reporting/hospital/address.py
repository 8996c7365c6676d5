"""Addresses of DICOM nodes as people write them: AE@host:port."""

import re
from dataclasses import dataclass

_ADDRESS = re.compile(r"(?P<title>[^@\\]{1,16})@(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:@/]+):(?P<port>[0-9]{1,5})", re.ASCII)


@dataclass(frozen=True)
class PeerAddress:
    """A DICOM node.

    Attributes:
        title: AE title.
        host: name or address.
        port: its port.
    """

    title: str
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> "PeerAddress":
        """Return the node of a text such as "PACS@10.0.0.5:104".

        Raises:
            ValueError: another text.
        """
        match = _ADDRESS.fullmatch(text)
        if match is None or not check_title(match["title"]) or not 0 < int(match["port"]) < 65536:
            raise ValueError(f"{text}: expected AE@host:port, such as PACS@10.0.0.5:104.")
        return cls(match["title"].strip(), match["host"].strip("[]"), int(match["port"]))

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{self.title}@{host}:{self.port}"


def check_title(title: str) -> bool:
    """Return whether a text is an AE title: 1 to 16 printable characters, not all blank, without a backslash."""
    return (
        0 < len(title) <= 16 and title.isascii() and title.isprintable() and "\\" not in title and bool(title.strip())
    )
