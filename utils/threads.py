"""How the threads of a process wait for work."""

from collections.abc import MutableMapping


def let_idle_threads_sleep(environment: MutableMapping[str, str]) -> None:
    """Let torch's threads sleep between operations, in place of spinning; to be set before torch is imported.

    Where two libraries with threads of their own take turns, as with quantised weights, the threads of the one would
    otherwise keep the processor busy while the other computes.

    Args:
        environment: of the process that imports torch; a value that is there is kept.
    """
    environment.setdefault("OMP_WAIT_POLICY", "PASSIVE")
