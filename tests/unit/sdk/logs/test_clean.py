"""Lines without terminal control."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan.logs.clean import clean, is_clean, printable, split_long

# Bytes that matter to terminals come up far more often than in random bytes.
SPICE = [
    b"\x1b[31m", b"\x1b[0m", b"\x1b[2K", b"\x1b[1A", b"\x1b]0;title\x07", b"\x1b]8;;http://x\x1b\\", b"\x1b", b"\x1b[",
    b"\x1b]", b"\x1bP", b"\x1b(B", b"\x9b", "\x9b31m".encode(), "\x9d".encode(), "\x9c".encode(), b"\r", b"\r\n", b"\n",
    b"\0", b"\x07", b"\x08", b"\xff\xfe", b"\xc3", "é€😀".encode(), b" ", b"\t", b"50%", b"text",
]  # fmt: skip
LINES = st.lists(st.sampled_from(SPICE) | st.binary(max_size=6), max_size=12).map(b"".join)

GOLDEN = [
    (b"", ""),
    (b"plain", "plain"),
    (b"plain\n", "plain"),
    (b"plain\r\n", "plain"),
    (b"  kept blanks  \n", "  kept blanks  "),
    ("größe 10 €".encode(), "größe 10 €"),
    (b"\x1b[1;31mERROR\x1b[0m: no", "ERROR: no"),
    (b"\x1b[38;2;10;20;30mrgb\x1b[m", "rgb"),
    (b"\x1b[38:5:12mcolon\x1b[K", "colon"),
    (b"\x1b[?25l\x1b[2Khidden cursor\x1b[?25h", "hidden cursor"),
    (b"\x1b]0;a title\x07text", "text"),
    (b"\x1b]8;;https://example.org\x1b\\link\x1b]8;;\x1b\\", "link"),
    (b"\x1bP1$r0m\x1b\\dcs", "dcs"),
    (b"\x1bktitle\x1b\\screen", "screen"),
    (b"\x1b(Bcharset\x1b=", "charset"),
    (b"\x1b7saved\x1b8", "saved"),
    ("\x9b31mC1\x9b0m".encode(), "C1"),
    (b"cut \x1b[3", "cut "),
    (b"alone \x1b", "alone "),
    (b"\x1b]0;never ended, text is kept", "0;never ended, text is kept"),
    (b"10%\r50%\r100%", "100%"),
    (b"10%\r50%\r100%\r", "100%"),
    (b"10%\r50%\r100%\r\n", "100%"),
    (b"Downloading 100%\rDone", "Done"),
    (b"100%|####|\r          \r", "100%|####|"),
    (b"100%|####|\r\x1b[2K", "100%|####|"),
    (b"100%|####|\r\x1b[31m \x1b[0m\r", "100%|####|"),
    (b"\r\r\r", ""),
    (b"   \r", "   "),
    (b"a\0b\0", "ab"),
    (b"\x1b\0[31mred", "red"),
    (b"bad \xff\xfe bytes", "bad \ufffd\ufffd bytes"),
    (b"cut \xe2\x82", "cut \ufffd"),
    (b"two\nlines\n", "two\nlines"),
    (b"Traceback:\r\n  at x\r\nValueError\r\n", "Traceback:\n  at x\nValueError"),
    (b"tab\tand bell \x07", "tab\tand bell \x07"),
]


@pytest.mark.parametrize(("line", "text"), GOLDEN)
def test_golden(line: bytes, text: str) -> None:
    """Each kind of line reads as a person at a terminal would read it."""
    assert clean(line) == text


@given(LINES)
def test_cleaning_twice_changes_nothing(line: bytes) -> None:
    """A clean line stays as it is and has no control characters."""
    text = clean(line)
    assert clean(text.encode()) == text
    assert not re.search("[\x1b\r\0\x90\x98\x9b-\x9f]", text)


@given(LINES)
def test_is_clean_tells_what_cleaning_would_do(line: bytes) -> None:
    """A line that counts as clean loses at most its line ending; any other changes."""
    if is_clean(line):
        assert clean(line).encode() == line.rstrip(b"\n")
    else:
        assert clean(line).encode() != line


@given(st.lists(LINES.filter(lambda line: b"\n" not in line), min_size=1, max_size=5))
def test_lines_are_clean_together_if_each_is(lines: list[bytes]) -> None:
    """Many lines can be checked at once."""
    assert is_clean(b"\n".join(lines)) == all(map(is_clean, lines))


@pytest.mark.parametrize("unit", [b"\x1b]", b"\x1b[", b"\x1b[1;", b"\x1bP0", b"\r", b"\r\x1b[K ", b"\x1b", b"\xc2\x9d"])
def test_hostile_repetition_is_linear(unit: bytes) -> None:
    """A megabyte of the worst sequences is cleaned too; a search that backtracks would not end within the suite."""
    assert len(clean(unit * (1_000_000 // len(unit)))) <= 1_000_000


@pytest.mark.parametrize(
    ("line", "plain", "coloured"),
    [
        ("plain é", "plain é", "plain é"),
        ("\x1b[31mred\x1b[0m", "red", "\x1b[31mred\x1b[0m"),
        ("\x1b[31mred", "red", "\x1b[31mred\x1b[0m"),
        ("\x1b[2J\x1b[H\x1b[31mred\x1b[0m", "red", "\x1b[31mred\x1b[0m"),
        ("\x1b]0;owned\x07hi", "hi", "hi"),
        ("\x1b]52;c;cm0gLXJm\x07hi", "hi", "hi"),
        ("bell\x07 back\x08 del\x7f", "bell back del", "bell back del"),
        ("\x9b2Jc1 \x85\x84", "c1 ", "c1 "),
        ("secret\rharmless", "harmless", "harmless"),
        ("\x1b[32m50%\x1b[0m\r\x1b[32m \x1b[0m\r", "50%", "\x1b[32m50%\x1b[0m"),
        ("a\tb\nc", "a\tb\nc", "a\tb\nc"),
        ("\x1b[>4;2mmodify keys", "modify keys", "modify keys"),
    ],
)
def test_printable(line: str, plain: str, coloured: str) -> None:
    """A terminal gets text, and colours on request; nothing that moves, renames or reprograms it."""
    assert printable(line, colours=False) == plain
    assert printable(line, colours=True) == coloured


@given(LINES)
def test_printable_has_no_control_characters(line: bytes) -> None:
    """Whatever comes in, only colours come out, and they are reset."""
    text = line.decode("utf-8", "surrogateescape")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", printable(text, colours=False))
    coloured = printable(text, colours=True)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f]", re.sub("\x1b\\[[0-9;:]*m", "", coloured))
    assert "\x1b" not in coloured or coloured.endswith("\x1b[0m")


@given(st.text(max_size=200), st.integers(4, 20))
def test_parts_of_a_long_body_are_text(text: str, limit: int) -> None:
    """Parts are at most as long as the limit, each is UTF-8 by itself, and together they are the body."""
    body = text.encode()
    parts = split_long(body, limit)
    assert b"".join(parts) == body
    assert all(len(part) <= limit for part in parts)
    assert "".join(part.decode() for part in parts) == text
    assert len(parts) == 1 or all(parts)


@given(st.binary(max_size=100), st.integers(4, 20))
def test_a_body_that_is_no_text_is_split_all_the_same(body: bytes, limit: int) -> None:
    """Even bytes without any character boundary are split without loss and without end."""
    assert b"".join(split_long(body, limit)) == body
