"""Errors of the base layer."""

from __future__ import annotations


class UnservableBase(Exception):
    """This base cannot be served; `reason` says what is in the way and what would be right."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
