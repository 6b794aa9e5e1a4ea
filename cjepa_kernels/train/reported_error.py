"""Errors of the training program whose message is all that a user needs."""

from __future__ import annotations


class ReportedError(RuntimeError):
    """A failure of a run that is not a defect of the program."""
