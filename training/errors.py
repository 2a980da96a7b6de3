"""Errors of the training wing.

TrainingError
├── ConfigError   a field of the run's configuration is wrong
├── DataError     a row cannot be learnt from: names file, line and field
├── MethodError   the method does not fit this base
├── RunError      a run that had begun cannot go on
└── PublishError  the adapter is made, and did not get to where it was to be served
"""

from __future__ import annotations


class TrainingError(Exception):
    """Base of all errors a training run can be refused with."""


class ConfigError(TrainingError):
    """The configuration is wrong; the message names the fields, `field` the first of them."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class DataError(TrainingError):
    """The data cannot be used; the message names the file and the line."""


class MethodError(TrainingError):
    """The method cannot be applied to this base."""


class RunError(TrainingError):
    """The run cannot go on; the message says at which step, and what would help."""


class PublishError(TrainingError):
    """The adapter is on the disk, and the message says where and why it got no further."""
