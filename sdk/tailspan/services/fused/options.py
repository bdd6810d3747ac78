"""The keys of a configured Fused service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field, SecretStr, model_validator

from tailspan.config import Options, PositiveDuration, UserPath, validate_options
from tailspan.errors import ConfigError
from tailspan.services.fused.auth import DEFAULT_SCHEME
from tailspan.services.fused.wire import DEFAULT_BASE_URL

__all__ = ["FusedOptions"]


class FusedOptions(Options):
    """The table ``services.NAME`` of type ``fused``."""

    base_url: str = DEFAULT_BASE_URL
    token: SecretStr | None = None
    token_file: UserPath | None = None
    scheme: str = Field(default=DEFAULT_SCHEME, pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")
    requests_per_second: float = Field(default=20.0, gt=0)
    timeout: PositiveDuration = 10.0
    ca_file: UserPath | None = None
    client_cert: UserPath | None = None
    client_key: UserPath | None = None

    @model_validator(mode="after")
    def _fits(self) -> FusedOptions:
        if self.token is not None and self.token_file is not None:
            raise ConfigError("token and token_file are both set: keep one of them")
        if self.client_key is not None and self.client_cert is None:
            raise ConfigError("client_key needs client_cert")
        return self

    @classmethod
    def read(cls, name: str, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return the arguments of `tailspan.services.fused.service.FusedService`.

        Raises:
            ConfigError: A key is unknown or a value is not valid.
        """
        found = validate_options(cls, f"services.{name}", options)
        return {
            "base_url": found.base_url,
            "token": None if found.token is None else found.token.get_secret_value(),
            "token_file": found.token_file,
            "scheme": found.scheme,
            "requests_per_second": found.requests_per_second,
            "timeout_s": found.timeout,
            "ca_file": found.ca_file,
            "client_cert": found.client_cert,
            "client_key": found.client_key,
        }
