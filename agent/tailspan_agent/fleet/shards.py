"""Shards: the parts of all jobs that agents share out among themselves. Pure.

A shard is the unit of ownership. A job's shard follows from its identity alone, so it never changes and no agent has to
ask for it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from hashlib import sha256
from uuid import UUID

__all__ = ["METRICS_LEASE", "SHARDS", "fair_share", "job_uuid", "shard_of", "surplus"]

SHARDS = 256
METRICS_LEASE = SHARDS
"""The number of the lease whose holder exports what the whole fleet counts; not a shard."""


def job_uuid(identity: str, job_id: str) -> UUID:
    """Return the key of a job in the fleet's database; its first byte is the shard.

    Args:
        identity: The identity of the job's service.
        job_id: The job.
    """
    return UUID(bytes=sha256(f"{identity}\0{job_id}".encode(errors="surrogatepass")).digest()[:16])


def shard_of(identity: str, job_id: str) -> int:
    """Return the shard of a job, 0 to 255."""
    return sha256(f"{identity}\0{job_id}".encode(errors="surrogatepass")).digest()[0]


def fair_share(agent: int, agents: Sequence[int]) -> int:
    """Return how many shards an agent is to own, so that all agents together own each shard once.

    Shares differ by one at most; the agents that joined first have the larger ones.

    Args:
        agent: The agent.
        agents: All agents that take shards; an agent that is not among them owns none.
    """
    if agent not in agents:
        return 0
    share, extra = divmod(SHARDS, len(agents))
    return share + (sorted(agents).index(agent) < extra)


def surplus(owned: Collection[int], share: int) -> list[int]:
    """Return the shards to hand over: the largest numbers, so that what an agent keeps changes little."""
    return sorted(owned)[max(0, share) :]
