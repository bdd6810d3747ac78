"""What ``tailspan run`` does once its arguments are known: run the command as a job, and run it in any case.

It imports neither click nor the configuration's classes: most of what `tailspan run` costs would be their import.
"""

from __future__ import annotations

import os

from tailspan.errors import TailspanError
from tailspan.local.attached import block_signals, follow, open_or_none
from tailspan.local.launch import CallerState, MaybeStartedError, Request, launch
from tailspan.local.run_settings import CANCEL_GRACE_S, load_run_settings
from tailspan.local.state_dir import StateDir
from tailspan.local.stdin import inherited_stdin
from tailspan.local.terminal import is_terminal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    from collections.abc import Callable, Mapping, Sequence

    from tailspan.local.run_settings import RunSettings
    from tailspan.local.supervisor_events import Ended
else:
    import _signal as signal  # without the enums of `signal`, which cost 4 ms

__all__ = ["RunOptions", "run_command", "say"]

_PRUNE_EVERY_S = 3600.0


class RunOptions:
    """The options of ``tailspan run``.

    Attributes:
        command: The command and its arguments.
        name: The job's name; None: taken from the command.
        attributes: What to attach to the job.
        timeout_s: After this many seconds the command is ended; None: never.
        detach: Whether to return at once.
        service: The local service; None: ``local``.
        config: The configuration file; None: the one of the environment.
        strict: Whether the command does not run where it cannot be captured.
        terminal: Whether the command gets a pseudo-terminal where its output is a terminal.
        encoding: The codec of its output; None: the configured one.
        as_json: Whether a detached job is printed as JSON.
    """

    def __init__(
        self,
        *,
        command: Sequence[str] = (),
        name: str | None = None,
        attributes: Mapping[str, str] | None = None,
        timeout_s: float | None = None,
        detach: bool = False,
        service: str | None = None,
        config: str | None = None,
        strict: bool = False,
        terminal: bool = True,
        encoding: str | None = None,
        as_json: bool = False,
    ) -> None:
        self.command = command
        self.name = name
        self.attributes = attributes
        self.timeout_s = timeout_s
        self.detach = detach
        self.service = service
        self.config = config
        self.strict = strict
        self.terminal = terminal
        self.encoding = encoding
        self.as_json = as_json


def run_command(options: RunOptions, *, own_process: bool = False) -> int:
    """Run the command as a local job; where that is not possible, run it without capturing it.

    Args:
        options: What to run, and how.
        own_process: Whether this process does nothing else; see `tailspan.local.attached.follow`.

    Returns:
        The exit code of ``tailspan run``.

    Raises:
        ConfigError: An option is not usable.
        TailspanError: With ``--strict``, the command cannot be captured.
        OSError: With ``--strict``, the job's files cannot be made.
    """
    caller = CallerState()
    request = _request(options)
    signals = set() if options.detach else block_signals(caller)
    try:
        try:
            settings = load_run_settings(options.config, options.service or "local", os.environ)
            if options.strict:
                _check_all(options)
            if settings.encoding is not None and request.encoding is None:
                request = _request(options, settings.encoding)
            place = StateDir(settings.state_dir, gid=settings.gid)
            on_id = None if options.detach else _say_id
            launched = launch(
                place,
                request,
                otlp=settings.otlp,
                grace_s=CANCEL_GRACE_S,
                caller=caller,
                on_id=on_id,
                discard=not options.strict,
            )
        except MaybeStartedError:
            raise
        except Exception as error:
            # A bug of ours is no reason for a job not to run, either.
            if options.strict:
                raise
            kind = "" if isinstance(error, TailspanError | OSError) else f"{type(error).__name__}: "
            say(f"the command runs, but is not captured: {kind}{' '.join(str(error).split())}")
            return _run_uncaptured(options, caller)
        if options.detach:
            launched.close()
            code = 0
            _print_job(options, settings, launched.job_id)
        else:
            on_end = _end_line(options, settings, launched.job_id) if is_terminal(2) else None
            code = follow(launched, signals, own_process=own_process, on_end=on_end)
        _prune_sometimes(options, settings, place)
        return code
    finally:
        if not own_process:
            # Otherwise a late signal must not change the exit code.
            signal.pthread_sigmask(signal.SIG_SETMASK, caller.mask)


