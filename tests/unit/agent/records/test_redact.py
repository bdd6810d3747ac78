"""Redaction of secrets."""

import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tailspan.config import RedactPattern, RedactSettings
from tailspan.errors import ConfigError
from tailspan.local.index import MAX_ENTRY_BYTES
from tailspan.logs.page import LineRun, LogPage, Stream
from tailspan.models import JobState, JobStatus
from tailspan_agent.records.encode import LogContext, encode_lines
from tailspan_agent.records.redact import REDACTED, Redactor

KEY = "-----BEGIN KEY-----\nMIIEvQIBADANBg\nkqhkiG9w0BAQEF\n-----END KEY-----\n"


def test_values_and_patterns_are_replaced(tmp_path: Path) -> None:
    """Values of variables and files, and matches of patterns, are redacted everywhere and counted."""
    (tmp_path / "token").write_text("file-secret\n")
    settings = RedactSettings(
        env=["DB_PASSWORD", "NOT_SET"],
        files=[tmp_path / "token"],
        patterns=[
            RedactPattern(literal="Bearer ", regex=r"Bearer \S+"),
            RedactPattern(regex=r"\b\d{4}-\d{4}\b", slow=True),
        ],
    )
    redactor = Redactor.from_settings(settings, {"DB_PASSWORD": "hunter22"})
    assert redactor is not None
    line = "login hunter22 with file-secret, Bearer abc.def, card 1234-5678, hunter22!"
    assert redactor.redact(line) == (f"login {REDACTED} with {REDACTED}, {REDACTED} card {REDACTED}, {REDACTED}!", 5)
    assert redactor.redact("nothing here") == ("nothing here", 0)
    assert redactor.ignored == ["redact.env NOT_SET has no value of 4 characters or more"]


@pytest.mark.parametrize("size", range(1, 20))
@pytest.mark.parametrize("text", ["hunter2-and-more", "pre AKIA0123456789ABCDEF", "key=hunter2hunter2 x"])
def test_a_secret_that_a_cut_divides(text: str, size: int) -> None:
    """Capture cuts a line over 1 MiB: no part of a secret is left on either side, and other text stays."""
    redactor = Redactor(
        {"a": "hunter2-and-more"}, [("AKIA", re.compile(r"AKIA\w{16}")), ("key=", re.compile(r"key=\w+"))]
    )
    size = min(size, len(text) - 1)
    first = "x" * (MAX_ENTRY_BYTES - size - 6) + " abcd " + text[:size]
    context = LogContext(trace_id=b"t" * 16, span_id=b"s" * 8, redactor=redactor)
    records = b""
    for number, line in enumerate((first, text[size:] + " tail of the line")):
        page = LogPage([line.encode()], [LineRun(1, number, Stream.STDOUT, 0, f"{number}-")], b"1")
        records += b"".join(records for records, _ in encode_lines(page, context=context).pieces)
    assert REDACTED.encode() in records
    assert b" tail of the line" in records
    assert b"xx abcd " in records
    secret = text.removeprefix("pre ").removesuffix(" x")
    cut = size - text.index(secret)
    for part in {secret[: max(cut, 0)], secret[max(cut, 0) :]}:
        assert len(part) < 2 or part.encode() + b" tail" not in records
        assert len(part) < 4 or part.encode() not in records


def test_names_and_keys_of_attributes_are_redacted() -> None:
    """They reach every record, and a job can put anything there."""
    redactor = Redactor({"a": "hunter22"})
    job = JobStatus.from_state(
        JobState.RUNNING,
        job_id="j",
        service="s",
        identity="i",
        trace_id="0" * 32,
        job_name="load hunter22",
        attributes={"key hunter22": "hunter22"},
    )
    redacted = redactor.redact_job(job)
    assert redacted.job_name == f"load {REDACTED}"
    assert redacted.attributes == {f"key {REDACTED}": REDACTED}


def test_no_settings_no_redactor() -> None:
    """Without secrets and patterns, nothing is searched."""
    assert Redactor.from_settings(RedactSettings(), {}) is None


def test_short_and_empty_values_are_ignored() -> None:
    """A value of three characters occurs by chance in many lines: it is ignored and reported."""
    redactor = Redactor({"redact.env A": "abc", "redact.env B": "   ", "redact.env C": "abcd"})
    assert redactor.redact("abc abcd ab") == (f"abc {REDACTED} ab", 1)
    assert [reason.split()[1] for reason in redactor.ignored] == ["A", "B"]


