"""Why a job failed, from its last lines."""

import sys
import traceback
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan_agent.analysis.failure import Failure, failure_of


class OutOfTilesError(Exception):
    """An exception of a module: its traceback has a dotted name."""


def raise_plain() -> None:
    raise ValueError("no such tile: 7")


def raise_without_message() -> None:
    raise KeyboardInterrupt


def raise_own() -> None:
    raise OutOfTilesError("none left")


def raise_local() -> None:
    class Inner(Exception): ...

    raise Inner("local")


def raise_during() -> None:
    try:
        raise_plain()
    except ValueError:
        raise KeyError("while handling")  # noqa: B904 - the implicit chain is what is tested


def raise_from() -> None:
    try:
        raise ValueError("first\nof two lines")
    except ValueError as error:
        raise RuntimeError("second") from error


def raise_recursion() -> None:
    def again(depth: int) -> None:
        again(depth + 1)

    again(0)


def raise_syntax() -> None:
    compile("x = = 1", "script.py", "exec")


def raise_group() -> None:
    try:
        raise_from()
    except RuntimeError as error:
        members = [ValueError("a\nb"), ExceptionGroup("in it", [TypeError("t")]), error]
        raise ExceptionGroup("three went wrong", members)  # noqa: B904 - as above


def raise_group_from() -> None:
    try:
        raise_group()
    except ExceptionGroup as group:
        raise OSError(28, "No space left on device") from group


def raise_group_last() -> None:
    try:
        raise_plain()
    except ValueError as error:
        raise ExceptionGroup("it and another", [error, TypeError()]) from error


RAISERS = [
    raise_plain, raise_without_message, raise_own, raise_local, raise_during, raise_from, raise_recursion, raise_syntax,
    raise_group, raise_group_from, raise_group_last,
]  # fmt: skip


def printed_by_python(raiser: Callable[[], None]) -> tuple[str, str, str]:
    """Return the type, the message and the whole traceback as Python prints them."""
    try:
        raiser()
    except BaseException:
        kind, error, _ = sys.exc_info()
        assert kind is not None
        name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        message = error.msg if isinstance(error, SyntaxError) else str(error)
        return name, message.split("\n")[0], traceback.format_exc().rstrip("\n")
    raise AssertionError("it did not raise")


@pytest.mark.parametrize("raiser", RAISERS)
@pytest.mark.parametrize("after", [[], ["", "make: *** [all] Error 1"]])
def test_python_tracebacks_are_found_whole(raiser: Callable[[], None], after: list[str]) -> None:
    """Type, message and traceback are as Python prints them, including chains and groups, and without other lines."""
    name, message, printed = printed_by_python(raiser)
    failure = failure_of(["starting", "step 1", *printed.splitlines(), *after])
    assert failure is not None
    assert (failure.exception_type, failure.message) == (name, message)
    assert failure.stacktrace == printed


@pytest.mark.parametrize("prefix", ["[worker-3] ", "  worker 3 | ", "2024-05-12 12:00:00,123 "])
@pytest.mark.parametrize("raiser", [raise_from, raise_group, raise_recursion])
def test_a_prefix_of_constant_width_is_removed(prefix: str, raiser: Callable[[], None]) -> None:
    """Lines with the prefix of a launcher or container runtime give the same traceback."""
    name, message, printed = printed_by_python(raiser)
    failure = failure_of([prefix + line for line in printed.splitlines()])
    assert failure is not None
    assert (failure.exception_type, failure.message) == (name, message)


def test_a_logger_before_the_first_line() -> None:
    """A traceback whose first line has a logger's prefix is found."""
    printed = printed_by_python(raise_plain)[2]
    failure = failure_of(f"2024-05-12 ERROR app: {printed}".splitlines())
    assert failure is not None
    assert (failure.exception_type, failure.stacktrace) == ("ValueError", printed)


def test_the_last_traceback_wins() -> None:
    """An exception that was logged and handled is not the failure; the last one is."""
    first, last = printed_by_python(raise_plain)[2], printed_by_python(raise_own)[2]
    failure = failure_of([*first.splitlines(), "retrying", "", *last.splitlines()])
    assert failure is not None
    assert (failure.message, failure.stacktrace) == ("none left", last)


