"""Changes of the configuration: no line is lost, and none is repeated."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass

from tests.fakes.collector import Collector, Reply
from tests.prove.jobs import NumberedJob
from tests.prove.scenarios import Scenario
from tests.prove.table import Row
from tests.prove.world import World

_LINES = 300
_FOLLOWS = "the agent follows"
_REFUSED = "logs: retrying since"
_WATCH_FUSED = re.compile(r'\[\[agent\.watch\]\]\nservice = "fused"\n(?:.+\n)*')


@dataclass(frozen=True)
class Change:
    """A row.

    Attributes:
        name: The row's name.
        act: Changes the configuration, while the jobs write.
    """

    name: str
    act: Callable[[World], None]

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(self.name, self._run)

    def _run(self, seed: str) -> Row:
        with World(seed) as world:
            for number in range(3):
                world.fused_job(f"fused-{number}")
            world.local_job("local-0", burst=20, pause_s=0.01)
            world.configure()
            speak(world)
            world.start(strict=True)
            world.until(lambda: all(world.acked(job) for job in world.jobs), "the first lines")
            speak(world)
            self.act(world)
            speak(world)
            row = Row(self.name, [world.finish()])
        if row.found[0].lines.repeated:
            row.problems.append(f"{row.found[0].lines.repeated} lines were repeated")
        return row


def speak(world: World) -> None:
    """Let the jobs write a little more."""
    for job in world.jobs:
        if isinstance(job, NumberedJob) and not job.ended:
            job.write(_LINES, world.random)


def restarted_with(world: World, change: Callable[[str], str]) -> None:
    """Stop the agent in good order and start it with a change."""
    world.terminate()
    assert world.ended() == 0
    speak(world)
    world.configure(change)
    before = world.log.count(_FOLLOWS)
    world.start(strict=True)
    # Before that it does not listen to signals yet: on a loaded machine the next stop would end it at its start.
    world.until(lambda: world.log.count(_FOLLOWS) > before, "the agent's start")
    time.sleep(1.0)


def renamed(text: str) -> str:
    """Return the configuration with both services under other names."""
    for old, new in (("fused", "cloud"), ("local", "here")):
        section, watch = f"[services.{old}]", f'service = "{old}"'
        assert section in text
        assert watch in text
        text = text.replace(section, f'[services.{new}]\ntype = "{old}"').replace(watch, f'service = "{new}"')
    return text


def unwatched(text: str) -> str:
    """Return the configuration without the watch of one service."""
    changed, count = _WATCH_FUSED.subn("", text)
    assert count == 1
    return changed


def watch_gone_and_back(world: World) -> None:
    """Take a watch away, let the jobs write on, and put it back."""
    world.reload(unwatched)
    speak(world)
    time.sleep(1.0)
    world.reload()


def other_attributes(world: World) -> None:
    """Change a watch's attributes, and back, so that each job gets a new tailer while lines are under way."""
    for value in ("a", "b", "c"):
        speak(world)
        world.reload(lambda text, value=value: text.replace('settle = "0.3s"', f'settle = "0.{ord(value) - 94}s"'))


def outage(world: World) -> None:
    """Reload, with and without changes, while the endpoint refuses everything."""
    for signal in ("logs", "traces"):
        world.collector.always(signal, Reply(503))
    speak(world)
    time.sleep(1.0)
    world.reload()
    world.reload(renamed)
    world.reload(unwatched)
    speak(world)
    world.reload()
    time.sleep(1.0)
    for signal in ("logs", "traces"):
        world.collector.always(signal, Reply())


def refuse(world: World) -> None:
    """Refuse everything from now on, and wait until the agent notices.

    Lines under way to an endpoint that the agent leaves may arrive, and the next endpoint receives them again, rightly.
    """
    refused = world.log.count(_REFUSED)
    for signal in ("logs", "traces"):
        world.collector.always(signal, Reply(503))
    speak(world)
    world.until(lambda: world.log.count(_REFUSED) > refused, "word of the refused lines")


def other_endpoint(world: World) -> None:
    """The endpoint refuses everything; a reload switches to another one, which also receives what was in flight."""
    refuse(world)
    old = world.collector
    world.fold()
    world.use(Collector())
    world.reload()
    assert not [request for request in old.requests if request.taken and request.signal != "metrics"]


def unknown_host(world: World) -> None:
    """The endpoint's name cannot be resolved for a while; a reload gives the right one."""
    refuse(world)
    world.settings.endpoint = "http://nowhere.invalid:4318"
    world.reload()
    speak(world)
    world.until(lambda: "nowhere.invalid" in world.log, "word of the unknown host")
    world.settings.endpoint = None
    for signal in ("logs", "traces"):
        world.collector.always(signal, Reply())
    world.reload()


def storm(world: World) -> None:
    """Forty signals while lines are under way, some with a change, some with a file that is broken."""
    for number in range(40):
        if number % 10 == 5:
            world.reload(lambda text: text + "\nnonsense = [")
        else:
            world.reload(unwatched if number % 4 == 1 else renamed if number % 4 == 3 else str)
        if number % 8 == 0:
            speak(world)


FAULTS = (
    Change("configuration: sections renamed, at a restart", lambda world: restarted_with(world, renamed)),
    Change("configuration: sections renamed, by SIGHUP", lambda world: world.reload(renamed)),
    Change("configuration: watch removed and added again", watch_gone_and_back),
    Change(
        "configuration: watch removed and added again, at restarts",
        lambda world: (restarted_with(world, unwatched), restarted_with(world, str))[0],
    ),
    Change("configuration: watches changed", other_attributes),
    Change("configuration: SIGHUP during an outage", outage),
    Change("configuration: SIGHUP to another endpoint during an outage", other_endpoint),
    Change("configuration: endpoint of an unknown host, then corrected", unknown_host),
    Change("configuration: forty SIGHUPs", storm),
)
