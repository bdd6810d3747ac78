"""`Reflector`: keeps a copy of all jobs, or of all pods of jobs, by a list and a watch that goes on from it.

Source: kubernetes.io, "Kubernetes API Concepts": lists in chunks, watches, bookmarks, 410 Gone.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import msgspec

from tailspan.errors import AuthError, ProtocolError, RequestRejectedError, ServiceError
from tailspan.services._json_stream import decode_json
from tailspan.services.kubernetes.objects import ListMeta, WatchEvent, WatchObject
from tailspan.services.kubernetes.requests import KubernetesRequests
from tailspan.services.kubernetes.streams import retry_s

__all__ = ["Reflector", "list_all"]

_CHUNKS = (250, 50, 10)
_WATCH_S = 300
_GONE = 410
_LONGEST_RETRY_S = 15.0
# A watch that is opened again at once loses nothing; what is older than this is not shown as the present.
_MAX_AGE_S = 15.0

_log = logging.getLogger(__name__)

Item = TypeVar("Item")


class Page(Protocol[Item]):
    """A page of a list."""

    metadata: ListMeta
    items: list[Item]


class _Expired(Exception):
    """The watch cannot go on from this version."""


async def list_all(
    requests: KubernetesRequests, path: str, kind: type[Page[Item]], query: Mapping[str, str]
) -> tuple[list[Item], str]:
    """Return everything, and the version of the list, from which a watch goes on.

    Args:
        requests: Sends the requests.
        path: The collection.
        kind: The type of a page.
        query: The selectors.

    Raises:
        ServiceError: See the tree in `tailspan.errors`.
    """
    found: list[Item] = []
    token, chunks = "", list(_CHUNKS)
    while True:
        params = {**query, "limit": str(chunks[0])} | ({"continue": token} if token else {})
        try:
            page = await requests.decoded(path, kind, params)
        except ProtocolError:
            # Objects have up to 1.5 MB each, and a reply is read up to a limit.
            if len(chunks) == 1:
                raise
            chunks.pop(0)
            continue
        except RequestRejectedError as error:
            if error.status_code != _GONE or not token:
                raise
            # The list took longer than the server keeps its version: what it had may be gone by now.
            found, token = [], ""
            continue
        found += page.items
        token = page.metadata.continue_ or ""
        if not token:
            return found, page.metadata.resource_version


class Reflector(Generic[Item]):
    """A collection that is listed, then watched.

    Attributes:
        failure: Why the watch cannot be used: a right is missing.
        tried: Set once the collection was listed, or could not be.
    """

    def __init__(
        self,
        requests: KubernetesRequests,
        streams: KubernetesRequests,
        path: str,
        kinds: tuple[type[Item], type[Any]],
        query: Mapping[str, str],
        *,
        on_list: Callable[[Sequence[Item]], object],
        on_event: Callable[[str, Item], object],
    ) -> None:
        """Request nothing yet.

        Args:
            requests: Sends requests.
            streams: Opens replies without an end.
            path: The collection.
            kinds: The type of an item and of a page.
            query: The selectors.
            on_list: Called with all items of a list: others are gone.
            on_event: Called with ``ADDED``, ``MODIFIED`` or ``DELETED`` and an item.
        """
        self.failure: ServiceError | None = None
        self.tried = asyncio.Event()
        self._requests = requests
        self._streams = streams
        self._path = path
        self._item = msgspec.json.Decoder(kinds[0])
        self._page_kind = kinds[1]
        self._query = query
        self._on_list = on_list
        self._on_event = on_event
        self._event = msgspec.json.Decoder(WatchEvent)
        self._object = msgspec.json.Decoder(WatchObject)
        self._version = ""
        self._is_listed = False
        self._broken_at_s: float | None = None

    @property
    def is_current(self) -> bool:
        """Whether the copy is that of the present, give or take some seconds."""
        broken = self._broken_at_s
        return self._is_listed and (broken is None or time.monotonic() - broken < _MAX_AGE_S)

    async def run(self) -> None:
        """List and watch until cancelled, or until a right turns out to be missing."""
        failures = 0
        while True:
            begun_s = time.monotonic()
            try:
                if not self._version:
                    await self._list()
                await self._follow()
                # A server, or a proxy before it, that ends each watch at once must not be asked all the time.
                failures = 0 if time.monotonic() - begun_s > 1 else failures + 1
            except _Expired:
                self._version = ""
                failures += 1
            except (AuthError, RequestRejectedError) as error:
                if isinstance(error, RequestRejectedError) and error.status_code == _GONE:
                    self._version = ""
                    continue
                self.failure = error
                self.tried.set()
                return
            except ServiceError as error:
                _log.debug("watch of %s: %s", self._path, error)
                self._broken_at_s = self._broken_at_s or begun_s
                self.tried.set()
                failures = failures + 1 if time.monotonic() - begun_s < _LONGEST_RETRY_S else 1
            if failures:
                await asyncio.sleep(retry_s(failures))

    async def _list(self) -> None:
        found, version = await list_all(self._requests, self._path, self._page_kind, self._query)
        self._version, self._is_listed, self._broken_at_s = version, True, None
        self._on_list(found)
        self.tried.set()

    async def _follow(self) -> None:
        """Watch until the server ends the reply.

        Raises:
            _Expired: The server does not have the version any more.
            ServiceError: The reply broke off.
        """
        params = {**self._query, "watch": "true", "resourceVersion": self._version, "allowWatchBookmarks": "true"}
        # Not all watches of a service at one moment.
        params["timeoutSeconds"] = str(round(_WATCH_S * random.uniform(0.8, 1.2)))
        rest: list[bytes] = []
        async with self._streams.stream(self._path, params) as pieces:
            self._broken_at_s = None
            async for piece in pieces:
                *lines, last = piece.split(b"\n")
                for line in lines:
                    self._apply(b"".join((*rest, line)))
                    rest.clear()
                if last:
                    rest.append(last)

    def _apply(self, line: bytes) -> None:
        if not line.strip():
            return
        try:
            event = decode_json(self._event, line)
            known = decode_json(self._object, bytes(event.object))
            if event.type == "ERROR":
                if known.code == _GONE:
                    raise _Expired
                raise self._requests.protocol_error(f"watch of {self._path}: {known.message}", None)
            if event.type != "BOOKMARK":
                self._on_event(event.type, decode_json(self._item, bytes(event.object)))
        except msgspec.DecodeError as error:
            raise self._requests.protocol_error(f"watch of {self._path}: {error}", None) from None
        self._version = known.metadata.resource_version or self._version
