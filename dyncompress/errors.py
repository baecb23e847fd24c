"""The errors users meet: one line each - what is wrong, where, and how to fix it."""


class DynCompressError(Exception):
    """The job failed for a reason the message states (exit status 1)."""


class RequestError(DynCompressError, ValueError):
    """The request was wrong: the message says what, where and how to fix it (exit status 2)."""
