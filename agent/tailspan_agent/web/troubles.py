"""`Trouble`: what keeps the agent from relaying, as the banner of every page shows it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import msgspec

from tailspan._plural import plural
from tailspan.config.signals import SIGNALS, Signal
from tailspan_agent.exporter.retry import Outage

__all__ = ["Trouble", "troubles_of"]

_CHECK = "check otlp.endpoint, its credentials and otlp.signals"


class Trouble(msgspec.Struct, frozen=True, kw_only=True):
    """One problem of the agent.

    Attributes:
        subject: A signal, or the problem in words.
        state: ``retrying`` or ``paused``; empty for what is no outage.
        since_ns: The first failed attempt, in ns since the epoch; None if unknown.
        tries: Number of failed attempts; 0 if unknown.
        reason: Why the last attempt failed; empty if unknown.
    """

    subject: str
    state: str = ""
    since_ns: int | None = None
    tries: int = 0
    reason: str = ""

    @property
    def tail(self) -> str:
        """What follows the time: ``11 tries: connection refused``."""
        tries = f"{self.tries:,} {plural(self.tries, 'try', 'tries')}" if self.tries else ""
        return ": ".join(part for part in (tries, self.reason) if part)


def troubles_of(
    problems: Sequence[str], outages: Mapping[Signal, Outage], last_errors: Mapping[Signal, str | None]
) -> list[Trouble]:
    """Return the problems of an agent, its outages first, also those too young for ``/readyz``.

    Args:
        problems: The codes of ``/readyz``.
        outages: The failed attempts of each signal whose endpoint does not answer.
        last_errors: The last error of each signal.
    """
    paused = [signal for signal in SIGNALS if f"endpoint_{signal}_paused" in problems]
    return [*_outages(outages, paused, last_errors), *_others(problems)]


def _outages(
    outages: Mapping[Signal, Outage], paused: Sequence[Signal], last_errors: Mapping[Signal, str | None]
) -> Iterator[Trouble]:
    for signal in dict.fromkeys((*outages, *paused)):
        outage, state = outages.get(signal), "paused" if signal in paused else "retrying"
        if outage is None:
            yield Trouble(subject=signal, state=state, reason=last_errors.get(signal) or "")
            continue
        hint = f"; {_CHECK}" if state == "paused" else ""
        since_ns = int(outage.since_s * 1e9)
        yield Trouble(
            subject=signal, state=state, since_ns=since_ns, tries=outage.tries, reason=f"{outage.reason}{hint}"
        )


def _others(problems: Sequence[str]) -> Iterator[Trouble]:
    for problem in problems:
        code, _, rest = problem.partition(" ")
        if not code.startswith("endpoint_"):
            yield Trouble(subject=code.replace("_", " "), reason=rest)
