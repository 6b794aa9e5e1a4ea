"""Errors of the training program whose message says it all."""

from __future__ import annotations


class ReportedError(RuntimeError):
    """Something that happened to a run and is no defect of the program."""
