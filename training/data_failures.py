"""Data that one process of several can't read: all processes raise at the same batch, so that none waits for another."""

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from torch.utils.data import DataLoader

from samf.utils.distributed import Processes

T = TypeVar("T")
Fetch = Callable[[Callable[[], T]], T]


class DataFailureError(RuntimeError):
    """A process's data can't be read; raised on all processes."""


def fetch_together(fetch: Callable[[], T], processes: Processes) -> T:
    """Return what `fetch` returns; where it raises on one process, raise on all of them. Every process must call it.

    Raises:
        DataFailureError: `fetch` raised, here or on another process.
    """
    try:
        fetched = fetch()
    except Exception as error:
        processes.any(True)
        raise DataFailureError(f"Process {processes.rank}: {type(error).__name__}: {error}") from error
    if processes.any(False):
        raise DataFailureError("Another process's data can't be read; its message says which and why.")
    return fetched


class AgreedBatches:
    """The batches of a loader on several processes, which stop together where the data of one of them fails.

    All processes have the same number of batches; accelerate pads them to it.

    Args:
        loader: The loader; other attributes are its own.
        fetch: Calls a function on all processes and raises on all of them where it raises on one.
    """

    def __init__(self, loader: DataLoader, fetch: Fetch):
        self._loader, self._fetch = loader, fetch

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        batches, end = iter(self._loader), object()
        while (batch := self._fetch(lambda: next(batches, end))) is not end:
            yield batch
