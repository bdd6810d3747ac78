"""`AwsRequests`: signed requests to one API of AWS in one region, and `AwsAccount`: its credentials and endpoints.

botocore finds and refreshes the credentials and signs; its client is not used, which blocks a thread for each request.

Source: botocore 1.44.8 (credential chain, endpoints, the models of Batch, CloudWatch Logs and ECS).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, NamedTuple, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread
import msgspec
from pydantic import Field

from tailspan._backoff import parse_retry_after_s
from tailspan._secrets import add_secret
from tailspan.config import Options, PositiveDuration, UserPath
from tailspan.errors import (
    AuthError,
    ConfigError,
    JobNotFoundError,
    RequestRejectedError,
    ServiceUnavailableError,
    TailspanError,
)
from tailspan.http.client import BROKEN, NEVER_SENT, Reply
from tailspan.services._requests import (
    Authorization,
    Authorizer,
    Retries,
    ServiceRequests,
    Tls,
    encode_json,
    error_text,
    normalise_base_url,
)

__all__ = [
    "BATCH",
    "ECS",
    "LOGS",
    "Api",
    "AwsAccount",
    "AwsOptions",
    "AwsReply",
    "AwsRequests",
    "account_of",
    "console_of",
    "region_of",
]

T = TypeVar("T")

_MAX_REPLY_BYTES = 32 << 20  # FilterLogEvents has 1 MB of lines, and some hundred bytes for each of 10,000
_THROTTLED_TRIES = 4
_THROTTLED = (
    "Throttling",
    "ThrottlingException",
    "ThrottledException",
    "RequestThrottled",
    "RequestThrottledException",
    "TooManyRequestsException",
    "RequestLimitExceeded",
    "PriorRequestNotComplete",
)
_EXPIRED = (
    "ExpiredToken",
    "ExpiredTokenException",
    "RequestExpired",
    "InvalidClientTokenId",
    "InvalidToken",
    "UnrecognizedClientException",
    "TokenRefreshRequired",
)
_FORBIDDEN = (
    "AccessDenied",
    "AccessDeniedException",
    "UnauthorizedOperation",
    "MissingAuthenticationToken",
    "MissingAuthenticationTokenException",
    "IncompleteSignature",
    "IncompleteSignatureException",
    "InvalidSignatureException",
    "SignatureDoesNotMatch",
    "OptInRequired",
    "RequestTimeTooSkewed",
)


class AwsOptions(Options):
    """The keys of every service of AWS, in the table ``services.NAME``."""

    region: str | None = None
    profile: str | None = None
    endpoint_url: str | None = None
    requests_per_second: float = Field(default=5.0, gt=0)
    timeout: PositiveDuration = 10.0
    ca_file: UserPath | None = None


class Api(NamedTuple):
    """An API of AWS.

    Attributes:
        name: Its name in hosts, signatures and permissions.
        variable: What its variable ``AWS_ENDPOINT_URL_...`` ends with.
        target: The start of ``X-Amz-Target``; empty: each operation has a path.
    """

    name: str
    variable: str
    target: str = ""


BATCH = Api("batch", "BATCH")
LOGS = Api("logs", "CLOUDWATCH_LOGS", "Logs_20140328.")
ECS = Api("ecs", "ECS", "AmazonEC2ContainerServiceV20141113.")


class AwsReply(NamedTuple):
    """A reply.

    Attributes:
        body: Its JSON.
        at_ms: When the server made it by its own clock, in ms since the epoch, to the second.
    """

    body: dict[str, Any]
    at_ms: int


class _Refused(AuthError):
    """The credentials have expired, or are not known."""


def region_of(options: AwsOptions, environ: Mapping[str, str]) -> str | None:
    """Return the region: of the options, the environment, or the profile; None without one.

    Raises:
        ConfigError: botocore is not installed, or there is no such profile.
    """
    if importlib.util.find_spec("botocore") is None:
        raise ConfigError("this type needs botocore: pip install 'tailspan[aws]'", key="type")
    found = options.region or environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION")
    if found:
        return found
    from botocore.exceptions import BotoCoreError
    from botocore.session import Session

    try:
        region: str | None = Session(profile=options.profile).get_config_variable("region")
    except BotoCoreError as error:
        raise ConfigError(str(error), key="profile") from None
    return region


class AwsAccount:
    """The credentials and endpoints of one configured service. A constructor reads nothing."""

    def __init__(self, service: str, options: AwsOptions, environ: Mapping[str, str]) -> None:
        """Configure it.

        Args:
            service: The name of the configured service, for messages.
            options: Its options.
            environ: The environment; botocore reads that of the process.
        """
        self._service = service
        self._options = options
        self._environ = environ
        self._session: Any = None
        self._credentials: Any = None
        self._loading: anyio.Lock | None = None
        self._loop: object = None

    async def endpoint(self, api: Api, region: str) -> str:
        """Return the URL of an API.

        Raises:
            ConfigError: It is not a URL.
            RequestRejectedError: The API is not in this region.
        """
        own = self._options.endpoint_url or self._environ.get(f"AWS_ENDPOINT_URL_{api.variable}")
        own = own or self._environ.get("AWS_ENDPOINT_URL")
        if own:
            return normalise_base_url(own)
        return await self._in_thread(partial(self._find_endpoint, api, region))

    def _find_endpoint(self, api: Api, region: str) -> str:
        session = self._open_session()
        resolver = session.get_component("endpoint_resolver")
        options = {
            "use_fips_endpoint": bool(session.get_config_variable("use_fips_endpoint")),
            "use_dualstack_endpoint": bool(session.get_config_variable("use_dualstack_endpoint")),
        }
        found = resolver.construct_endpoint(api.name, region, **options)
        if not found:
            text = f"services.{self._service}.region: {region!r} has no endpoint of {api.name}"
            raise RequestRejectedError(text, service=self._service)
        return f"https://{found['hostname']}"

    async def credentials(self) -> Any:
        """Return the access key, the secret key and the token of the next request; refresh what is about to expire.

        Raises:
            AuthError: There are none, or they cannot be refreshed.
            ServiceUnavailableError: They could not be had now.
        """
        async with self._lock():
            known = self._credentials
            if known is None or getattr(known, "refresh_needed", bool)():
                return await self._in_thread(self._load)
            return known.get_frozen_credentials()

    async def renew(self, refused: Any) -> bool:
        """Search the chain again; return whether it has other credentials than those that were refused."""
        async with self._lock():
            # Of many requests that were refused, the first one renews.
            if self._credentials is not None and self._credentials.get_frozen_credentials() == refused:
                self._session = self._credentials = None
        current = await self.credentials()
        return bool(current != refused)

    def _lock(self) -> anyio.Lock:
        # Locks belong to an event loop.
        loop = anyio.lowlevel.current_token()
        if self._loading is None or self._loop != loop:
            self._loading, self._loop = anyio.Lock(), loop
        return self._loading

    def _open_session(self) -> Any:
        if self._session is None:
            from botocore.session import Session

            self._session = Session(profile=self._options.profile)
        return self._session

    def _load(self) -> Any:
        if self._credentials is None:
            self._credentials = self._open_session().get_credentials()
        if self._credentials is None:
            raise AuthError(
                f"there are no AWS credentials for service {self._service}: set services.{self._service}.profile or "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or run with a role (instance, task, web identity)",
                service=self._service,
            )
        frozen = self._credentials.get_frozen_credentials()
        for secret in (frozen.secret_key, frozen.token):
            if secret:
                add_secret(secret)
        return frozen

    async def _in_thread(self, work: Callable[[], T]) -> T:
        from botocore.exceptions import BotoCoreError, ClientError, HTTPClientError, MetadataRetrievalError

        try:
            return await anyio.to_thread.run_sync(work, abandon_on_cancel=True)
        except (HTTPClientError, MetadataRetrievalError) as error:
            text = f"AWS credentials could not be had now: {error}"
            raise ServiceUnavailableError(text, service=self._service) from None
        except (BotoCoreError, ClientError) as error:
            # For example an SSO login that is over, or a role that may not be assumed.
            raise AuthError(f"no AWS credentials: {error}", service=self._service) from None


class _Unsigned(Authorizer):
    """No header of its own: each request has a signature."""

    async def authorization(self) -> Authorization:
        """Return no header."""
        return Authorization("", "nowhere")

    async def renew(self, refused: Authorization) -> Authorization | None:
        """Return None."""
        return None


class AwsRequests(ServiceRequests):
    """Signed requests to one API in one region."""

    url_key = "endpoint_url"

    def __init__(
        self, service: str, api: Api, region: str, endpoint: str, account: AwsAccount, options: AwsOptions, tries: int
    ) -> None:
        """Open nothing yet.

        Args:
            service: The name of the configured service, for messages.
            api: The API.
            region: The region that signatures are for.
            endpoint: The URL of the API.
            account: Signs.
            options: The options of the service.
            tries: See `ServiceRequests`.
        """
        super().__init__(
            service,
            endpoint,
            _Unsigned(),
            timeout_s=options.timeout,
            tls=Tls(options.ca_file),
            requests_per_second=options.requests_per_second,
            tries=tries,
        )
        self._api = api
        self._region = region
        self._account = account

    async def call(
        self, operation: str, body: Mapping[str, Any], *, job_id: str | None = None, reads: bool = True
    ) -> AwsReply:
        """Call an operation.

        A request that was throttled had no effect, so it is sent again, whatever `tries` is: quotas are of the account,
        and other programs use them up.

        Args:
            operation: Its name.
            body: The parameters.
            job_id: The job that it is about.
            reads: Whether it only reads, and may be sent again.

        Raises:
            JobNotFoundError: The API does not know what the request names.
            ServiceError: See the tree in `tailspan.errors`.
        """
        content = encode_json(body)
        retries, throttled = Retries(self.tries), Retries(_THROTTLED_TRIES)
        while True:
            try:
                return await self._call_renewed(operation, content, job_id)
            except _ThrottledError as error:
                await throttled.wait(error)
            except ServiceUnavailableError as error:
                if not reads and not isinstance(error.__cause__, NEVER_SENT):
                    raise
                await retries.wait(error)

    async def _call_renewed(self, operation: str, content: bytes, job_id: str | None) -> AwsReply:
        credentials = await self._account.credentials()
        try:
            return await self._call(operation, content, job_id, credentials)
        except _Refused:
            if not await self._account.renew(credentials):
                raise
        return await self._call(operation, content, job_id, await self._account.credentials())

    async def _call(self, operation: str, content: bytes, job_id: str | None, credentials: Any) -> AwsReply:
        await self._pace.wait()
        path, headers = "/", {"Content-Type": "application/x-amz-json-1.1"}
        if self._api.target:
            headers["X-Amz-Target"] = self._api.target + operation
        else:
            path, headers = f"/v1/{operation.lower()}", {"Content-Type": "application/json"}
        signed = self._signed(path, headers, content, credentials)
        try:
            with anyio.fail_after(2 * self.timeout_s):
                reply, answer = await self._open_client().fetch(
                    "POST", path, headers=signed, content=content, max_bytes=_MAX_REPLY_BYTES
                )
        except BROKEN as error:
            text = f"{operation} at {self._base_url}: {self._reason(error)}"
            raise self._unavailable(text, job_id) from error
        except TimeoutError:
            text = f"{operation}: no complete answer within {2 * self.timeout_s:g} s"
            raise self._unavailable(text, job_id) from None
        if not reply.is_success:
            raise self._error_for(operation, reply, answer, job_id)
        decoded = self._json("POST", path, answer, job_id) if answer else {}
        if not isinstance(decoded, dict):
            raise self.protocol_error(f"{operation}: the reply is not a JSON object", job_id)
        return AwsReply(decoded, _date_ms(reply))

    def _signed(self, path: str, headers: Mapping[str, str], content: bytes, credentials: Any) -> dict[str, str]:
        from botocore.auth import SigV4Auth
        from botocore.awsrequest import AWSRequest

        request = AWSRequest("POST", self._base_url + path, headers=dict(headers), data=content)
        SigV4Auth(credentials, self._api.name, self._region).add_auth(request)
        return {name: str(value) for name, value in request.headers.items()}

    def _error_for(self, operation: str, reply: Reply, answer: bytes, job_id: str | None) -> TailspanError:
        code, detail = _error_of(reply, answer)
        text = f"{operation}: {code or reply.status}" + (f": {detail}" if detail else "")
        where = {"service": self._service, "job_id": job_id}
        if code in _THROTTLED or reply.status == 429:
            after_s = parse_retry_after_s(reply.headers.get("retry-after"), datetime.now(UTC))
            return _ThrottledError(text, retry_after_s=after_s, **where)
        if code in _EXPIRED:
            return _Refused(f"{text}; log in again, or check services.{self._service}.profile", **where)
        if code in _FORBIDDEN or (not code and reply.status in (401, 403)):
            denied = "denied" in code.lower() or not code
            hint = f"; it needs the permission {self._api.name}:{operation}" if denied else ""
            return AuthError(text + hint, **where)
        if reply.status == 408 or reply.status >= 500:
            return self._unavailable(text, job_id)
        if code in ("ResourceNotFoundException", "ClusterNotFoundException"):
            return JobNotFoundError(text, **where)
        return RequestRejectedError(text, status_code=reply.status, **where)


class _ThrottledError(ServiceUnavailableError):
    """The account's quota of requests is used up."""


