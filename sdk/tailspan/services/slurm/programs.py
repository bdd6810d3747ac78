"""Running Slurm's programs, and reading the tables that they print."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import anyio

from tailspan.errors import AuthError, JobNotFoundError, RequestRejectedError, ServiceError, ServiceUnavailableError
from tailspan.services.slurm.options import SlurmOptions

__all__ = ["AccountingDisabledError", "SlurmPrograms", "new_delimiter", "read_table"]


_CONF_FILES = ("/etc/slurm/slurm.conf", "/run/slurm/conf/slurm.conf", "/etc/slurm-llnl/slurm.conf")
_CLUSTER = re.compile(r"^\s*ClusterName\s*=\s*(\S+)", re.MULTILINE | re.IGNORECASE)
_MAX_CONF_BYTES = 4 << 20
_ERROR_CHARS = 500


class AccountingDisabledError(ServiceError):
    """The cluster keeps no accounting."""


class SlurmPrograms:
    """Runs Slurm's programs with a time limit, and translates their errors."""

    def __init__(self, name: str, options: SlurmOptions) -> None:
        """Run nothing yet."""
        self._name = name
        self._options = options

    def find(self, program: str) -> str | None:
        """Return where a program is; None if it is not installed."""
        directory = self._options.bin_dir
        return shutil.which(program, path=None if directory is None else str(directory))

    async def run(self, program: str, *arguments: str, text: bytes = b"", env: dict[str, str] | None = None) -> str:
        """Return what a program prints.

        Args:
            program: Its name.
            *arguments: Its arguments.
            text: Its standard input.
            env: Variables on top of the present environment.

        Raises:
            ServiceUnavailableError: The program is missing, or the controller does not answer.
            AuthError: Slurm does not allow it.
            JobNotFoundError: Slurm has no such job.
            RequestRejectedError: Slurm refuses it.
            AccountingDisabledError: It needs accounting, which the cluster does not keep.
        """
        found = self.find(program)
        if found is None:
            place = f"in {self._options.bin_dir}" if self._options.bin_dir else "in PATH"
            text_ = f"{program} is not {place}: install Slurm's client programs, or set services.{self._name}.bin_dir"
            raise ServiceUnavailableError(text_, service=self._name)
        try:
            with anyio.fail_after(self._options.timeout):
                done = await anyio.run_process([found, *arguments], input=text, check=False, env=self._environ(env))
        except TimeoutError:
            text_ = f"{program} did not answer within {self._options.timeout:g} s"
            raise ServiceUnavailableError(text_, service=self._name) from None
        except OSError as error:
            raise ServiceUnavailableError(f"{found}: {error.strerror}", service=self._name) from error
        if done.returncode:
            raise self._error(program, done.stderr.decode("utf-8", "replace").strip())
        return done.stdout.decode("utf-8", "replace")

    def _environ(self, more: dict[str, str] | None) -> dict[str, str]:
        # Formats that a user set for these programs would change their output.
        kept = {
            key: value for key, value in os.environ.items() if not key.startswith(("SQUEUE_", "SACCT_", "SCONTROL_"))
        }
        # UTC, because an hour that local time has twice is ambiguous.
        own = {"SLURM_TIME_FORMAT": "%s", "LC_ALL": "C", "TZ": "UTC0"} if more is None else more
        conf = self._options.slurm_conf
        return {**kept, **own, **({"SLURM_CONF": str(conf)} if conf is not None else {})}

    def _error(self, program: str, said: str) -> ServiceError:
        text, low = f"{program}: {said[-_ERROR_CHARS:] or 'it failed without a message'}", said.lower()
        if "accounting storage is disabled" in low:
            return AccountingDisabledError(text, service=self._name)
        if "invalid job id" in low:
            return JobNotFoundError(text, service=self._name)
        if "permission denied" in low or "authentication" in low or "protocol authentication" in low:
            return AuthError(text, service=self._name)
        if program in ("scancel", "sbatch") and "contact" not in low and "connect" not in low:
            return RequestRejectedError(text, service=self._name)
        return ServiceUnavailableError(text, service=self._name)

    def cluster_in_conf(self) -> str | None:
        """Return the cluster's name as the configuration file of this machine has it; None without one."""
        conf = self._options.slurm_conf or os.environ.get("SLURM_CONF")
        for path in [conf] if conf else _CONF_FILES:
            try:
                with Path(path).open("rb") as file:
                    match = _CLUSTER.search(file.read(_MAX_CONF_BYTES).decode("utf-8", "replace"))
            except OSError:
                continue
            if match is not None:
                return match[1].lower()
        return None


def new_delimiter() -> str:
    """Return what separates the fields of one table: names and comments of jobs cannot contain it."""
    return f"~{secrets.token_hex(8)}~"


def read_table(text: str, delimiter: str, fields: Sequence[str]) -> Iterator[dict[str, str]]:
    """Yield the rows of a table.

    A row ends with a newline, but a job's name can have newlines, too: only the delimiters count. So the first and the
    last field must not be free text. Lines before the table, such as those of a wrapper script, are not read.

    Args:
        text: The table.
        delimiter: Between the fields.
        fields: The names of the fields.
    """
    row: list[str] = []
    parts = text.split(delimiter)
    parts[0] = parts[0].rpartition("\n")[2]
    for part in parts:
        if len(row) < len(fields) - 1:
            row.append(part)
            continue
        last, _, first = part.partition("\n")
        yield dict(zip(fields, (*row, last), strict=True))
        row = [first]
