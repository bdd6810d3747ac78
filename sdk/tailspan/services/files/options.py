"""The keys of a section of type ``files``, and what the presets set."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from tailspan.config import Duration, Options, UserPath
from tailspan.config.fields import StrList
from tailspan.errors import ConfigError

__all__ = ["END_GROUPS", "FilesOptions"]

END_GROUPS = ("exit_code", "signal", "succeeded", "failed", "canceled", "timed_out", "end")
"""The named groups of ``end_marker``; see `tailspan.services.files.ends`."""

_HOUR_S, _DAY_S = 3600.0, 86400.0

_NOT_STARTED = r"(?:(?:Missing(?:Input|Rule)|IncompleteFiles|AmbiguousRule|CyclicGraph|Lock)Exception|WorkflowError)\b"
# Sources: Nextflow's wrapper script (command-run.txt); Snakemake's logger, versions 7 to 9; LSF, `bsub -o`.
_PRESETS: Mapping[str, Mapping[str, Any]] = {
    "nextflow": {
        "glob": ["**/.command.log"],
        "name_file": ".command.run",
        "name": r"^(?:# NEXTFLOW TASK: |### name: ')(?P<name>[^\s('\"]+)",
        "start_file": ".command.begin",
        "exit_file": ".exitcode",
    },
    "snakemake": {
        "glob": ["**/.snakemake/log/*.snakemake.log"],
        "name": r"(?P<name>[^/]*)/?\.snakemake/log/(?P<started>[-0-9T.]+)\.snakemake\.log$",
        # What keeps a run from starting is the last that its log has; other exceptions are those of one rule.
        "end_marker": rf"(?P<end>^Complete log(?:\(s\))?: |^Nothing to be done|^(?={_NOT_STARTED}))"
        rf"|(?P<failed>^Exiting because a job execution failed|^{_NOT_STARTED})"
        r"|(?P<canceled>^Terminating processes on user request)"
        r"|(?P<succeeded>\(100%\) done)",
    },
    "lsf": {
        "glob": ["**/*.out", "**/*.lsf"],
        "end_marker": r"(?P<end>^The output \(if any\) (?:is above this job summary|follows):?)"
        r"|(?P<succeeded>^Successfully completed\.)|^Exited with exit code (?P<exit_code>\d+)\."
        r"|^Exited by signal (?P<signal>\d+)\.|(?P<timed_out>^TERM_(?:RUNLIMIT|CPULIMIT|DEADLINE))"
        r"|(?P<canceled>^TERM_(?:OWNER|ADMIN|FORCE_OWNER|FORCE_ADMIN))",
    },
}


class FilesOptions(Options):
    """The keys of a section of type ``files``."""

    root: UserPath
    preset: Literal["nextflow", "snakemake", "lsf"] | None = None
    glob: StrList = Field(default=["**/*.log"], min_length=1)
    runs: Literal["file", "truncate", "append"] = "file"
    name: str | None = None
    name_file: str | None = None
    start_file: str | None = None
    exit_file: str | None = None
    end_marker: str | None = None
    silence: Duration | None = None
    silence_state: Literal["SUCCEEDED", "FAILED", "LOST"] | None = None
    host: str | None = None
    state_dir: UserPath | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_preset(cls, given: Any) -> Any:
        if not isinstance(given, Mapping) or not isinstance(preset := given.get("preset"), str):
            return given
        return {**_PRESETS.get(preset, {}), **given}

    @field_validator("glob")
    @classmethod
    def _below_root(cls, globs: list[str]) -> list[str]:
        for glob in globs:
            if glob.startswith("/") or ".." in glob.split("/") or not glob:
                raise ConfigError(f"expected a pattern of paths below root, got {glob!r}")
        return globs

    @field_validator("name", "end_marker")
    @classmethod
    def _is_regex(cls, regex: str | None) -> str | None:
        try:
            re.compile(regex or "")
        except re.error as error:
            raise ConfigError(f"not a regular expression: {error}") from None
        return regex

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.runs == "append" and self.end_marker is None:
            raise ConfigError('runs = "append" needs end_marker: it separates the runs of a file')
        if self.runs == "append" and self.exit_file is not None:
            raise ConfigError('runs = "append" takes no exit_file: it would not say which run has ended')
        if self.name_file is not None and self.name is None:
            raise ConfigError("name_file needs name: a regular expression with the group name")
        groups = re.compile(self.end_marker or "").groupindex
        if unknown := sorted(set(groups) - set(END_GROUPS)):
            raise ConfigError(f"end_marker has the group {unknown[0]}; known are {', '.join(END_GROUPS)}")
        return self

    @property
    def marks_end(self) -> bool:
        """Whether the end of a run is marked, by a line or by a file."""
        return self.end_marker is not None or self.exit_file is not None

    @property
    def silence_s(self) -> float:
        """After how many seconds without a write a run counts as ended; 0: never."""
        return self.silence if self.silence is not None else _DAY_S if self.marks_end else _HOUR_S
