"""A failed command: its exit code, and one line that says why. Without click, which some commands run without."""

from __future__ import annotations

import errno
import sys

from tailspan.errors import AuthError, ConfigError, JobNotFoundError, ServiceError, TailspanError, WaitTimeoutError

__all__ = ["EXIT_ERROR", "EXIT_INTERRUPTED", "EXIT_TIMEOUT", "exit_code_of", "explain", "report"]

EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_UNREACHABLE = 3
EXIT_NO_SUCH_JOB = 4
EXIT_TIMEOUT = 124
EXIT_INTERRUPTED = 130

_EXTRAS = {
    **dict.fromkeys(("google", "grpc", "isal", "jinja2", "opentelemetry", "prometheus_client", "websockets"), "agent"),
    **dict.fromkeys(("starlette", "uvicorn"), "serve"),
    "botocore": "aws",
    "psycopg": "fleet",
    "yaml": "kubernetes",
    "zstandard": "zstd",
}
"""The extra that installs a package, by the package's name in imports."""


def exit_code_of(error: TailspanError) -> int:
    """Return the exit code of this error.

    An error class of another package, such as the agent, may have its own ``exit_code``.
    """
    own = getattr(error, "exit_code", None)
    if isinstance(own, int):
        return own
    for kinds, code in (
        ((ConfigError, AuthError), EXIT_USAGE),
        (JobNotFoundError, EXIT_NO_SUCH_JOB),
        (ServiceError, EXIT_UNREACHABLE),
        (WaitTimeoutError, EXIT_TIMEOUT),
    ):
        if isinstance(error, kinds):
            return code
    return EXIT_ERROR


def report(error: Exception) -> None:
    """Print an error in one line."""
    from tailspan.logs.clean import printable

    if sys.stderr is not None:
        # A server's own message is part of it: it must not act on the terminal.
        sys.stderr.write(f"tailspan: {printable(' '.join(str(error).split()), colours=False)}\n")
        sys.stderr.flush()


def explain(error: BaseException, command: str | None) -> int:
    """Print why a command failed, and return its exit code.

    Args:
        error: What ended it.
        command: Its name, such as ``agent``.

    Raises:
        BaseException: The error itself, where it is an error of ours, or of a reader that has gone.
    """
    if isinstance(error, TailspanError):
        report(error)
        return exit_code_of(error)
    if isinstance(error, KeyboardInterrupt):
        return EXIT_INTERRUPTED
    if isinstance(error, ModuleNotFoundError):
        missing = (error.name or "").partition(".")[0]
        extra = _EXTRAS.get(missing)
        if extra is not None:
            if extra == "serve" and command in ("agent", "demo"):
                extra = "agent"
            install = f"pip install 'tailspan[{extra}]'"
            report(ConfigError(f"'tailspan {command}' needs {missing}, which is not installed: {install}"))
            return EXIT_USAGE
    if isinstance(error, OSError) and error.errno != errno.EPIPE:
        report(error)
        # Standard output is broken: the flush at exit would fail again, with a traceback.
        sys.stdout = None
        return EXIT_ERROR
    raise error
