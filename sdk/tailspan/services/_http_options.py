"""The keys that services over HTTP have in common, in the table ``services.NAME``."""

from __future__ import annotations

from typing import Self

from pydantic import Field, SecretStr, model_validator

from tailspan.config import Options, PositiveDuration, UserPath
from tailspan.errors import ConfigError

__all__ = ["HttpOptions", "LoginOptions"]


class HttpOptions(Options):
    """The keys of every service over HTTP."""

    base_url: str
    token: SecretStr | None = None
    token_file: UserPath | None = None
    requests_per_second: float = Field(default=10.0, gt=0)
    timeout: PositiveDuration = 10.0
    ca_file: UserPath | None = None
    client_cert: UserPath | None = None
    client_key: UserPath | None = None

    @model_validator(mode="after")
    def _fits(self) -> Self:
        self._only_one("token", "token_file")
        if self.client_key is not None and self.client_cert is None:
            raise ConfigError("client_key needs client_cert")
        return self

    def _only_one(self, one: str, other: str) -> None:
        if getattr(self, one) is not None and getattr(self, other) is not None:
            raise ConfigError(f"{one} and {other} are both set: keep one of them")


class LoginOptions(HttpOptions):
    """The keys of a service that also takes user and password."""

    user: str | None = None
    password: SecretStr | None = None
    password_file: UserPath | None = None

    @model_validator(mode="after")
    def _login_fits(self) -> Self:
        self._only_one("password", "password_file")
        self._only_one("token", "user")
        if (self.password is not None or self.password_file is not None) and self.user is None:
            raise ConfigError("password needs user")
        return self
