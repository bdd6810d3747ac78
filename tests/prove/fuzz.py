"""The input rows: every parser that reads the outside is fuzzed, ten times as long as in ``make test``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import zlib
from functools import partial
from pathlib import Path

from tests.prove.scenarios import Scenario
from tests.prove.table import Row

ROOT = Path(__file__).parents[2]
PARSERS = {
    "test_fused_replies.py": "log pages, status, lists, login files, cursors",
    "test_texts.py": "lines, progress, tracebacks, commands, TOML",
    "test_checkpoint_file.py": "the checkpoint store",
    "test_job_api_bytes.py": "bytes sent to the job API",
    "test_local_files.py": "files of local jobs",
    "test_otlp_answers.py": "answers of endpoints, files for a replay",
}
_PASSED = re.compile(r"^(\d+) passed(?!.*(?:failed|error))", re.MULTILINE)


def fuzz(seed: str, module: str) -> Row:
    """Fuzz with one module of ``tests/property``: no crash, no hang, no unbounded memory."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:randomly", "-p", "no:cacheprovider"]
    command += [f"--hypothesis-seed={zlib.crc32(seed.encode())}", f"tests/property/{module}"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HYPOTHESIS_PROFILE": "long"}, capture_output=True, text=True
    )
    passed = _PASSED.search(done.stdout)
    if done.returncode or not passed:
        print(done.stdout, done.stderr, file=sys.stderr)
        return Row("", problems=[f"tests/property/{module} ended with {done.returncode}; see above"])
    return Row("", notes=[f"{passed[1]} tests of tests/property/{module}, ten times as long as in `make test`"])


def scenarios() -> list[Scenario]:
    """Return the rows of fuzzing."""
    return [Scenario(f"fuzz: {what}", partial(fuzz, module=module)) for module, what in PARSERS.items()]
