"""Builds that are wrong on purpose, each under the fault that must find it out, and by what."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

from tests.prove import endpoint, jobservice
from tests.prove.endpoint import EndpointFault
from tests.prove.jobservice import ServiceFault
from tests.prove.mutant import Mutant
from tests.prove.scenarios import Scenario
from tests.prove.table import Row

_PATIENCE_S = 30.0
_UNDER: dict[str, EndpointFault | ServiceFault] = {
    fault.name: fault for fault in (*endpoint.FAULTS, *jobservice.FAULTS)
}


@dataclass(frozen=True)
class WrongBuild:
    """A row: it is ok when the fault finds the build out.

    Attributes:
        mutant: What is wrong.
        fault: The name of the fault that shows it.
        found_by: Words of the verdict that must be there.
    """

    mutant: Mutant
    fault: str
    found_by: str

    def scenario(self) -> Scenario:
        """Return the row."""
        return Scenario(f"wrong build: {self.mutant.name}", self._run)

    def _run(self, seed: str) -> Row:
        fault = _UNDER[self.fault]
        with tempfile.TemporaryDirectory(prefix="prove-mutant-") as directory:
            settings = replace(fault.settings, path=self.mutant.build(Path(directory, "build")))
            row = replace(fault, settings=settings, timeout_s=_PATIENCE_S).scenario().row_of(seed)
        if self.found_by in row.verdict:
            return Row("", notes=[f"found by {self.fault!r}: {row.verdict[:120]}"])
        return Row("", problems=[f"{self.fault!r} does not find {self.found_by!r}, but: {row.verdict}"])


BUILDS = (
    WrongBuild(
        Mutant(
            "skips a page now and then",
            "tailspan_agent/receiver/tailer.py",
            "                    await pipeline.send_page(page)\n                    left",
            "                    if lines % 3:\n                        await pipeline.send_page(page)\n"
            "                    else:\n                        pipeline.skip_to(page.cursor)\n"
            "                    left",
        ),
        "job service: lines visible late (to 5 s), without a final read",
        "missing",
    ),
    WrongBuild(
        Mutant(
            "takes a 500 for an ack",
            "tailspan_agent/exporter/outcome.py",
            "    if status >= 500 or",
            "    if status == 500:\n        return Delivered()\n    if status >= 500 or",
        ),
        "500, then healed",
        "missing",
    ),
    WrongBuild(
        Mutant(
            "takes a timeout for an ack",
            "tailspan_agent/exporter/http.py",
            "        if isinstance(error, TimeoutError | TOO_SLOW):\n",
            "        if isinstance(error, TimeoutError | TOO_SLOW):\n"
            "            from tailspan_agent.exporter.outcome import Delivered\n\n            return Delivered()\n",
        ),
        "hang",
        "missing",
    ),
    WrongBuild(
        Mutant(
            "forgets what was refused",
            "tailspan_agent/exporter/retry.py",
            "                await self._dead_letter.add(",
            "                if count:\n                    break\n                await self._dead_letter.add(",
        ),
        "400 for some batches",
        "0 records in the dead letter",
    ),
    WrongBuild(
        Mutant(
            "takes a part for all",
            "tailspan_agent/exporter/outcome.py",
            "    if rejected > 0:\n",
            "    if rejected > 7:\n",
        ),
        "partial_success, 7 rejected",
        "missing",
    ),
    WrongBuild(
        Mutant(
            "sends one half of what is too large",
            "tailspan_agent/exporter/retry.py",
            "        for part, part_count in parts:\n",
            "        for part, part_count in parts[:1]:\n",
        ),
        "413 over 100 records",
        "missing",
    ),
    WrongBuild(
        Mutant(
            "sends the newest first",
            "tailspan_agent/pipeline/queue.py",
            "            chunk = self._queue[0]\n",
            "            self._queue.rotate(1)\n            chunk = self._queue[0]\n",
        ),
        "endpoint accepts nothing (half-open)",
        "out of order",
    ),
    WrongBuild(
        Mutant(
            "looks back into no window",
            "tailspan_agent/receiver/tailer.py",
            "late_window_s=self.watch.late_window\n",
            "late_window_s=0.0\n",
        ),
        "job service: lines visible late (to 5 s), without a final read",
        "missing",
    ),
    WrongBuild(
        Mutant(
            "has no final read",
            "tailspan_agent/receiver/reconcile.py",
            "    if not uids:\n",
            "    if True:\n",
        ),
        "job service: lines visible after the window",
        "missing",
    ),
    WrongBuild(
        Mutant(
            "has done with a job at its receipt",
            "tailspan_agent/receiver/lifecycle.py",
            "    late_lines = life.end_mark is None",
            "    late_lines = life.end_mark is False",
        ),
        "job service: lines visible after the receipt",
        "the lines that came later",
    ),
    WrongBuild(
        Mutant(
            "takes equal lines for one",
            "tailspan/services/fused/window.py",
            "                occurrence = repeats.get(digest, 0)\n                repeats[digest] = occurrence + 1\n",
            "                occurrence = repeats.get(digest, 0)\n                repeats[digest] = 1\n"
            "                if occurrence:\n                    continue\n",
        ),
        "job service: equal lines that are two",
        "missing",
    ),
    WrongBuild(
        Mutant(
            "has times that are a millisecond off",
            "tailspan/services/fused/window.py",
            "            add_time(nano + (",
            "            add_time(1_000_000 + nano + (",
        ),
        "job service: HTML",
        "wrong time",
    ),
    WrongBuild(
        Mutant(
            "has uids that change with each read",
            "tailspan/services/fused/window.py",
            '                prefix = b"%d\\x000\\x00" % nano\n',
            '                prefix = b"%d\\x00%d\\x00" % (nano, id(self))\n',
        ),
        "job service: equal lines that are two",
        "uid unstable",
    ),
    WrongBuild(
        Mutant(
            "has span ids by chance",
            "tailspan/_identity.py",
            "    return _digest(identity, job_id, str(attempt), kind)[:8].hex()\n",
            "    import os\n\n    return os.urandom(8).hex()\n",
        ),
        "job service: status that flaps",
        "spans other id",
    ),
    WrongBuild(
        Mutant(
            "counts a run each time that it ends",
            "tailspan_agent/checkpoint/store.py",
            "SET ended = 1 WHERE key = ? AND ended = 0",
            "SET ended = 1 WHERE key = ?",
        ),
        "job service: runs again after its end",
        "2 runs instead of 1",
    ),
)
