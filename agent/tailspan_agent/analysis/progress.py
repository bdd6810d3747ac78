"""The progress of a job, from the progress lines that it prints. Pure.

It reads the formats of tqdm, pip and other rich bars, Keras, Spark, pytest, wget, rsync, CMake and ninja, `epoch k/n`,
and `k/n` or `n%` next to a word that means progress. It ignores other numbers (dates, ratios, paths, addresses,
`100% sure`): a wrong bar is worse than no bar.

Every expression takes linear time, and reading a page takes microseconds: `ProgressMeter` reads only its last lines,
at most once a second or when the progress is needed.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import msgspec

from tailspan.logs.clean import clean
from tailspan.logs.page import LogPage

__all__ = ["Progress", "ProgressMeter", "Reading", "read_line"]

_READ_INTERVAL_S = 1.0
_LAST_LINES = 8
_MAX_LINE_BYTES = 2000
_MAX_CHARS = 400
_TEXT_CHARS = 120
_MAX_COUNT = 1e15
_SCALE = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}

_THINGS = (
    "steps?|iterations?|iters?|batch(?:es)?|tasks?|files?|chunks?|parts?|pages?|rows?|items?|records?|images?|tiles?"
    "|rounds?|folds?|shards?|sections?|objects?|partitions?|tables?|days?"
)
_DONE = (
    "progress|completed?|done|finished|processed|processing|downloaded|downloading|uploaded|uploading|loaded|loading"
    "|imported|importing|exported|exporting|converted|converting|copied|copying|rendered|rendering|trained|training"
    "|installing|extracting|building|written|wrote"
)
_BAR = "━─╸╺"

# Every format matches this: most lines are ruled out here.
_CANDIDATE = re.compile(r"\d%|\d(?:[kMGT]?i?B?/| / |\) / | of | out of )\d|\(\d++ \+ \d++\) / |\d/ ?\d|\d /\d")
# Tried in this order. Groups: k and n, or p for per cent, and left for the time left.
_FORMATS = (
    # tqdm: "tiles:  45%|####      | 18/40 [00:01<00:02, 19.88it/s]"
    r"(?<!\d)\d{1,3}%\|[^|]*+\| *(?P<k>\d[\d.]*+)(?P<ks>[kMGT]?)i?B?/(?P<n>\d[\d.]*+)(?P<ns>[kMGT]?)i?B?"
    r" \[[\d:]++<(?P<left>[\d:?]++)",
    # pip and other rich bars: "━━━━╸ 10.2/12.3 MB 1.2 MB/s eta 0:00:02", "━━━━╸━━━ 45% 0:00:12"
    rf"[{_BAR}][{_BAR} ]*+(?P<k>\d[\d.]*+)/(?P<n>\d[\d.]*+) [kMGT]?i?B\b(?:[^e]*+eta (?P<left>[\d:]++))?",
    rf"[{_BAR}][{_BAR} ]*+(?P<p>\d{{1,3}})%(?: (?P<left>[\d:]++))?",
    # Keras: "45/100 [====>.....] - ETA: 5s", "45/100 ━━━━━━━━ 12s 34ms/step"
    rf"^ *+(?P<k>\d++)/(?P<n>\d++) (?:\[[=>.]++\]|[{_BAR}]++)",
    # Spark: "[Stage 0:=====>      (10 + 2) / 40]", "Finished task 3.0 in stage 0.0 (TID 3) in 4 ms on host (4/40)"
    r"\[Stage \d++:=*+>? *+\((?P<k>\d++) \+ \d++\) / (?P<n>\d++)\]",
    r"Finished task [\d.]++ in stage [\d.]++ \(TID \d++\) [^(]*+(?:\(executor [^)]*+\) )?"
    r"\((?P<k>\d++)/(?P<n>\d++)\)$",
    # CMake, ninja, docker build, pytest-xdist
    r"^(?:\[gw\d++\] )?\[ *+(?P<p>\d{1,3})%\] ",
    r"^\[(?P<k>\d++)/(?P<n>\d++)\] ",
    # wget (dots and bar), rsync
    r"^ *+\d++[KMG] [. ]++(?P<p>\d{1,3})% *+[\d.]++[KMG]?(?: (?P<left>[\dhms]++)$|=)",
    r"(?<![\d.])(?P<p>\d{1,3})% ?\[[=+>#. -]*+\]",
    r"^ *+[\d,.]++[kMGT]? ++(?P<p>\d{1,3})% ++[\d.]++[kMGT]?B/s",
    # words: "Processed 45 of 100 files", "step 45/100", "45/100 tiles", "Progress: 45%", "45% done"
    rf"(?i)\b(?:{_THINGS}|{_DONE})\b[ :#=\[(]*+(?P<k>\d[\d,]*+) ?(?:/|of|out of) ?(?P<n>\d[\d,]*+)"
    r"(?![\d,]|[./:-]\d|/)",
    rf"(?i)(?<![\d.,/:-])(?P<k>\d[\d,]*+) ?(?:/|of|out of) ?(?P<n>\d[\d,]*+) (?:{_THINGS}|{_DONE})\b",
    rf"(?i)(?<![\d.,+-])(?P<p>\d{{1,3}}(?:\.\d++)?)% ?(?:{_DONE})\b",
    rf"(?i)\b(?:{_DONE})\b[ :=.\[(]*+(?P<p>\d{{1,3}}(?:\.\d++)?)%(?! ?(?:sure|certain|of|off|confiden\w*+|cpu)\b)",
    # only a bar: "45%", "[#####     ] 45%"
    r"^[^\w%]*+(?<![-+.])(?P<p>\d{1,3}(?:\.\d++)?)%[^\w%]*+$",
)
_PYTEST = re.compile(r"\[ *+(\d{1,3})%\]$")
_PYTEST_START = re.compile(r"[^\s:]+\.py(?:::\S| )|[.FEsxXRp]++ *+\[")
_EPOCH = re.compile(r"(?i)\bepoch[ :#\[]*+(\d++) ?(?:/|of) ?(\d++)(?![\d./:-])")
_EPOCH_ENDED = re.compile(r"(?i)\b(?:loss|acc|accuracy|done|finished|completed?)\b")
_ETA = re.compile(r"(?i)\beta:? *+((?:\d++:)*+\d++)(s?)\b")
# "3 of 10 files failed" counts what went wrong.
_NO_PROGRESS = re.compile(r"(?i)\b(?:fail|error|missing|skip|invalid|corrupt|reject|retry|retries|attempt|not found)")


@cache
def _formats() -> tuple[re.Pattern[str], ...]:
    # Compiled for the first line that may have progress: it takes longer than a command that needs none of them.
    return tuple(map(re.compile, _FORMATS))


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """The progress that a job reported.

    Attributes:
        fraction: 0 to 1.
        eta_s: The time left as of `seen_unix_nano`, in seconds; None without an estimate.
        seen_unix_nano: When it was reported, in ns since the epoch.
        source: ``tasks`` (task counts of the service) or ``log`` (a progress line).
        text: The line, or the task counts as text.
    """

    fraction: float
    eta_s: float | None
    seen_unix_nano: int
    source: str
    text: str = ""


class Reading(msgspec.Struct, frozen=True):
    """The progress in one line.

    Attributes:
        fraction: 0 to 1.
        left_s: The time left in seconds, if the line has it.
        epochs: Number of epochs in a line about epochs: the lines after it are about progress within one epoch.
    """

    fraction: float
    left_s: float | None = None
    epochs: int | None = None


def read_line(text: str) -> Reading | None:
    """Return the progress in a line; None without one.

    Args:
        text: The line, cleaned: of a bar that overwrites itself, the last state. Only the first 400 characters count.
    """
    text = text[:_MAX_CHARS].rstrip()
    if not _CANDIDATE.search(text):
        return None
    if (epoch := _EPOCH.search(text)) and (fraction := _fraction(epoch[1], epoch[2])) is not None:
        ended = _EPOCH_ENDED.search(text) is not None
        epochs = int(epoch[2])
        return Reading(fraction if ended else max(0.0, fraction - 1 / epochs), epochs=epochs)
    if (found := _PYTEST.search(text)) and _PYTEST_START.match(text):
        return _reading(_per_cent(found[1]), None)
    for line_format in _formats():
        if found := line_format.search(text):
            break
    else:
        return None
    groups = found.groupdict()
    if groups.get("p") is not None:
        fraction = _per_cent(groups["p"])
    else:
        fraction = _fraction(groups["k"], groups["n"], groups.get("ks") or "", groups.get("ns") or "")
    if fraction is None or _NO_PROGRESS.search(text, found.end()):
        return None
    left = groups.get("left")
    if not left and (eta := _ETA.search(text, found.end())):
        left = eta[1] + eta[2]
    return _reading(fraction, _clock_s(left or ""))


def _reading(fraction: float | None, left_s: float | None) -> Reading | None:
    return None if fraction is None else Reading(fraction, left_s)


def _per_cent(text: str) -> float | None:
    value = float(text)
    return value / 100 if value <= 100 else None


def _fraction(done: str, total: str, done_scale: str = "", total_scale: str = "") -> float | None:
    try:
        k = float(done.replace(",", "")) * _SCALE[done_scale]
        n = float(total.replace(",", "")) * _SCALE[total_scale]
    except ValueError:
        return None
    return k / n if 0 < n < _MAX_COUNT and k <= n else None


def _clock_s(text: str) -> float | None:
    """Return the seconds of ``1:02:03``, ``02:03`` or ``3s``; None for another text, such as ``?``."""
    parts = text.removesuffix("s").split(":")
    if len(parts) > 3 or not all(part.isdecimal() and len(part) < 7 for part in parts):
        return None
    seconds = 0
    for part in parts:
        seconds = seconds * 60 + int(part)
    return float(seconds)


class ProgressMeter:
    """The progress of one job, updated with its pages.

    A bar within an epoch counts as part of the epoch. A bar that starts again is another one: the progress is always
    that of the current bar.

    Args:
        redact: Redacts the line that is shown.
    """

    def __init__(self, redact: Callable[[str], str] = str) -> None:
        self._redact = redact
        self._unread: tuple[list[bytes], int] | None = None
        self._read_s = float("-inf")
        self._progress: Progress | None = None
        self._first: tuple[float, int] = (0.0, 0)
        self._epoch: Reading | None = None

    def add_page(self, page: LogPage, now_s: float) -> None:
        """Add a page. It is read now if the last one was read a second ago, else when the progress is needed.

        Args:
            page: The page.
            now_s: Seconds of a monotonic clock.
        """
        self._unread = page.last_lines(_LAST_LINES), page.runs[-1].time_unix_nano
        if now_s - self._read_s >= _READ_INTERVAL_S:
            self._read_s = now_s
            self._read_lines()

    @property
    def progress(self) -> Progress | None:
        """The last progress; None before the first."""
        self._read_lines()
        return self._progress

    def _read_lines(self) -> None:
        if self._unread is None:
            return
        lines, at_unix_nano = self._unread
        self._unread = None
        newest: tuple[Reading, str] | None = None
        for line in reversed(lines):
            # Only the end of a long line can be a bar that overwrites itself.
            if len(line) > _MAX_LINE_BYTES:
                line = line[-_MAX_LINE_BYTES:]
                if b"\r" not in line:
                    continue
                line = line[line.index(b"\r") :]
            text = clean(line)
            reading = read_line(text)
            if reading is None:
                continue
            newest = newest or (reading, text)
            if reading.epochs is not None:
                self._epoch = reading
                break
        if newest is not None:
            self._update(*newest, at_unix_nano)

    def _update(self, reading: Reading, text: str, at_unix_nano: int) -> None:
        fraction, left_s = reading.fraction, reading.left_s
        epoch = self._epoch
        if epoch is not None and epoch.epochs is not None and reading.epochs is None:
            fraction, left_s = min(1.0, epoch.fraction + fraction / epoch.epochs), None
        if self._progress is None or fraction < self._progress.fraction:
            self._first = fraction, at_unix_nano
        if left_s is None:
            left_s = self._left_s(fraction, at_unix_nano)
        self._progress = Progress(
            fraction=fraction,
            eta_s=left_s,
            seen_unix_nano=at_unix_nano,
            source="log",
            text=self._redact(text.strip())[:_TEXT_CHARS],
        )

    def _left_s(self, fraction: float, at_unix_nano: int) -> float | None:
        """Return the time left at the pace since this bar was first seen; None in its first second."""
        first, first_ns = self._first
        took_s = (at_unix_nano - first_ns) / 1e9
        if fraction >= 1:
            return 0.0
        return took_s * (1 - fraction) / (fraction - first) if fraction > first and took_s >= 1 else None