def test_a_secret_of_several_lines_is_found_line_by_line() -> None:
    """A private key is redacted although each record has one line of it."""
    redactor = Redactor({"redact.files key": KEY})
    printed = [line.encode() for line in KEY.splitlines()]
    assert redactor.redact_lines([b"key:", *printed]) == ([b"key:", *[REDACTED.encode()] * 4], 4)


def test_overlapping_secrets_leave_nothing() -> None:
    """If one secret starts within another, no part of either is left."""
    redactor = Redactor({"a": "abcda", "b": "dabcd", "c": "dabcdef"})
    assert redactor.redact("x abcdabcdef y") == (f"x {REDACTED} y", 1)
    assert Redactor({"a": "abab"}).redact("x ababab y") == (f"x {REDACTED} y", 1)


def test_a_pattern_is_searched_only_with_its_literal() -> None:
    """A line without the literal is unchanged, even if the regular expression would match."""
    redactor = Redactor({}, [("token=", re.compile(r"\w+=\w+"))])
    assert redactor.redact("key=value") == ("key=value", 0)
    assert redactor.redact("key=value token=x") == (f"{REDACTED} {REDACTED}", 2)


def test_secrets_are_not_shown() -> None:
    """Neither repr nor the list of ignored values shows one."""
    redactor = Redactor({"redact.env A": "hunter22", "redact.env B": "abc"}, [("pw", re.compile("pw.*"))])
    assert repr(redactor) == "<Redactor(secrets=1, patterns=1)>"
    assert "abc" not in str(redactor.ignored)


def test_an_unreadable_file_is_an_error(tmp_path: Path) -> None:
    """An unknown secret cannot be redacted: that is an error, not a warning."""
    with pytest.raises(ConfigError, match=r"cannot read .*missing") as caught:
        Redactor.from_settings(RedactSettings(files=[tmp_path / "missing"]), {})
    assert caught.value.key == "redact.files"


@given(st.lists(st.text("ab-", min_size=4, max_size=7), min_size=1, max_size=4), st.lists(st.text("ab-"), max_size=4))
def test_no_secret_is_left(secrets: list[str], between: list[str]) -> None:
    """No secret is left, whatever is around it and however secrets overlap; other text is kept."""
    redactor = Redactor({str(index): secret for index, secret in enumerate(secrets)})
    text = "-".join(part for pair in zip(between, secrets, strict=False) for part in pair)
    redacted, count = redactor.redact(text)
    assert not any(secret.strip() in part for part in redacted.split(REDACTED) for secret in secrets)
    assert count == redacted.count(REDACTED)
    assert redactor.redact_lines([b"x", text.encode()])[0] == [b"x", redacted.encode()]


@given(st.lists(st.text("aCDERT", min_size=4, max_size=9), min_size=1, max_size=4), st.lists(st.text("aCDERT")))
@example(["REDACT"], ["REDACTED"])
def test_what_is_redacted_stays_as_it_is(secrets: list[str], between: list[str]) -> None:
    """Names and errors may pass twice; a secret may be a part of the mark."""
    redactor = Redactor(dict(enumerate(secrets)))  # type: ignore[arg-type]
    once, _ = redactor.redact(
        "".join(f"{text}{secret}" for text, secret in zip(between, secrets * len(between), strict=False))
    )
    assert redactor.redact(once) == (once, 0)


@given(st.lists(st.text(max_size=8), max_size=5))
def test_lines_without_secrets_are_unchanged(lines: list[str]) -> None:
    """A page without secrets comes back as it is."""
    redactor = Redactor({"a": "hunter22"})
    assert redactor.redact_lines([line.encode() for line in lines]) == ([line.encode() for line in lines], 0)


@given(st.integers(0, 7), st.sampled_from(["hunter22", "hunhunter"]))
def test_the_beginning_of_a_secret_is_left_out(size: int, secret: str) -> None:
    """An open line may end within a secret; a whole one is redacted, and other text stays."""
    redactor = Redactor({"a": "hunter22", "b": "hunhunter"})
    assert redactor.redact_open(f"login {secret[:size]}") == "login "
    assert redactor.redact_open(f"login {secret}, ok") == f"login {REDACTED}, ok"
    assert redactor.redact_open("Continue? ") == "Continue? "


def test_a_pattern_needs_the_whole_line() -> None:
    """What it may match is not known before: nothing of an open line is left."""
    redactor = Redactor({}, [("user", re.compile(r"user=\S+"))])
    assert redactor.redact_open("Continue? ") == ""
