"""Builds the C files of both packages along with them, where there is a C compiler.

Without one, or with ``TAILSPAN_PURE=1`` in the environment, nothing is compiled, and the same is done in Python
(`tailspan_agent.records.framing`, `tailspan.logs.text`); `tailspan doctor` says which it is. What was built is for
CPython 3.11 and all later versions (its limited API).
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

_SOURCES = ("agent/tailspan_agent/records/_framing.c", "sdk/tailspan/logs/_text.c")
_LIMITED_API = "0x030B0000"


class CompileHook(BuildHookInterface[Any]):
    """Puts the compiled parts into wheels, and beside their sources for editable installations."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile.

        Args:
            version: ``standard`` or ``editable``.
            build_data: What the wheel is made of.
        """
        sources = [Path(self.root, source) for source in _SOURCES]
        self._directory = tempfile.TemporaryDirectory()  # until the wheel is written, or the build ends otherwise
        try:
            if version == "editable":
                for source in sources:
                    for stale in source.parent.glob(f"{source.stem}.*.so"):
                        stale.unlink(missing_ok=True)
            if os.environ.get("TAILSPAN_PURE", "0") not in ("", "0") or sys.implementation.name != "cpython":
                return
            built = {source: compiled(source, Path(self._directory.name)) for source in sources}
            if version == "editable":
                for source, extension in built.items():
                    shutil.copy(extension, source.parent)
                return
        except (BaseError, CCompilerError, OSError, ValueError) as error:
            self.app.display_warning(f"{error}; lines are counted and framed in Python, which costs more")
            return
        platform = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data |= {"pure_python": False, "tag": f"cp311-abi3-{platform}"}
        for source, extension in built.items():
            build_data["force_include"][str(extension)] = str(_in_package(source).with_name(extension.name))

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
        ".".join(_in_package(source).with_suffix("").parts),
        [str(source)],
        extra_compile_args=["-g0"],
        # By the libc that an extension needs auditwheel knows what the wheel is for, also if it uses nothing of it.
        extra_link_args=["-Wl,--no-as-needed"] if sys.platform == "linux" else [],
        define_macros=[("Py_LIMITED_API", _LIMITED_API)],
        py_limited_api=True,
    )
    places = {"build_lib": str(directory), "build_temp": str(directory)}
    Distribution({"ext_modules": [extension], "options": {"build_ext": places}}).run_command("build_ext")
    (built,) = directory.glob(f"**/{source.stem}.*.so")
    return built


def _in_package(source: Path) -> Path:
    """Return the path below ``sdk`` or ``agent``: where the extension stands in a wheel."""
    parts = source.parts
    first = max(index for index, part in enumerate(parts) if part in ("sdk", "agent"))
    return Path(*parts[first + 1 :])
