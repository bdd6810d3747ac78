"""The keys of a section of type ``slurm``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from tailspan.config import Options, PositiveDuration, UserPath
from tailspan.config.fields import StrList
from tailspan.config.units import parse_duration_s

__all__ = ["SlurmOptions"]


class SlurmOptions(Options):
    """The keys of a section of type ``slurm``."""

    cluster: str | None = None
    users: StrList = Field(default_factory=list)
    partitions: StrList = Field(default_factory=list)
    accounting: bool | Literal["auto"] = "auto"
    refresh: PositiveDuration = 30.0
    history: PositiveDuration = parse_duration_s("1d")
    timeout: PositiveDuration = 60.0
    bin_dir: UserPath | None = None
    slurm_conf: UserPath | None = None
