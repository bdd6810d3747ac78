"""A fleet of agents that share jobs through PostgreSQL: the table ``[fleet]``."""

from __future__ import annotations

from typing import Self

from pydantic import Field, SecretStr, model_validator

from tailspan._net import read_secret_file
from tailspan._secrets import add_secret
from tailspan.config.fields import PositiveDuration, UserPath
from tailspan.config.options import Options
from tailspan.errors import ConfigError

__all__ = ["FleetSettings"]

_SHORTEST_LEASE_S = 1.0


class FleetSettings(Options):
    """The database that the agents of a fleet share. Without `dsn` and `dsn_file` the agent is alone.

    Attributes:
        dsn: The connection string of libpq: ``postgresql://...`` or ``host=... dbname=...``.
        dsn_file: A file with it.
        name: The fleet's name: several fleets may use one database.
        lease: How long an agent may be silent before others take its jobs, in seconds.
    """

    dsn: SecretStr | None = None
    dsn_file: UserPath | None = None
    name: str = Field(default="default", pattern=r"^[a-z][a-z0-9_]{0,39}$")
    lease: PositiveDuration = 15.0

    @property
    def is_used(self) -> bool:
        """Whether the agent belongs to a fleet."""
        return self.dsn is not None or self.dsn_file is not None

    def read_dsn(self) -> str:
        """Return the connection string.

        Raises:
            ConfigError: The file cannot be read.
        """
        if self.dsn_file is not None:
            dsn = read_secret_file(self.dsn_file, key="fleet.dsn_file")
        else:
            dsn = self.dsn.get_secret_value() if self.dsn is not None else ""
        add_secret(dsn)
        return dsn

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.dsn is not None and self.dsn_file is not None:
            raise ConfigError("dsn and dsn_file are both set: keep one of them", key="fleet.dsn")
        if self.lease < _SHORTEST_LEASE_S:
            raise ConfigError(f"expected {_SHORTEST_LEASE_S:g} s or more", key="fleet.lease")
        return self
