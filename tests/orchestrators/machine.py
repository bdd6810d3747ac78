"""A machine with a systemd of its own: this one's files, copied when they are written, booted in a container."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

__all__ = ["Machine"]

_BOOT_S = 120.0
_NEEDED = ("systemd-nspawn", "nsenter", "mount")


class Machine:
    """A booted systemd with a journal. A context manager; as root, with Debian's systemd-container.

    Attributes:
        root: Its root directory.
        enter: A program that runs a command in it.
    """

    def __init__(self, directory: Path) -> None:
        missing = [one for one in _NEEDED if shutil.which(one) is None]
        if sys.platform != "linux" or os.geteuid() != 0 or missing:
            pytest.skip(f"a systemd in a container needs root and {', '.join(missing) or 'Linux'}")
        self.root = directory / "root"
        self.enter = directory / "enter.sh"
        self._layers = directory / "layers"
        self._log = directory / "boot.log"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.root.mkdir()
        self._layers.mkdir()
        _run("mount", "-t", "tmpfs", "tmpfs", str(self._layers))
        for one in ("upper", "work"):
            (self._layers / one).mkdir()
        layers = f"lowerdir=/,upperdir={self._layers}/upper,workdir={self._layers}/work"
        _run("mount", "-t", "overlay", "overlay", "-o", layers, str(self.root))
        try:
            self._boot()
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def _boot(self) -> None:
        (self.root / "etc/machine-id").write_text("0123456789abcdef0123456789abcdef\n")
        shutil.rmtree(self.root / "var/log/journal", ignore_errors=True)
        (self.root / "var/log/journal").mkdir(parents=True)
        units = self.root / "etc/systemd/system"
        # None of this machine's own services: only the journal and the bus.
        self.write_unit("try.target", "[Unit]\nRequires=basic.target\nWants=dbus.service\nAfter=basic.target\n")
        for name in ("default.target", "systemd-firstboot.service"):
            (units / name).unlink(missing_ok=True)
        (units / "default.target").symlink_to("try.target")
        (units / "systemd-firstboot.service").symlink_to("/dev/null")
        command = ["systemd-nspawn", "--quiet", "--register=no", "--keep-unit", f"--directory={self.root}"]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command, "--private-network", "--boot", "--console=pipe"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        deadline = time.monotonic() + _BOOT_S
        while True:
            children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
            init = children.read_text().split() if children.exists() else []
            if init:
                self.enter.write_text(f'#!/bin/sh\nexec nsenter -t {init[0]} -m -u -i -p -- "$@"\n')
                self.enter.chmod(0o755)
                asked = subprocess.run([self.enter, "systemctl", "is-system-running"], capture_output=True, text=True)
                if asked.stdout.strip() in ("running", "degraded"):
                    return
            if self._process.poll() is not None or time.monotonic() > deadline:
                pytest.skip(f"systemd does not boot in a container here: {self._log.read_text()[-1000:]}")
            time.sleep(0.2)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._process is not None:
            # What systemd calls an immediate power-off of a container.
            subprocess.run([self.enter, "systemctl", "poweroff", "--force", "--force"], capture_output=True)
            try:
                self._process.wait(30)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
        for place in (self.root, self._layers):
            subprocess.run(["umount", "--lazy", place], capture_output=True)

    def run(self, *command: str) -> str:
        """Run a command in it and return what it printed."""
        return _run(str(self.enter), *command)

    def write_unit(self, name: str, text: str) -> None:
        """Write a unit file."""
        (self.root / "etc/systemd/system" / name).write_text(text)


def _run(*command: str) -> str:
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 0, f"{command}: {ended.stderr[-2000:]}"
    return ended.stdout
