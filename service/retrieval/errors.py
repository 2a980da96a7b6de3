"""Errors of retrieval, and the one door to its optional packages.

RetrievalError (a ServiceError)
├── CollectionNotFound, DocumentNotFound   (404)
├── CollectionExists                       the name is taken (409)
├── EmbedderDiffers      the collection was made with another embedding model (409)
├── DocumentRefused      one document cannot be read (422)
├── EmbedderFailed       the embedding model or its server did not answer as it should (503)
├── RerankerFailed       nor did the reranker's (503)
├── CollectionUnavailable  the disk or the object store failed (503)
└── NotInstalled         the extra `rag` is missing (501)
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from base.extras import install
from service.errors import ServiceError


class RetrievalError(ServiceError):
    """Base of all errors of retrieval."""


class CollectionNotFound(RetrievalError):
    """No collection of this tenant has that name."""


class DocumentNotFound(RetrievalError):
    """The collection has no document of that id."""


class CollectionExists(RetrievalError):
    """The name is taken."""


class EmbedderDiffers(RetrievalError):
    """The collection's vectors were made by another model."""


class DocumentRefused(RetrievalError):
    """One document cannot be taken: `document` names it, the message says why."""

    def __init__(self, document: str, reason: str) -> None:
        super().__init__(f"document {document[:80]!r}: {reason}")
        self.document = document
        self.reason = reason


class EmbedderFailed(RetrievalError):
    """The embedding model could not be loaded, or its server did not answer as it should."""


class RerankerFailed(RetrievalError):
    """The reranker did not answer as it should."""


class CollectionUnavailable(RetrievalError):
    """Where collections are kept could not be read or written."""


class NotInstalled(RetrievalError):
    """A package of the extra `rag` is missing."""


def installed(module: str) -> Any:
    """A module of the extra `rag`, imported when it is first needed. Raises NotInstalled."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise NotInstalled(
            f"retrieval needs {error.name}, which is not installed: run "
            f"`{install('rag')}` and start the server again"
        ) from error
