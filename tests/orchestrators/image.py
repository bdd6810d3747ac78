"""An image of Tailspan, made without a container engine: a Python, an environment with Tailspan, and busybox."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Mapping
from pathlib import Path

# What no test of a cluster needs, of a Python that was built on this machine.
_LEFT_OUT = re.compile(r"/(test|tests|idlelib|ensurepip|__pycache__|config-\d.*|share|include)$|\.a$|/site-packages$")


def write_image(path: Path, name: str, venv: Path, environ: Mapping[str, str], entrypoint: list[str]) -> None:
    """Write an image that containerd can import.

    Args:
        path: Where to write it.
        name: Name and tag.
        venv: The environment with Tailspan; it has the same path in the image.
        environ: Variables; ``PATH`` is set here.
        entrypoint: The first words of each command.
    """
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        _add_busybox(tar)
        for root in (Path(sys.base_prefix), venv):
            tar.add(root, filter=lambda member: _readable(member) if not _LEFT_OUT.search(f"/{member.name}") else None)
        # the environment's own packages, which the pattern above leaves out of the Python's
        for packages in venv.glob("lib/python*/site-packages"):
            tar.add(packages, filter=_readable)
        for library in sorted(_libraries(Path(sys.base_prefix), venv)):
            tar.add(library.resolve(), arcname=str(library).lstrip("/"), filter=_readable)
        for folder, mode in (("tmp", 0o1777), ("var/lib/tailspan", 0o770)):
            info = tarfile.TarInfo(folder)
            info.type, info.mode = tarfile.DIRTYPE, mode
            tar.addfile(info)
    content = layer.getvalue()
    image = {
        "architecture": "amd64",
        "os": "linux",
        "config": {
            "Entrypoint": entrypoint,
            "Env": [f"{key}={value}" for key, value in {**environ, "PATH": f"{venv}/bin:/bin"}.items()],
            "User": "10001:0",
        },
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(content).hexdigest()}"]},
    }
    config = json.dumps(image).encode()
    file = f"{hashlib.sha256(config).hexdigest()}.json"
    manifest = [{"Config": file, "RepoTags": [f"docker.io/library/{name}"], "Layers": ["layer.tar"]}]
    with tarfile.open(path, "w") as tar:
        for member, data in ((file, config), ("layer.tar", content), ("manifest.json", json.dumps(manifest).encode())):
            info = tarfile.TarInfo(member)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def _readable(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """Let each user read it, also below a home directory."""
    member.mode |= 0o755 if member.isdir() or member.mode & 0o100 else 0o644
    member.uid = member.gid = 0
    return member


def _add_busybox(tar: tarfile.TarFile) -> None:
    busybox = shutil.which("busybox")
    assert busybox is not None
    tar.add(busybox, "bin/busybox", filter=_readable)
    applets = subprocess.run([busybox, "--list"], capture_output=True, text=True, check=True).stdout.split()
    for applet in applets:
        if applet != "busybox":
            info = tarfile.TarInfo(f"bin/{applet}")
            info.type, info.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(info)


def _libraries(*roots: Path) -> set[Path]:
    """Return the shared libraries that Python, its modules and its packages need from the system."""
    programs = [Path(os.path.realpath(sys.executable)), *(path for root in roots for path in root.glob("lib/**/*.so"))]
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
    found = {Path(match) for match in re.findall(r"\s(/\S+) \(0x", done.stdout)}
    return {path for path in found if not any(path.is_relative_to(root) for root in roots)}
