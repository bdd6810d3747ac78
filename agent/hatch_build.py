"""Builds the C part (`sdk/tailspan/_native.c`) into wheels and editable installations, where there is a C compiler.

Without a compiler, or with ``TAILSPAN_PURE=1`` in the environment, nothing is compiled and `tailspan._native` chooses
the same functions in Python; `tailspan doctor` reports which are in use. The built extension serves CPython 3.11 and
all later versions (the limited API).
"""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface
from setuptools import Distribution, Extension
from setuptools.errors import BaseError, CCompilerError

_PACKAGE = "sdk/tailspan"
_SOURCE = f"{_PACKAGE}/_native.c"
_MODULE = "tailspan._compiled"
_LIMITED_API = "0x030B0000"


class CompileHook(BuildHookInterface[Any]):
    """Adds the compiled extension to a wheel; for an editable installation, puts it into the source tree."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile.

        Args:
            version: ``standard`` or ``editable``.
            build_data: The wheel's contents and tag, changed in place.
        """
        self._directory = tempfile.TemporaryDirectory()  # must exist until the wheel is written: see `finalize`
        if version == "editable":
            self._remove_extensions()
        if os.environ.get("TAILSPAN_PURE", "0") not in ("", "0") or sys.implementation.name != "cpython":
            return
        try:
            extension = compiled(Path(self.root, _SOURCE), Path(self._directory.name))
            if version == "editable":
                shutil.copy(extension, Path(self.root, _PACKAGE))
                return
        except (BaseError, CCompilerError, OSError, ValueError) as error:
            self.app.display_warning(f"{error}; lines are counted and framed in Python, which costs more")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"cp311-abi3-{platform}"}
        build_data["force_include"][str(extension)] = f"tailspan/{extension.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Remove the build directory."""
        self._directory.cleanup()

    def _remove_extensions(self) -> None:
        """Remove what earlier installations compiled, also under former names."""
        for package in ("sdk/tailspan", "agent/tailspan_agent"):
            for stale in Path(self.root, package).glob("**/*.so"):
                stale.unlink(missing_ok=True)


def compiled(source: Path, directory: Path) -> Path:
    """Return the extension, built in a directory.

    Raises:
        CCompilerError: There is no compiler, or the headers of this Python are missing.
        BaseError: The compiler cannot be called.
    """
    extension = Extension(
        _MODULE,
        [str(source)],
        extra_compile_args=["-g0"],
        # auditwheel reads the wheel's platform from the libc that the extension links to, used or not.
        extra_link_args=["-Wl,--no-as-needed"] if sys.platform == "linux" else [],
        define_macros=[("Py_LIMITED_API", _LIMITED_API)],
        py_limited_api=True,
    )
    places = {"build_lib": str(directory), "build_temp": str(directory)}
    Distribution({"ext_modules": [extension], "options": {"build_ext": places}}).run_command("build_ext")
    (built,) = directory.glob("**/_compiled.*.so")
    return built
