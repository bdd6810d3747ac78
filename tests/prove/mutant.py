"""The proof of the proof: builds of the agent that are wrong in one place. The sweep must find each of them."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

AGENT = Path(__file__).parents[2] / "agent"


@dataclass(frozen=True)
class Mutant:
    """A wrong build.

    Attributes:
        name: What is wrong with it.
        module: The file that is changed, below ``tailspan_agent``.
        before: A text that is there once.
        after: What stands there instead.
    """

    name: str
    module: str
    before: str
    after: str

    def build(self, into: Path) -> Path:
        """Copy the agent with this change and return what to put into PYTHONPATH.

        Raises:
            LookupError: The code has changed: the mutant has to be made anew.
        """
        shutil.copytree(AGENT, into, ignore=shutil.ignore_patterns("__pycache__"))
        path = into / "tailspan_agent" / self.module
        text = path.read_text()
        if text.count(self.before) != 1:
            raise LookupError(f"{self.module} does not have {self.before!r} once: adapt the mutant {self.name!r}")
        path.write_text(text.replace(self.before, self.after))
        return into


CHECKPOINT_BEFORE_ACK = Mutant(
    "the checkpoint advances before the ack",
    "lanes.py",
    """
            result = await self._outlet.send(payload, count)
""",
    """
            from tailspan_agent.sender import SendResult as Sent

            async def send(earlier, payload=payload, count=count):
                if earlier is not None:
                    await earlier
                await self._outlet.send(payload, count)

            self._sending = asyncio.create_task(send(getattr(self, "_sending", None)))
            result = Sent(count)
""",
)
