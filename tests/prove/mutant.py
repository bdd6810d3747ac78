"""The proof of the proof: builds that are wrong in one place. The proof must find each of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = {"tailspan_agent": ROOT / "agent", "tailspan": ROOT / "sdk"}


@dataclass(frozen=True)
class Mutant:
    """A wrong build.

    Attributes:
        name: What is wrong with it.
        module: The file that is changed, such as ``tailspan_agent/pipeline/queue.py``.
        before: A text that is there once.
        after: What stands there instead.
    """

    name: str
    module: str
    before: str
    after: str

    def changed(self) -> str:
        """Return the module's text with the change.

        Raises:
            LookupError: The code has changed: the mutant must be adapted.
        """
        package, _, _ = self.module.partition("/")
        text = (PACKAGES[package] / self.module).read_text(encoding="utf-8")
        if text.count(self.before) != 1:
            raise LookupError(f"{self.module} does not have {self.before!r} once: adapt the mutant {self.name!r}")
        return text.replace(self.before, self.after)

    def build(self, into: Path) -> Path:
        """Copy both packages with this change and return what to put into PYTHONPATH."""
        for package, place in PACKAGES.items():
            shutil.copytree(place / package, into / package, ignore=shutil.ignore_patterns("__pycache__"))
        (into / self.module).write_text(self.changed(), encoding="utf-8")
        return into


CHECKPOINT_BEFORE_ACK = Mutant(
    "the checkpoint advances before the ack",
    "tailspan_agent/pipeline/queue.py",
    """
            sent = await self._send(batch, payload, count)
""",
    """
            from tailspan_agent.exporter.retry import DeliveryResult as Sent

            async def send(earlier, payload=payload, count=count):
                if earlier is not None:
                    await earlier
                await self._endpoint.deliver(payload, count)

            self._early = asyncio.create_task(send(getattr(self, "_early", None)))
            sent = Sent(count)
""",
)
