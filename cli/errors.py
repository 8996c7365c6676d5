"""Errors of the `samf` command and its exit codes."""

import logging
import sys

import typer

# Loggers of libraries that write about themselves.
CHATTY = ("bitsandbytes", "httpx", "huggingface_hub", "torch.utils._pytree", "torchao", "transformers")
SOME_FAILED, ALL_FAILED = 1, 2


class UsageError(Exception):
    """An input that nothing can be done with; the message goes to the user as one line."""


def one_line(message: object) -> str:
    """Return a message without line breaks."""
    return " ".join(str(message).split())


def log_errors_only() -> None:
    """Show errors that are logged, but not warnings: those about a scan are collected with its report or facts.

    Call it before libraries are imported, since some of them write about themselves when they are.
    """
    shown = logging.StreamHandler()
    shown.setLevel(logging.ERROR)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(message)s", handlers=[shown])
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)


def exit_with(error: Exception) -> typer.Exit:
    """Write an error as one line and return what ends the command with exit code 2."""
    sys.stderr.write(f"samf: {one_line(error)}\n")
    return typer.Exit(ALL_FAILED)
