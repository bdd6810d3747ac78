"""Read the configuration file, whatever its path leads to: a file, a pipe, a device or a directory.

`tailspan run` imports this before it starts the command: nothing here may import slowly.
"""

from __future__ import annotations

import os
import select
import stat
import time

from tailspan.errors import ConfigError

__all__ = ["MAX_CONFIG_BYTES", "read_config_text"]

MAX_CONFIG_BYTES = 1 << 20
_WAIT_S = 5.0


def read_config_text(path: str) -> str:
    """Return the text of a configuration file.

    A pipe, such as ``<(...)`` of a shell, gets 5 s to deliver its text. A device without end is not read for ever.

    Args:
        path: The file.

    Raises:
        ConfigError: It cannot be read, is not UTF-8, or is larger than `MAX_CONFIG_BYTES`.
    """
    try:
        # A named pipe without a writer must not block here.
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
        try:
            data = _read_all(fd, path)
        finally:
            os.close(fd)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"there is no configuration file {path}: check --config or TAILSPAN_CONFIG") from None
    except IsADirectoryError:
        raise ConfigError(f"{path} is a directory: give the path of the TOML file") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise ConfigError(f"cannot read the configuration file {path!r}: {reason}") from None
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text (byte {error.start}): save it as UTF-8") from None


def _read_all(fd: int, path: str) -> bytes:
    deadline = time.monotonic() + _WAIT_S
    waits_for_writer = _is_named_pipe(fd)
    data = bytearray()
    while True:
        try:
            part = os.read(fd, 65536)
        except BlockingIOError:
            part = None
        if part:
            data += part
            waits_for_writer = False
        elif part is not None and not waits_for_writer:
            return bytes(data)
        if len(data) > MAX_CONFIG_BYTES:
            raise ConfigError(f"the configuration file {path} is larger than 1 MiB")
        if not part:
            _wait(fd, path, deadline)


def _wait(fd: int, path: str, deadline: float) -> None:
    left = deadline - time.monotonic()
    poller = select.poll()
    poller.register(fd, select.POLLIN)
    if left <= 0 or not poller.poll(left * 1000):
        raise ConfigError(f"the configuration file {path} is a pipe or device that sends nothing within {_WAIT_S:g} s")


def _is_named_pipe(fd: int) -> bool:
    """Return whether a pipe has a name: then nothing to read means that its writer has not come yet."""
    if not stat.S_ISFIFO(os.fstat(fd).st_mode):
        return False
    try:
        return not os.readlink(f"/proc/self/fd/{fd}").startswith("pipe:")
    except OSError:
        return True
