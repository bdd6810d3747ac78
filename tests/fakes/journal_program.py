"""journalctl, systemctl, cat and id of the fake in `tests.fakes.journal`: ``DIRECTORY PROGRAM ARGUMENT...``.

It has what was measured of systemd 252, and starts fast: it needs only the standard library.
"""

import json
import os
import sys
import time
from fnmatch import fnmatchcase
from pathlib import Path

_POLL_S = 0.02


def main() -> None:
    """Run a program."""
    directory, program, *arguments = sys.argv[1:]
    place = Path(directory)
    if "--follow" in arguments and not (place / f"{program}.problem").exists():
        note(place, program, arguments)
        options, matches = _parts(arguments)
        follow(place / "journal", options, matches)
        return
    code, output, errors = answer(place, program, arguments)
    sys.stdout.buffer.write(output)
    sys.stderr.write(errors)
    sys.exit(code)


def note(place: Path, program: str, arguments: list[str]) -> None:
    """Note a call."""
    with (place / "calls").open("a") as calls:
        calls.write(json.dumps([program, *arguments]) + "\n")


def answer(place: Path, program: str, arguments: list[str]) -> tuple[int, bytes, str]:
    """Return exit code, output and errors of a program."""
    note(place, program, arguments)
    problem = place / f"{program}.problem"
    if problem.exists():
        code, _, text = problem.read_text().partition(" ")
        return int(code), b"", text
    match program:
        case "cat":
            return 0, b"0123456789abcdef0123456789abcdef\n", ""
        case "id":
            return 0, b"1000\n", ""
        case "systemctl":
            return 0, systemctl(place, arguments).encode(), ""
    return 0, journalctl(place, arguments), ""


def systemctl(place: Path, arguments: list[str]) -> str:
    """Show units, or ask for the stop of one."""
    names = arguments[arguments.index("--") + 1 :]
    units = json.loads((place / "units.json").read_text())
    if "stop" in arguments:
        with (place / "stopped").open("a") as stopped:
            stopped.write(names[0] + "\n")
        return ""
    blocks = []
    for name in names:
        found = [unit for unit in units if fnmatchcase(unit, name)]
        for unit in found or ([] if "*" in name else [name]):
            shown = {"Id": unit, "LoadState": "not-found", **units.get(unit, {})}
            blocks.append("".join(f"{key}={value}\n" for key, value in shown.items()))
    return "\n".join(blocks)


def journalctl(place: Path, arguments: list[str]) -> bytes:
    """Return what journalctl prints."""
    if "--version" in arguments:
        return (place / "version").read_bytes()
    if "--header" in arguments:
        return b"File path: /run/log/journal/0/system.journal\n"
    options, matches = _parts(arguments)
    lines = select((place / "journal").read_bytes().splitlines(), options, matches)
    return b"".join(line + b"\n" for line in lines)


def _parts(arguments: list[str]) -> tuple[dict[str, str], list[str]]:
    options = dict(one[2:].partition("=")[::2] for one in arguments if one.startswith("--"))
    return options, [one for one in arguments if not one.startswith("--")]


def follow(file: Path, options: dict[str, str], matches: list[str]) -> None:
    """Print entries as they come, until the reader goes."""
    size, inode, last, reader = 0, 0, 0, os.getppid()
    while os.getppid() == reader and not file.with_name("hangs").exists():
        now = file.stat()
        if now.st_ino != inode:
            # A vacuum has replaced the file: what is left of it may be new.
            size, inode = 0, now.st_ino
        if now.st_size > size:
            with file.open("rb") as opened:
                opened.seek(size)
                text = opened.read(now.st_size - size)
            whole, _, _ = text.rpartition(b"\n")
            size += len(whole) + 1 if whole else 0
            lines = [line for line in whole.splitlines() if _number_in(line) > last]
            for line in select(lines, options, matches):
                sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()
            if lines:
                last = _number_in(lines[-1])
            options.pop("cursor", None)
        time.sleep(_POLL_S)
    file.with_name("hanging").touch()
    while os.getppid() == reader:
        time.sleep(_POLL_S)


def select(lines: list[bytes], options: dict[str, str], matches: list[str]) -> list[bytes]:
    """Return the lines that the options choose."""
    groups: list[dict[str, set[str]]] = [{}]
    for one in matches:
        if one == "+":
            groups.append({})
        else:
            field, _, value = one.partition("=")
            groups[-1].setdefault(field, set()).add(value)
    first = _number(options["cursor"]) if "cursor" in options else 0
    since_us = float(options.get("since", "@0")[1:]) * 1e6
    until_us = float(options.get("until", "@1e15")[1:]) * 1e6
    found = []
    for line in lines:
        if matches or first or "since" in options or "until" in options:
            entry = json.loads(line)
            # A cursor that is gone means the next entry.
            if _number(entry["__CURSOR"]) < first or not since_us <= int(entry["__REALTIME_TIMESTAMP"]) <= until_us:
                continue
            if matches and not any(all(entry.get(key) in values for key, values in one.items()) for one in groups):
                continue
        found.append(line)
    return found[-int(options["lines"]) :] if "lines" in options else found


def _number_in(line: bytes) -> int:
    start = line.index(b";i=") + 3
    return int(line[start : line.index(b";", start)], 16)


def _number(cursor: str) -> int:
    return int(cursor.split(";")[1].partition("=")[2], 16)


if __name__ == "__main__":
    main()