def _say_id(job_id: str) -> None:
    # Under cron every word on standard error is a mail.
    if is_terminal(2):
        say(f"this is job {job_id}")


def _end_line(options: RunOptions, settings: RunSettings, job_id: str) -> Callable[[Ended], None]:
    """Return what prints one dim line at the end of a job: how it ended, and where to see it."""
    import time

    begun_s = time.monotonic()

    def show(ended: Ended) -> None:
        from tailspan._durations import duration_text

        try:
            where = f" --service {options.service}" if options.service else ""
            parts = [
                ended.state.lower().replace("_", " "),
                f"exit code {ended.exit_code}",
                duration_text(time.monotonic() - begun_s),
                f"tailspan logs {job_id}{where}",
            ]
            if page := _page_of(options, settings, job_id):
                parts.append(page)
            dim, plain = ("", "") if os.environ.get("NO_COLOR") else ("\x1b[2m", "\x1b[0m")
            start = "" if _ends_a_line(f"{StateDir(settings.state_dir).jobs}/{job_id}/log") else "\n"
            os.write(2, f"{start}{dim}tailspan: {'  '.join(parts)}{plain}\n".encode("utf-8", "replace"))
        except Exception:
            # The job has ended: nothing may change its exit code.
            return

    return show


def _page_of(options: RunOptions, settings: RunSettings, job_id: str) -> str | None:
    from tailspan.local.agent_page import job_page, page_of
    from tailspan.local.run_settings import default_agent_dir

    page = page_of(settings.agent_dir or default_agent_dir(os.environ))
    return page and job_page(page, options.service or "local", job_id)


def _ends_a_line(path: str) -> bool:
    """Return whether the last byte of a log is a newline, so that what follows at the terminal begins a line."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(fd).st_size
        return size == 0 or os.pread(fd, 1, size - 1) == b"\n"
    finally:
        os.close(fd)


def _run_uncaptured(options: RunOptions, caller: CallerState) -> int:
    from tailspan.local.uncaptured import run_detached, run_uncaptured

    if options.detach:
        run_detached(options.command, caller=caller)
        return 0
    return run_uncaptured(options.command, caller=caller, timeout_s=options.timeout_s)


def _request(options: RunOptions, encoding: str | None = None) -> Request:
    if options.detach:
        return Request(
            command=options.command,
            name=options.name,
            attributes=options.attributes,
            timeout_s=options.timeout_s,
            stdin_fd=inherited_stdin(),
            inherit=True,
            encoding=options.encoding or encoding,
        )
    return Request(
        command=options.command,
        name=options.name,
        attributes=options.attributes,
        timeout_s=options.timeout_s,
        stdin_fd=open_or_none(0),
        show=(open_or_none(1), open_or_none(2)),
        attached=True,
        terminal=options.terminal,
        encoding=options.encoding or encoding,
    )


def _check_all(options: RunOptions) -> None:
    """Check the whole configuration.

    Raises:
        ConfigError: Something in it is wrong.
    """
    from pathlib import Path

    from tailspan.config import load_settings

    load_settings(None if options.config is None else Path(options.config), telemetry=False)


def _print_job(options: RunOptions, settings: RunSettings, job_id: str) -> None:
    if options.as_json:
        from tailspan.cli.show import json_line, json_of
        from tailspan.services.local import LocalService

        service = LocalService.from_run_settings(options.service or "local", settings)
        json_line(json_of(service.status(job_id)))
    else:
        print(job_id, flush=True)  # noqa: T201 - it is the command's output


def _prune_sometimes(options: RunOptions, settings: RunSettings, place: StateDir) -> None:
    """Delete what need not be kept, at most once an hour; a job does not fail because that fails."""
    import time

    mark = place.prune_mark
    try:
        # A mark of the future is one of a wrong clock.
        if 0 <= time.time() - os.stat(mark).st_mtime < _PRUNE_EVERY_S:
            return
    except FileNotFoundError:
        pass
    except OSError:
        return
    try:
        from tailspan.services.local import LocalService

        LocalService.from_run_settings(options.service or "local", settings).prune_sometimes()
    except Exception:
        # Whatever it is: `tailspan jobs prune` says so.
        return


def say(text: str) -> None:
    """Print one line on standard error."""
    try:
        os.write(2, f"tailspan: {text}\n".encode("utf-8", "replace"))
    except OSError:
        pass
