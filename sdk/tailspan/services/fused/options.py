"""The keys of a configured Fused service."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import Field

from tailspan.config import validate_options
from tailspan.services._http_options import HttpOptions
from tailspan.services.fused.auth import DEFAULT_SCHEME
from tailspan.services.fused.wire import DEFAULT_BASE_URL

__all__ = ["FusedOptions"]


class FusedOptions(HttpOptions):
    """The table ``services.NAME`` of type ``fused``."""

    base_url: str = DEFAULT_BASE_URL
    scheme: str = Field(default=DEFAULT_SCHEME, pattern=r"^[!#$%&'*+.^_`|~0-9A-Za-z-]+$")
    requests_per_second: float = Field(default=20.0, gt=0)

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
