"""`tailspan._secrets`: every form in which a server may quote a token is masked, and nothing else."""

from __future__ import annotations

import base64
import html
import json
import logging
from collections.abc import Callable
from datetime import UTC, datetime
from urllib.parse import quote, quote_plus

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tailspan import _secrets
from tailspan._secrets import MASK, add_secret, mask, mask_and_cut
from tailspan.errors import ServiceUnavailableError
from tailspan.services._requests import error_text
from tailspan_agent.commands.check import Finding
from tailspan_agent.exporter.outcome import classify_grpc, classify_http
from tailspan_agent.process.logging_setup import LineFormatter
from tests.property.effort import fuzz

TOKEN = 'Tok/en+s=cr"e&t-9fQ7x'
FORMS = {
    "as it is": TOKEN,
    "with its scheme": f"Bearer {TOKEN}",
    "for a URL": quote(TOKEN, safe=""),
    "for a form": quote_plus(TOKEN),
    "for a URL, twice": quote(quote(TOKEN, safe=""), safe=""),
    "every character for a URL": "".join(f"%{ord(char):02x}" for char in TOKEN),
    "as JSON": json.dumps(TOKEN)[1:-1],
    "as JSON in JSON": json.dumps(json.dumps(TOKEN))[3:-3],
    "as JSON with escaped slashes": json.dumps(TOKEN)[1:-1].replace("/", "\\/"),
    "every character as JSON": "".join(f"\\u{ord(char):04X}" for char in TOKEN),
    "as HTML": html.escape(TOKEN),
    "every character as HTML": "".join(f"&#{ord(char)};" for char in TOKEN),
    "as a Python literal": repr(TOKEN.encode())[2:-1],
    "in hexadecimal": TOKEN.encode().hex(),
    "in upper hexadecimal": TOKEN.encode().hex().upper(),
    "in upper case": TOKEN.upper(),
    "without its end": TOKEN[:-3],
    "without its end, for a URL": quote(TOKEN[:-3], safe=""),
    "in lines": "\r\n".join(TOKEN),
    "with control characters": "\x1b".join(TOKEN),
    **{
        f"in base64 after {before} bytes": base64.b64encode(b"x" * before + TOKEN.encode()).decode().rstrip("=")
        for before in range(3)
    },
    "in base64 for URLs": base64.urlsafe_b64encode(TOKEN.encode()).decode().rstrip("="),
}


