"""A form, multipart/form-data, read as it arrives: what the uploads of adapters and files share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping

from python_multipart.multipart import MultipartParser, parse_options_header

from service.errors import InvalidRequest

MAX_BOUNDARY = 70  # RFC 2046, section 5.1.1


class StreamedForm(ABC):
    """Feeds a streaming parser. A part that is not among `names`, or comes twice, is refused.

    The part's own name decides; `known` says the names to whoever sent another.
    """

    def __init__(self, boundary: bytes, names: Collection[str], known: str) -> None:
        if len(boundary) > MAX_BOUNDARY:
            raise InvalidRequest(
                f"the form's boundary has {len(boundary)} bytes; should have at most {MAX_BOUNDARY}"
            )
        self._names, self._known = names, known
        self._seen: set[str] = set()
        self._part = ""
        self._header, self._value, self._disposition = bytearray(), bytearray(), b""
        self._complete = False
        self._parser = MultipartParser(
            boundary,
            {
                "on_part_begin": self._begin,
                "on_header_field": self._header_field,
                "on_header_value": self._header_value,
                "on_header_end": self._header_end,
                "on_headers_finished": self._headers_finished,
                "on_part_data": self._part_data,
                "on_end": self._end,
            },
        )

    @abstractmethod
    def opened(self, part: str, options: Mapping[bytes, bytes]) -> None:
        """A part begins; `options` are those of its Content-Disposition."""

    @abstractmethod
    def arrived(self, part: str, data: bytes) -> None:
        """More of a part."""

    def write(self, chunk: bytes) -> None:
        if chunk:
            self._parser.write(chunk)

    def finish(self) -> None:
        """Raise InvalidRequest when the last boundary has not come."""
        if not self._complete:
            raise InvalidRequest("the form ends before its last boundary: the upload was cut off")

    def require(self, names: Collection[str]) -> None:
        """Raise InvalidRequest when a part is missing."""
        for name in names:
            if name not in self._seen:
                raise InvalidRequest(f"the part {name!r} is missing", name)

    def _begin(self) -> None:
        self._part, self._disposition = "", b""

    def _header_field(self, data: bytes, start: int, end: int) -> None:
        self._header += data[start:end]

    def _header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def _header_end(self) -> None:
        if self._header.lower() == b"content-disposition":
            self._disposition = bytes(self._value)
        self._header.clear()
        self._value.clear()

    def _headers_finished(self) -> None:
        _, options = parse_options_header(self._disposition)
        name = options.get(b"name", b"").decode("latin-1")
        if name not in self._names:
            what = f"there is no part {name[:80]!r}; known are {self._known}"
            raise InvalidRequest(what, name[:80])
        if name in self._seen:
            raise InvalidRequest(f"the part {name!r} is there twice", name)
        self._seen.add(name)
        self._part = name
        self.opened(name, options)

    def _part_data(self, data: bytes, start: int, end: int) -> None:
        self.arrived(self._part, data[start:end])

    def _end(self) -> None:
        self._complete = True
