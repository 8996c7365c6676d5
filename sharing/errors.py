"""Errors of a push, each a message of one line."""


class ShareError(ValueError):
    """An input that can't be pushed: a folder, an option, a name on the Hub, missing rights."""


class UploadError(Exception):
    """An upload that broke; running the same command again continues it."""


class CheckError(Exception):
    """What is on the Hub differs from what was pushed, or doesn't load."""
