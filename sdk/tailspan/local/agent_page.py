"""The page of the agent that runs on a state directory: the agent writes its address to a file there.

`tailspan run` imports this at a terminal: nothing here may import slowly.
"""

from __future__ import annotations

import os

__all__ = ["announce_page", "job_page", "page_of"]

_MAX_BYTES = 4096
_SAFE = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.-~")


def announce_page(state_dir: str, url: str | None) -> None:
    """Write the address of the agent's page, or remove it; without the file the page is only not linked.

    Args:
        state_dir: The agent's state directory.
        url: The address, without a token; None: there is no page now.
    """
    path = f"{state_dir}/page-url"
    try:
        if url is None:
            os.unlink(path)
            return
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            os.write(fd, f"{url}\n".encode("utf-8", "replace"))
        finally:
            os.close(fd)
    except OSError:
        return


def page_of(state_dir: str) -> str | None:
    """Return the address of the page of the agent that runs on a state directory; None without one.

    Args:
        state_dir: The agent's state directory.
    """
    import fcntl

    try:
        lock_fd = os.open(f"{state_dir}/agent.lock", os.O_RDONLY | os.O_CLOEXEC)
        try:
            fcntl.flock(lock_fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return None  # no agent runs
        except BlockingIOError:
            pass
        finally:
            os.close(lock_fd)
        fd = os.open(f"{state_dir}/page-url", os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            url = os.read(fd, _MAX_BYTES).decode("utf-8", "replace").strip()
        finally:
            os.close(fd)
    except OSError:
        return None
    return url.rstrip("/") if url.startswith(("http://", "https://")) and url.isprintable() else None


def job_page(page: str, service: str, job_id: str) -> str:
    """Return the address of a job on the page.

    Args:
        page: From `page_of`.
        service: The configured name of the job's service.
        job_id: The job.
    """
    return f"{page}/job?service={_quoted(service)}&id={_quoted(job_id)}"


def _quoted(text: str) -> str:
    # As `urllib.parse.quote` does, which takes milliseconds to import.
    encoded = text.encode("utf-8", "replace")
    return "".join([chr(byte) if chr(byte) in _SAFE else f"%{byte:02X}" for byte in encoded])
