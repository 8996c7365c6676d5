"""Settings of the API and its limits."""

from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class ApiSettings:
    """What the API offers, and its limits.

    Attributes:
        model_id: the name by which clients call the model.
        keys: one of these is asked for as bearer token; none = no key is needed.
        max_upload: bytes of one volume, as a file.
        scan_folder: volumes below it may be named by their path; None = none may.
        queue: requests that may wait.
        batch: requests that are answered together.
        cached_scans: encoded scans that are kept for further questions.
        cached_bytes: memory that they may take together.
        max_question: characters of a question.
        body_seconds: time within which a request must have arrived.
    """

    model_id: str = "samf"
    keys: frozenset[str] = field(default_factory=frozenset)
    max_upload: int = 1 << 30
    scan_folder: Path | None = None
    queue: int = 32
    batch: int = 8
    cached_scans: int = 16
    cached_bytes: int = 256 << 20
    max_question: int = 4000
    body_seconds: float = 600.0

    @property
    def max_body(self) -> int:
        """Return the bytes of the largest request: a volume in base64 and some text."""
        return self.max_upload * 4 // 3 + (1 << 20)


def read_keys(path: Path) -> frozenset[str]:
    """Return the API keys in a file: one per line; blank lines and those that begin with # are left out.

    Raises:
        ValueError: the file can't be read or has no key.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(
            f"--api-key-file {path}: can't be read as text ({type(error).__name__}); expected one key per line."
        ) from error
    keys = frozenset(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ValueError(f"--api-key-file {path}: no key in it; expected one per line.")
    return keys
