"""Which jobs the agent follows, and how: the table ``[agent]``."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal, Self
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, SecretStr, field_validator, model_validator

from tailspan._net import is_loopback, read_secret_file
from tailspan._secrets import add_secret
from tailspan.config.fields import Duration, JsonList, PositiveDuration, StrList, StrTable, UserPath
from tailspan.config.options import Options
from tailspan.config.units import platform_state_dir
from tailspan.errors import ConfigError

__all__ = ["AgentSettings", "Expect", "Watch"]

Severity = Literal["TRACE", "DEBUG", "INFO", "WARN", "ERROR", "FATAL"]

_UNIX = "unix:"
_URL_PATH = re.compile(r"(?:/[\w.~-]*)*", re.ASCII)
_SEVERITY_WORDS = {"WARNING": "WARN", "CRITICAL": "FATAL"}


class Watch(Options):
    """Which jobs of one service the agent follows, and how.

    Attributes:
        service: Name of a configured service; by default the default service.
        jobs: Ids of jobs to follow.
        discover: Whether to follow every job that the service lists.
        name: Glob on the job's name.
        exclude: Globs on the names of jobs to ignore.
        lookback: How old a finished job may be to be backfilled, in seconds.
        settle: How long lines may still arrive after the end of a job, in seconds.
        late_window: How late a line may become visible, in seconds.
        final_read: Whether to read the whole log of an ended job once more, if the service knows lines only by time.
        min_severity: Drop (and count) lines below this severity; lines without a known severity are kept.
        attributes: Added to the telemetry of these jobs.
    """

    service: str = ""
    jobs: StrList = []
    discover: bool = False
    name: str | None = None
    exclude: StrList = []
    lookback: Duration = 86400.0
    settle: Duration = 10.0
    late_window: Duration = 10.0
    final_read: bool = True
    min_severity: Severity | None = None
    attributes: StrTable = {}

    @field_validator("min_severity", mode="before")
    @classmethod
    def _severity_word(cls, value: object) -> object:
        return _SEVERITY_WORDS.get(value.upper(), value.upper()) if isinstance(value, str) else value


class Expect(Options):
    """A job that should run regularly; the agent reports a missing run.

    Attributes:
        name: The job's name.
        every: Longest time between two starts, in seconds.
        grace: How late a start may be, in seconds.
    """

    name: str
    every: PositiveDuration
    grace: Duration = 3600.0


def _listen_or_off(value: object) -> object:
    # An empty variable counts as unset, so the environment needs a word for it.
    return "" if isinstance(value, str) and value.lower() == "off" else value


class AgentSettings(Options):
    """The agent's own settings.

    Attributes:
        state_dir: Checkpoints, dead letters and files.
        listen: ``HOST:PORT`` of page and metrics, or ``unix:/PATH`` of a socket for this user only; empty, or ``off``
            in a file or variable: no server.
        token: Required by the page, metrics and deliveries.
        token_file: A file with that token, read when needed. Without both, the agent makes a token for its page.
        allowed_hosts: More names that the page accepts in the Host header.
        public_url: The URL of the page behind a proxy, with its path; with https, session cookies are ``Secure``.
        allow_cancel: Whether the status page may cancel jobs.
        drain_timeout: How long to wait for exports at shutdown, in seconds.
        max_log_names: Number of names that logs may have at a time; the logs of further jobs share ``#other#``.
        max_pipeline_names: Number of pipeline names in metrics; further ones are counted as ``#other#``.
        max_task_names: Number of task names in metrics, of all pipelines; further ones are counted as ``#other#``.
        run_id_on_metrics: Whether gauges have the job id as an attribute.
        service_name: ``service.name`` of the agent's own telemetry.
        watch: Which jobs to follow; the first match wins.
        expect: Jobs that should run regularly.
    """

    state_dir: UserPath = Field(default_factory=lambda: platform_state_dir() / "agent")
    listen: Annotated[str, BeforeValidator(_listen_or_off)] = "127.0.0.1:8797"
    token: SecretStr | None = None
    token_file: UserPath | None = None
    allowed_hosts: StrList = []
    public_url: str | None = None
    allow_cancel: bool = False
    drain_timeout: Duration = 30.0
    max_log_names: int = Field(default=4000, ge=1)
    max_pipeline_names: int = Field(default=200, ge=1)
    max_task_names: int = Field(default=500, ge=1)
    run_id_on_metrics: bool = False
    service_name: str = Field(default="tailspan-agent", min_length=1)
    watch: Annotated[list[Watch], JsonList] = []
    expect: Annotated[list[Expect], JsonList] = []

    @property
    def listen_address(self) -> tuple[str, int] | None:
        """Host and port to listen on, port 0 for any free one; None if `listen` is empty or names a socket."""
        if not self.listen or self.listen_socket is not None:
            return None
        parts = urlsplit(f"//{self.listen}")
        return parts.hostname or "0.0.0.0", parts.port or 0  # noqa: S104 - an empty host means all interfaces

    @property
    def listen_socket(self) -> Path | None:
        """The Unix domain socket to listen on, if `listen` names one."""
        path = self.listen.removeprefix(_UNIX)
        return Path(path).expanduser() if path != self.listen else None

    @property
    def page_token_file(self) -> Path:
        """The file with the token that the agent makes for its page."""
        return self.state_dir / "page-token"

    def read_token(self) -> str | None:
        """Return the configured token, from `token_file` if set; None without a token.

        Raises:
            ConfigError: The file cannot be read.
        """
        token = self.token.get_secret_value() if self.token else None
        if self.token_file is not None:
            token = read_secret_file(self.token_file, key="agent.token_file")
        add_secret(token or "")
        return token

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.listen_socket is not None:
            if not self.listen_socket.is_absolute():
                raise ConfigError('expected "unix:/PATH"', key="agent.listen")
            self._check_public_url()
            return self._check_watches()
        try:
            valid = not self.listen or urlsplit(f"//{self.listen}").port is not None
            address = self.listen_address
        except ValueError:
            valid, address = False, None
        if not valid or "/" in self.listen or "@" in self.listen:
            raise ConfigError('expected "HOST:PORT", "unix:/PATH", or "off" for no page', key="agent.listen")
        if self.token is not None and self.token_file is not None:
            raise ConfigError("token and token_file are both set: keep one of them", key="agent.token")
        if address and not is_loopback(address[0]) and self.token is None and self.token_file is None:
            raise ConfigError(
                f"{self.listen} can be reached from other machines: set agent.token_file, or listen on 127.0.0.1",
                key="agent.listen",
            )
        self._check_public_url()
        return self._check_watches()

    def _check_public_url(self) -> None:
        if self.public_url is None:
            return
        try:
            parts = urlsplit(self.public_url)
            valid = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
        except ValueError:
            valid = False
        if not valid or not _URL_PATH.fullmatch(parts.path) or parts.query or parts.fragment or "@" in parts.netloc:
            raise ConfigError('expected "https://HOST" or "https://HOST/PATH"', key="agent.public_url")

    def _check_watches(self) -> Self:
        for number, watch in enumerate(self.watch):
            if not watch.jobs and not watch.discover:
                raise ConfigError("name jobs = [...], or set discover = true", key=f"agent.watch[{number}]")
        return self