def _error_of(reply: Reply, answer: bytes) -> tuple[str, str]:
    """Return the code and the text of an error; both may be empty."""
    code = reply.headers.get("x-amzn-errortype", "")
    try:
        body = msgspec.json.decode(answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        body = None
    detail = error_text(answer)
    if isinstance(body, dict):
        code = code or str(body.get("__type") or body.get("code") or "")
        if not detail and isinstance(body.get("Message"), str):
            detail = error_text(msgspec.json.encode({"message": body["Message"]}))
    # "com.amazonaws.logs#ThrottlingException:http://..."
    return code.partition(":")[0].rpartition("#")[2], detail


def _date_ms(reply: Reply) -> int:
    try:
        moment = parsedate_to_datetime(reply.headers.get("date", ""))
    except ValueError:
        moment = datetime.now(UTC)
    return int(moment.timestamp() * 1000)


def console_of(region: str) -> str:
    """Return the URL of the AWS console of a region."""
    domain = "aws.amazon.com"
    if region.startswith("cn-"):
        domain = "amazonaws.cn"
    elif region.startswith("us-gov-"):
        domain = "amazonaws-us-gov.com"
    return f"https://{region}.console.{domain}"


def account_of(arn: str) -> str | None:
    """Return the account of an ARN; None for other text."""
    parts = arn.split(":")
    return parts[4] if len(parts) > 5 and parts[0] == "arn" else None
