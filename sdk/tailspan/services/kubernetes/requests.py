"""`KubernetesRequests`: requests to the API server, and its replies that have no end: watches and followed logs."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from typing import Any, TypeVar

import msgspec

from tailspan.errors import AuthError, JobNotFoundError, ProtocolError, TailspanError
from tailspan.http.client import Reply
from tailspan.services._json_stream import decode_json
from tailspan.services._requests import Pace, Params, ServiceRequests
from tailspan.services.kubernetes.kubeconfig import Cluster, ClusterCredentials

__all__ = ["KubernetesRequests"]

# Older API servers send the head of a reply with the first line of the log.
_HEAD_S = 60.0

T = TypeVar("T")


class KubernetesRequests(ServiceRequests):
    """Requests to one API server."""

    def __init__(
        self,
        service: str,
        cluster: Cluster,
        credentials: ClusterCredentials,
        *,
        pace: Pace | None = None,
        **options: Any,
    ) -> None:
        """Open nothing yet.

        Args:
            service: Name of the configured service, for messages.
            cluster: The API server.
            credentials: What proves who asks.
            pace: Shared with other requests to this server.
            **options: As for `ServiceRequests`.
        """
        headers = {"Impersonate-User": cluster.acts_as} if cluster.acts_as else {}
        super().__init__(
            service, cluster.server, credentials, headers=headers, server_name=cluster.server_name, **options
        )
        self._pace = self.pace = pace or self._pace
        self._cluster = cluster
        self._cluster_credentials = credentials
        self._version = credentials.version

    async def decoded(self, path: str, kind: type[T], params: Params | None = None, *, job_id: str | None = None) -> T:
        """Return the reply to a GET as an object; see `ServiceRequests.get`.

        Raises:
            ProtocolError: It is something else.
        """
        body = await self.get(path, params, job_id=job_id)
        try:
            return decode_json(msgspec.json.Decoder(kind), body)
        except msgspec.DecodeError as error:
            raise self.protocol_error(f"GET {path}: the reply is not that of Kubernetes: {error}", job_id) from None

    def converted(self, reply: Any, kind: type[T], what: str, *, job_id: str | None = None) -> T:
        """Return a reply that was decoded as an object.

        Args:
            reply: What it is.
            kind: What it should be.
            what: The request, for the error.
            job_id: The job that the request is about.

        Raises:
            ProtocolError: It is something else.
        """
        try:
            return msgspec.convert(reply, kind)
        except msgspec.ValidationError as error:
            raise self.protocol_error(f"{what}: the reply is not that of Kubernetes: {error}", job_id) from None

    @asynccontextmanager
    async def stream(
        self, path: str, params: Params | None, *, job_id: str | None = None
    ) -> AsyncIterator[AsyncGenerator[bytes, None]]:
        """Open a reply and yield its pieces as they arrive, however long it lasts.

        Args:
            path: Below the base URL, escaped.
            params: The query.
            job_id: The job that the request is about.

        Raises:
            ServiceError: See the tree in `tailspan.errors`.
        """
        reply = self._reply("GET", path, params, job_id, also=("text/plain", "*/*"))
        try:
            async with asyncio.timeout(_HEAD_S):
                response = await reply.__aenter__()
        except TimeoutError:
            raise self._unavailable(f"GET {path}: no answer within {_HEAD_S:g} s", job_id) from None
        try:
            async with aclosing(self._pieces(response, "GET", path, job_id)) as pieces:
                yield pieces
        finally:
            await reply.__aexit__(None, None, None)

    def error_of(self, status: int, headers: Mapping[str, str], text: str, job_id: str | None) -> TailspanError | None:
        """Return the error for an answer with a meaning of its own here.

        403 of Kubernetes names the right that is missing: the token is accepted.
        """
        if status == 401:
            where = f"the credentials came from {self._cluster.source}"
            return AuthError(f"{text}; {where}", service=self._service, job_id=job_id)
        if status == 403:
            return AuthError(
                f"{text}; see the RBAC manifest in deploy/kubernetes", service=self._service, job_id=job_id
            )
        if status == 404 and job_id is not None:
            return JobNotFoundError(f"service {self._service} knows no job {job_id}: {text}", service=self._service)
        return None

    @asynccontextmanager
    async def _reply(self, *args: Any, **options: Any) -> AsyncIterator[Reply]:
        # What the TLS context needs, before a connection is opened.
        await self._cluster_credentials.prepare()
        if self._version != self._cluster_credentials.version:
            self._version = self._cluster_credentials.version
            # Replies that are open keep their connections, and the certificate that these began with.
            self._client = None
        async with super()._reply(*args, **options) as reply:
            yield reply

    def protocol_error(self, text: str, job_id: str | None) -> ProtocolError:
        """Return the error for a reply that does not match what this API sends."""
        hint = f"check the server {self._cluster.server} in {self._cluster.source}"
        return ProtocolError(f"{text}; {hint}", service=self._service, job_id=job_id)

    def _reason(self, error: Exception) -> str:
        # The keys of other services that have one are in the kubeconfig here.
        text, _, hint = super()._reason(error).partition(f"set services.{self._service}.")
        return f"{text}check the certificates in {self._cluster.source}" if hint else text

    def _tls(self) -> ssl.SSLContext | None:
        return self._cluster_credentials.tls()