@pytest.mark.parametrize(
    "lines",
    [
        ["Traceback (most recent call last):"],
        ["Traceback (most recent call last):", "ValueError: no frame"],
        ["Traceback (most recent call last):", '  File "x.py", line 1, in f'],
        ["Traceback (most recent call last):", '  File "x.py", line 1, in f', "    f()", "and then it went on"],
        ["Traceback (most recent call last):", "  File x.py line 1", "ValueError: frame without quotes"],
        ["the words Traceback (most recent call last): in prose", '  File "x.py", line 1, in f', "ValueError: x"],
        ["  + Exception Group Traceback (most recent call last):", '  |   File "x.py", line 1', "no name"],
        ['  File "x.py", line 1, in f', "ValueError: without its first line"],
        ["ValueError: printed by hand"],
    ],
)
def test_text_that_looks_like_a_traceback(lines: list[str]) -> None:
    """Without header, frame and exception there is no traceback, only last lines."""
    failure = failure_of(lines)
    assert failure == Failure(exception_type=None, message=lines[-1], stacktrace=None, last_lines=tuple(lines))


def test_without_traceback_the_last_lines_count() -> None:
    """The last twenty lines that are not empty are kept, oldest first; the last is the message."""
    failure = failure_of([f"line {number}" for number in range(50)] + ["", "  "])
    assert failure is not None
    assert failure.last_lines == tuple(f"line {number}" for number in range(30, 50))
    assert failure.message == "line 49"


@pytest.mark.parametrize("lines", [[], ["", "   "]])
def test_no_output_no_failure(lines: list[str]) -> None:
    """A job that printed nothing has no failure."""
    assert failure_of(lines) is None


def test_everything_is_bounded() -> None:
    """Traceback, message and lines of any length fit into a record's attributes (64 KB)."""
    frames = [line for number in range(900) for line in (f'  File "{"d" * 200}.py", line {number}, in f', "    é()")]
    error = f"{'n' * 3000}: {'€' * 100_000}"
    failure = failure_of(["Traceback (most recent call last):", *frames, error])
    assert failure is not None
    assert failure.stacktrace is not None
    assert failure.stacktrace.startswith("Traceback (most recent call last):")
    assert "the middle is left out" in failure.stacktrace
    said = (failure.stacktrace, failure.message, failure.exception_type or "")
    assert sum(len(text.encode()) for text in said) <= 60_000
    assert sum(len(line.encode()) for line in failure.last_lines) <= 80_000


PIECES = st.sampled_from(
    ["Traceback (most recent call last):", "  + Exception Group Traceback (most recent call last):", "  | ", "    | ",
     '  File "x.py", line 3, in f', "    code", "ValueError: x", "KeyError", "  +-+---------------- 1 ----------------",
     "During handling of the above exception, another exception occurred:", "", " ", "x" * 50, ": ", "a.b.", "<locals>"]
)  # fmt: skip


@given(st.lists(st.lists(PIECES | st.text(max_size=5), max_size=4).map("".join), max_size=60))
def test_any_text_has_a_failure(lines: list[str]) -> None:
    """Any output gives no error, and every line of the failure is a line of the output."""
    failure = failure_of(lines)
    assert (failure is None) == (not any(line.strip() for line in lines))
    if failure is not None and failure.stacktrace is not None:
        printed = "\n".join(lines)
        assert all(line in printed for line in failure.stacktrace.split("\n"))
        assert failure.exception_type is not None


@pytest.mark.parametrize(
    "line",
    ["Traceback (most recent call last):", "a." * 500_000, "a" * 1_000_000 + "!", "  | " * 250_000, " " * 1_000_000,
     '  File "' + "x" * 1_000_000],
)  # fmt: skip
def test_hostile_lines_are_linear(line: str) -> None:
    """Long lines of almost the right format take linear time; with backtracking, they would never end."""
    head = ["Traceback (most recent call last):", '  File "x.py", line 1, in f']
    assert failure_of([*head, line] * 700) is not None
