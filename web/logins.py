"""Who may log in to the page. Passwords come from a file or the environment: a command line can be seen by all users."""

import hmac
from collections.abc import Mapping
from pathlib import Path

VARIABLE = "SAMF_AUTH"


class LoginError(ValueError):
    """Log-ins that can't be used; the message says what to write."""


class Logins:
    """Names with their passwords.

    Args:
        passwords: by name.
    """

    def __init__(self, passwords: Mapping[str, str]):
        self._passwords = dict(passwords)

    @classmethod
    def parse(cls, text: str, source: str) -> "Logins":
        """Return the log-ins of a text with one USER:PASSWORD per line.

        Args:
            text: the lines; empty ones and those that begin with # are left out.
            source: its name in messages.

        Raises:
            LoginError: none, or a line of another form. The message has no password.
        """
        found: dict[str, str] = {}
        for number, line in enumerate(text.splitlines(), start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            name, colon, password = line.strip().partition(":")
            if not colon or not name or not password:
                raise LoginError(f"{source}, line {number}: expected USER:PASSWORD.")
            found[name] = password
        if not found:
            raise LoginError(f"{source}: no log-in in it; expected USER:PASSWORD, one per line.")
        return cls(found)

    @classmethod
    def read(cls, file: Path) -> "Logins":
        """Return the log-ins of a file.

        Raises:
            LoginError: it can't be read, or holds something else.
        """
        try:
            return cls.parse(file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise LoginError(f"{file}: can't be read as text; expected USER:PASSWORD, one per line.") from error

    def allow(self, name: str, password: str) -> bool:
        """Return whether a name and a password fit; how long it takes tells nothing of the password."""
        known = self._passwords.get(name)
        same = hmac.compare_digest((known or "").encode(), password.encode())
        return known is not None and same

    def __len__(self) -> int:
        return len(self._passwords)