@pytest.fixture(autouse=True)
def secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that uses one token."""
    monkeypatch.setattr(_secrets, "_secrets", {})
    add_secret(f"Bearer {TOKEN}")


def leaks(text: str) -> bool:
    """Return whether eight characters of a form are left anywhere; in base64 some at its edges are not known."""
    return any(form[at : at + 8] in text for form in FORMS.values() for at in range(4, len(form) - 12))


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_each_form_is_masked(form: str) -> None:
    """In the middle of a text, and cut off at its end."""
    text = mask(f"no access with {form} at all")
    assert MASK in text
    assert not leaks(text)
    assert mask(f"invalid: {TOKEN[:11]}...") == f"invalid: {MASK}..."


PASSWORD = 'Pa\\ss"wo\\\\rd\\t9'


ESCAPED = [
    PASSWORD,
    json.dumps(PASSWORD),
    json.dumps(json.dumps(PASSWORD)),
    repr(PASSWORD),
    repr(PASSWORD.encode()),
    quote(PASSWORD),
    PASSWORD.encode().hex(":"),
    PASSWORD.encode().hex("-").upper(),
    "".join(f"\\{ord(char):03o}" for char in PASSWORD),
    "".join(f"\\u{{{ord(char):x}}}" for char in PASSWORD),
]


@pytest.mark.parametrize("form", ESCAPED)
def test_a_password_with_backslashes_is_masked(form: str) -> None:
    """A password may have any characters, and each language escapes them in its own way."""
    add_secret("Basic " + base64.b64encode(f"me:{PASSWORD}".encode()).decode())
    text = mask(f"no access with {form} at all")
    assert MASK in text
    assert len(text) < 45


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_messages_are_masked_before_they_are_cut(form: str) -> None:
    """Whatever the place of the cut: errors of services, outcomes of HTTP and gRPC, and the log."""
    for before in (270, 280, 290, 298, 480, 490, 498):
        echo = "x" * before + form + "y" * 900
        assert not leaks(error_text(json.dumps({"message": echo}).encode()))
        assert not leaks(str(classify_http("logs", 503, {}, echo.encode(), 1, datetime.now(UTC))))
        assert not leaks(str(classify_grpc("UNAVAILABLE", echo, None)))


def test_errors_and_log_lines_are_masked() -> None:
    """Each message passes one place, also with a traceback."""
    assert str(ServiceUnavailableError(f"503 {TOKEN}")) == f"503 {MASK}"
    try:
        raise RuntimeError(f"no {TOKEN}")
    except RuntimeError as error:
        record = logging.makeLogRecord(
            {"name": "x", "msg": "failed %s", "args": (TOKEN,), "exc_info": (RuntimeError, error, error.__traceback__)}
        )
    line = LineFormatter().format(record)
    assert line.count(MASK) == 2
    assert not leaks(line)


def test_user_and_password_are_masked_apart_and_together() -> None:
    """A Basic header is quoted as it is, or decoded."""
    add_secret("Basic " + base64.b64encode(b"someone:pa55word-long").decode())
    for quoted in ("someone:pa55word-long", "pa55word-long", base64.b64encode(b"someone:pa55word-long").decode()):
        assert mask(f"<{quoted}>") == f"<{MASK}>"


ESCAPES: dict[str, Callable[[str], str]] = {
    "plain": str,
    "percent": lambda text: quote(text, safe=""),
    "all percent": lambda text: "".join(f"%{byte:02X}" for byte in text.encode()),
    "JSON": lambda text: json.dumps(text)[1:-1],
    "all JSON": lambda text: "".join(f"\\u{ord(char):04x}" for char in text),
    "HTML": html.escape,
    "all HTML": lambda text: "".join(f"&#x{ord(char):x};" for char in text),
    "literal": lambda text: repr(text.encode())[2:-1],
}
ENCODINGS: dict[str, Callable[[str], str]] = {
    "plain": str,
    "upper case": str.upper,
    "hexadecimal": lambda text: text.encode().hex(),
    "base64": lambda text: base64.b64encode(text.encode()).decode(),
    "base64 for URLs": lambda text: base64.urlsafe_b64encode(text.encode()).decode(),
}
# A plus sign is a space in a form, and a backslash escapes: both are left out of comparisons.
TOKENS = st.text(st.characters(min_codepoint=33, max_codepoint=126, exclude_characters="+\\"), min_size=10, max_size=40)


def channels(text: str) -> dict[str, str]:
    """Return what is shown of a text that a server sent, by where it is shown."""
    body = json.dumps({"message": text}).encode()
    record = logging.makeLogRecord({"name": "x", "msg": "failed: %r %s", "args": (text, text)})
    return {
        "error": str(ServiceUnavailableError(text)),
        "repr": repr(ServiceUnavailableError(text)),
        "body of a job service": error_text(body),
        "body of an endpoint": str(classify_http("logs", 503, {}, text.encode(), 1, datetime.now(UTC))),
        "gRPC": str(classify_grpc("UNAVAILABLE", text, None)),
        "log": LineFormatter().format(record),
        "agent check": Finding("service", text).text,
    }


@fuzz(100)
@given(
    TOKENS.filter(lambda token: len(set(token.lower())) > 5),
    st.sampled_from(list(ENCODINGS.values())),
    st.lists(st.sampled_from(list(ESCAPES.values())), max_size=2),
    st.text(max_size=20),
)
def test_no_form_of_a_token_is_shown_anywhere(token, encoding, escapes, around) -> None:
    """Also of a token that looks like an escape itself; and what is masked stays as it is when masked again."""
    _secrets._secrets.clear()
    add_secret(f"Bearer {token}")
    form = encoding(token)
    for escape in escapes:
        form = escape(form)
    text = f"{around}<{form}>{around}"
    assert mask(mask(text)) == mask(text)
    encoded = encoding(token).lower().replace("+", "")
    parts = [encoded[at : at + 8] for at in range(2, len(encoded) - 9)]
    ours = channels("")
    for where, shown in channels(text).items():
        for plain, _, _ in _secrets._unescaped(shown):
            assert not [part for part in parts if part in plain and part not in ours[where].lower()], where


def test_a_token_that_looks_like_an_escape_is_masked() -> None:
    """As it is, and with more escapes around it."""
    add_secret("tok0000001%23abc")
    for form in ("tok0000001%23abc", "tok0000001%2523abc", "tok&#48;000001%23abc"):
        assert mask(f"<{form}>") == f"<{MASK}>"


def test_short_values_and_old_tokens() -> None:
    """A short value occurs in any message; of many rotated tokens the newest are known."""
    add_secret("short")
    assert mask("a short text") == "a short text"
    for number in range(150):
        add_secret(f"rotated-{number:04d}-x")
    assert mask("rotated-0149-x rotated-0000-x") == f"{MASK} rotated-0000-x"


@given(st.text(max_size=300), st.integers(min_value=1, max_value=100))
def test_other_text_stays_as_it_is(text: str, most: int) -> None:
    """Without a secret in it nothing changes; with it, nothing but the secret."""
    assert mask(text) == text
    assert mask_and_cut(text, most, "...") == (text if len(text) <= most else text[:most] + "...")
    assert mask(f"{text} {TOKEN} {text}") == f"{text} {MASK} {text}"
