"""`python -m tests.docs_site ZENSICAL OUT`: build the site, and fail on a warning."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.docs_site.sources import write_sources


def main(zensical: str, out: str) -> int:
    """Build the site.

    Args:
        zensical: The site generator.
        out: Where to write the site; what is there is replaced.
    """
    target = Path(out).resolve()
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_sources(root)
        done = subprocess.run([Path(zensical).resolve(), "build", "--strict", "--clean"], cwd=root, check=False)
        if done.returncode == 0:
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(root / "site", target)
            print(f"{len(list(target.rglob('*.html')))} pages in {out}")
    return done.returncode


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
