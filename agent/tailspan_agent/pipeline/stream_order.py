"""`StreamOrder`: the order in which jobs of one stream catch up, oldest first.

Loki rejects lines that are more than an hour behind the newest line of their stream, and the jobs of one pipeline share
a stream. While several of them catch up, a job whose next lines are much newer waits for the older ones.
"""

from __future__ import annotations

import asyncio
import heapq
from itertools import count

__all__ = ["CatchUp", "StreamOrder"]

_WINDOW_NS = 30 * 60 * 1_000_000_000
"""Half of Loki's out-of-order window (``max_chunk_age / 2``, one hour by default): room for what is in flight."""
_SPARE = 64


class StreamOrder:
    """Jobs that are catching up, grouped by Loki stream and ordered by their next timestamp.

    A step costs the logarithm of the number of jobs: ten thousand jobs of one pipeline may start at one moment.
    """

    def __init__(self) -> None:
        self._streams: dict[str, _StreamMembers] = {}

    def join(self, stream: str, member: object, position_ns: int = 0) -> None:
        """Add a member that has lines to relay, or move it to another time.

        Args:
            stream: What Loki stores as one stream.
            member: The job that catches up.
            position_ns: The time of its next lines as far as known, in ns since the epoch. 0, for an unknown time, lets
                all others wait.
        """
        found = self._streams.get(stream)
        if found is None:
            found = self._streams[stream] = _StreamMembers()
        found.put(member, position_ns)

    def leave(self, stream: str, member: object) -> None:
        """Remove a member that has caught up or gave up for now; leaving twice is fine."""
        found = self._streams.get(stream)
        if found is not None:
            found.remove(member)
            if not found.members:
                del self._streams[stream]

    async def turn(self, stream: str, member: object) -> None:
        """Wait while another member of the stream is so far behind that Loki would reject its lines after ours."""
        while (found := self._streams.get(stream)) is not None and not found.is_next(member):
            await found.wait(member)


class _StreamMembers:
    """The members of one stream, those that wait, and who is the oldest.

    Attributes:
        members: The positions of the members.
    """

    def __init__(self) -> None:
        self.members: dict[object, int] = {}
        self._numbers = count()
        self._oldest: list[tuple[int, int, object]] = []
        self._waiting: list[tuple[int, int, asyncio.Future[None]]] = []

    def put(self, member: object, position_ns: int) -> None:
        if self.members.get(member) != position_ns:
            self.members[member] = position_ns
            heapq.heappush(self._oldest, (position_ns, next(self._numbers), member))
            self._admit()

    def remove(self, member: object) -> None:
        if self.members.pop(member, None) is not None:
            self._admit()

    def is_next(self, member: object) -> bool:
        position_ns = self.members.get(member)
        return position_ns is None or position_ns <= self._limit_ns()

    async def wait(self, member: object) -> None:
        turn = asyncio.get_running_loop().create_future()
        heapq.heappush(self._waiting, (self.members[member], next(self._numbers), turn))
        await turn

    def _limit_ns(self) -> float:
        """Return the latest position that may go on; also drop entries of members that left or moved."""
        oldest, members = self._oldest, self.members
        while oldest and members.get(oldest[0][2]) != oldest[0][0]:
            heapq.heappop(oldest)
        if len(oldest) > 2 * len(members) + _SPARE:
            oldest[:] = [(position_ns, next(self._numbers), member) for member, position_ns in members.items()]
            heapq.heapify(oldest)
        return oldest[0][0] + _WINDOW_NS if oldest else float("inf")

    def _admit(self) -> None:
        if not self._waiting:
            return
        limit_ns = self._limit_ns()
        while self._waiting and (self._waiting[0][0] <= limit_ns or self._waiting[0][2].done()):
            turn = heapq.heappop(self._waiting)[2]
            if not turn.done():
                turn.set_result(None)


class CatchUp:
    """The place of one job in the order of its stream, until the job has caught up.

    Args:
        order: The order.
        service_name: The service of the job.
        job_name: The job's name. If it is known, the job joins at once, at an unknown time: the order needs the oldest
            job of a pipeline before the first one is read.

    Attributes:
        catching_up: Whether the job has not caught up since it was found.
    """

    __slots__ = ("_order", "_stream", "catching_up")

    def __init__(self, order: StreamOrder, service_name: str, job_name: str) -> None:
        self.catching_up = True
        self._order = order
        self._stream = f"{service_name}/{job_name}"
        if job_name:
            order.join(self._stream, self)

    def move(self, service_name: str, job_name: str) -> None:
        """Leave the stream for that of another job name."""
        self.leave()
        self._stream = f"{service_name}/{job_name}"

    def leave(self) -> None:
        """Let the others of the stream continue; `turn` joins again."""
        self._order.leave(self._stream, self)

    async def turn(self, position_ns: int) -> None:
        """Wait for the job's turn; at once if it has caught up.

        Args:
            position_ns: The time of the job's next lines, in ns since the epoch.
        """
        if self.catching_up:
            self._order.join(self._stream, self, position_ns)
            await self._order.turn(self._stream, self)

    def caught_up(self) -> None:
        """Leave the stream for good."""
        self.catching_up = False
        self.leave()
