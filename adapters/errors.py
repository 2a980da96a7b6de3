"""Errors of the adapter layer.

AdapterError
├── InvalidAdapter        the upload is refused: says which tensor or field, and what was expected
│   ├── UnsupportedMedia  pickle, archive: not safetensors (415)
│   └── TooLarge          over a size, tensor or rank limit (413)
├── InvalidChat           messages and chat template do not fit (422)
├── InvalidTemplate       a prompt template's definition is refused: says which field (422)
│   └── InvalidVariables  values that are not what a prompt template takes (422)
├── AdapterNotFound       no such name, version, alias or digest (404)
├── TemplateNotFound      no prompt template has this name, version or alias (404)
├── AdapterInUse          an alias, a pin or a running sequence still needs it (409)
│   └── TemplateInUse     an alias, or an adapter that was trained with it, needs it (409)
├── QuotaReached          the tenant may keep no more (429)
└── StoreUnavailable      disk or database failed; nothing was acknowledged (503)
    └── StoreFull         no space left (507)
"""

from __future__ import annotations


class AdapterError(Exception):
    """Base of all errors that concern one adapter."""


class InvalidAdapter(AdapterError):
    """The upload cannot be served as it is.

    `reason` says what was wrong and what would be right; `where` names the tensor or the field.
    """

    def __init__(self, reason: str, where: str | None = None) -> None:
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason
        self.where = where


class UnsupportedMedia(InvalidAdapter):
    """The weights are not a safetensors file."""


class TooLarge(InvalidAdapter):
    """A size, tensor or rank limit is exceeded."""


class InvalidChat(AdapterError):
    """The messages cannot be rendered by the chat template; the message says why."""


class InvalidTemplate(AdapterError):
    """A prompt template cannot be kept as it is. `where` names the field of its definition."""

    def __init__(self, reason: str, where: str | None = None) -> None:
        super().__init__(f"{where}: {reason}" if where else reason)
        self.reason = reason
        self.where = where


class InvalidVariables(InvalidTemplate):
    """A prompt template cannot be filled with these values. `where` names the variable."""


class TemplateNotFound(AdapterError):
    """No prompt template has this name, version or alias."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"template {reference[:200]!r} does not exist")
        self.reference = reference


class QuotaReached(AdapterError):
    """The tenant keeps as much as it may."""


class AdapterNotFound(AdapterError):
    """No adapter has this name, version, alias or digest."""

    def __init__(self, reference: str) -> None:
        super().__init__(f"adapter {reference!r} does not exist")
        self.reference = reference


class AdapterInUse(AdapterError):
    """The adapter cannot be removed now; the message names what needs it."""


class TemplateInUse(AdapterInUse):
    """The prompt template cannot be removed now; the message names what needs it."""


class Unkeepable(AdapterError):
    """The database has no place for such a value, so no row has it either."""


class StoreUnavailable(AdapterError):
    """The store could not complete a write or a read; nothing was acknowledged."""


class StoreFull(StoreUnavailable):
    """The disk, or the quota on it, has no space left."""
