"""Builds `tailspan_agent/_framing.c` along with the package, where there is a C compiler.

Without one, or with ``TAILSPAN_PURE=1`` in the environment, the package has no compiled part, and the agent does the
same in Python (`tailspan_agent.framing`); `tailspan doctor` says which it is. What was built is for CPython 3.11 and
all later versions (its limited API).
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

_PACKAGE = "tailspan_agent"
_LIMITED_API = "0x030B0000"


class FramingHook(BuildHookInterface[Any]):
    """Puts the compiled part into wheels, and beside its source for editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile.

        Args:
            version: ``standard`` or ``editable``.
            build_data: What the wheel is made of.
        """
        source = Path(self.root, "agent", _PACKAGE, "_framing.c")
        self._directory = tempfile.TemporaryDirectory()  # until the wheel is written, or the build ends otherwise
        try:
            if version == "editable":
                for stale in source.parent.glob("_framing.*.so"):
                    stale.unlink(missing_ok=True)
            if os.environ.get("TAILSPAN_PURE", "0") not in ("", "0") or sys.implementation.name != "cpython":
                return
            built = compiled(source, Path(self._directory.name))
            if version == "editable":
                shutil.copy(built, source.parent)
                return
        except (BaseError, CCompilerError, OSError, ValueError) as error:
            self.app.display_warning(f"{error}; the agent frames lines in Python, which costs more")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"cp311-abi3-{platform}"}
        build_data["force_include"][str(built)] = f"{_PACKAGE}/{built.name}"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        """Clean up; see `initialize`."""
        self._directory.cleanup()


def compiled(source: Path, directory: Path) -> Path:
    """Return the extension, built within a directory.

    Raises:
        CCompilerError: There is no compiler, or it has no headers of this Python.
        BaseError: It cannot be called.
    """
    extension = Extension(
        f"{_PACKAGE}.{source.stem}",
        [str(source)],
        extra_compile_args=["-g0"],
        define_macros=[("Py_LIMITED_API", _LIMITED_API)],
        py_limited_api=True,
    )
    places = {"build_lib": str(directory), "build_temp": str(directory)}
    Distribution({"ext_modules": [extension], "options": {"build_ext": places}}).run_command("build_ext")
    (built,) = directory.glob(f"{_PACKAGE}/{source.stem}.*")
    return built
