"""`Gathering`: answers the questions of many jobs with one request, because quotas count requests."""

from __future__ import annotations

import copy
import time
from collections.abc import Awaitable, Callable, Hashable, Sequence
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel

from tailspan.errors import ServiceError

__all__ = ["Gathering", "Waiting"]

Q = TypeVar("Q")
A = TypeVar("A")

_LATELY_S = 2.0


class Waiting(Generic[Q, A]):
    """A question that waits for its answer.

    Attributes:
        question: The question.
        answer: Its answer; None before.
        error: The error instead of an answer.
    """

    __slots__ = ("answer", "error", "question")

    def __init__(self, question: Q) -> None:
        self.question = question
        self.answer: A | None = None
        self.error: ServiceError | None = None

    @property
    def is_over(self) -> bool:
        """Whether there is an answer or an error."""
        return self.answer is not None or self.error is not None


class Gathering(Generic[Q, A]):
    """The questions of all jobs that wait for the next request of one kind.

    While a request is on its way, questions gather for the next one. Each also waits for others until the next multiple
    of `gather_s` of the clock, unless there were none lately.
    """

    def __init__(
        self,
        choose: Callable[[Waiting[Q, A], Sequence[Waiting[Q, A]]], list[Waiting[Q, A]]],
        answer: Callable[[list[Waiting[Q, A]]], Awaitable[None]],
        gather_s: float,
        job_of: Callable[[Q], Hashable],
    ) -> None:
        """Send nothing yet.

        Args:
            choose: Returns which questions one request answers: the first one, and others that fit.
            answer: Sets the answer or the error of each of them, or raises an error for those that have none.
            gather_s: How long a question waits for others, at most, in seconds.
            job_of: Returns the job that a question is about.
        """
        self._choose = choose
        self._answer = answer
        self._gather_s = gather_s
        self._job_of = job_of
        self._waiting: dict[Waiting[Q, A], None] = {}
        self._turn: anyio.Lock | None = None
        self._loop: object = None
        self._last_jobs: set[Hashable] = set()
        self._last_s = 0.0

    @property
    def gather_s(self) -> float:
        """How long a question waits for others at present, in seconds; 0 if there were none lately."""
        return self._gather_s if len(self._jobs_lately()) > 1 else 0.0

    def _jobs_lately(self) -> set[Hashable]:
        return self._last_jobs if time.monotonic() - self._last_s < _LATELY_S else set()

    async def ask(self, question: Q) -> A:
        """Return the answer to a question.

        Raises:
            ServiceError: The request failed.
        """
        # Locks belong to an event loop: after a fork and in the next loop they would never be released.
        loop = anyio.lowlevel.current_token()
        if self._turn is None or self._loop != loop:
            self._turn, self._loop, self._waiting = anyio.Lock(), loop, {}
        waiting: Waiting[Q, A] = Waiting(question)
        self._waiting[waiting] = None
        try:
            async with self._turn:
                # One question sends the request for all; the others find their answer when their turn comes.
                if not waiting.is_over:
                    if self._jobs_lately() - {self._job_of(question)}:
                        await anyio.sleep(self._gather_s - time.monotonic() % self._gather_s)
                    await self._send(waiting)
        finally:
            self._waiting.pop(waiting, None)
        if waiting.error is not None:
            raise copy.copy(waiting.error)
        assert waiting.answer is not None
        return waiting.answer

    async def _send(self, first: Waiting[Q, A]) -> None:
        batch = self._choose(first, [one for one in self._waiting if one is not first and not one.is_over])
        self._last_jobs, self._last_s = {self._job_of(one.question) for one in batch}, time.monotonic()
        try:
            await self._answer(batch)
        except ServiceError as error:
            for one in batch:
                if not one.is_over:
                    one.error = error
