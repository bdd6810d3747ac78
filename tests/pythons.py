"""Run the suite on every supported Python that is installed: ``make test-pythons``.

    python -m tests.pythons DIRECTORY [VERSION ...] [-- PYTEST_ARGUMENT ...]

Each Python gets a virtual environment below DIRECTORY, with the locked packages. Pythons that are not found are named.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
VERSIONS = ("3.11", "3.12", "3.13", "3.14")


def candidates(version: str) -> Iterator[str]:
    """Yield commands that may be a Python of this version: of the search path, then of pyenv and of uv."""
    yield f"python{version}"
    for manager, arguments in (("pyenv", ["prefix", version]), ("uv", ["python", "find", "--no-project", version])):
        if shutil.which(manager) is not None:
            done = subprocess.run([manager, *arguments], capture_output=True, text=True, cwd=ROOT)
            found = Path(done.stdout.strip())
            if done.returncode == 0:
                yield str(found / "bin" / "python" if found.is_dir() else found)


def find(version: str) -> str | None:
    """Return the command of an installed Python that runs, if there is one."""
    for command in candidates(version):
        show = [command, "-c", "import sys, venv; print('%d.%d' % sys.version_info[:2])"]
        try:
            done = subprocess.run(show, capture_output=True, text=True, cwd=ROOT)
        except OSError:
            continue
        if done.stdout.strip() == version:  # a shim of pyenv may exist without the Python behind it
            return command
    return None


def environment(directory: Path, version: str, python: str) -> Path:
    """Make or update the environment of a version, and return its ``bin``."""
    home = directory / version
    if not (home / "bin" / "python").exists():
        subprocess.run([python, "-m", "venv", str(home)], check=True)
    install = [str(home / "bin" / "python"), "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*install, "--require-hashes", "-r", "build.lock", "-r", "requirements.lock"], check=True, cwd=ROOT)
    subprocess.run([*install, "--no-deps", "--no-build-isolation", "-e", "."], check=True, cwd=ROOT)
    return home / "bin"


def main(arguments: list[str]) -> int:
    """Run the suite on each version, print a summary, and return the exit code."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m tests.pythons",
        usage="%(prog)s [-h] DIRECTORY [VERSION ...] [-- PYTEST_ARGUMENT ...]",
        description="Run the suite on every supported Python that is installed.",
    )
    parser.add_argument("directory", metavar="DIRECTORY", help="where the virtual environments are made")
    parser.add_argument("versions", metavar="VERSION", nargs="*", help=f"such as 3.12; default: {', '.join(VERSIONS)}")
    given, pytest = parser.parse_args(arguments[:cut]), arguments[cut + 1 :]
    if unknown := set(given.versions) - set(VERSIONS):
        parser.error(f"not a supported Python: {', '.join(sorted(unknown))}; expected some of {', '.join(VERSIONS)}")
    results: dict[str, str] = {}
    for version in given.versions or VERSIONS:
        python = find(version)
        if python is None:
            results[version] = "left out: not installed"
            continue
        print(f"Python {version}", flush=True)
        scripts = environment(Path(given.directory).absolute(), version, python)
        env = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
        done = subprocess.run([str(scripts / "pytest"), *pytest], env=env, cwd=ROOT)
        results[version] = "passed" if done.returncode == 0 else f"FAILED (pytest exits with {done.returncode})"
    for version, result in results.items():
        print(f"Python {version}: {result}")
    return 1 if any("FAILED" in result for result in results.values()) or "passed" not in results.values() else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
