"""`Gathering`: answers many questions with one request, because quotas count requests."""

from __future__ import annotations

import copy
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

import anyio
import anyio.lowlevel

from tailspan.errors import ServiceError

__all__ = ["Gathering", "Waiting"]

Q = TypeVar("Q")
A = TypeVar("A")

# More than one question a second, on average.
_OFTEN, _LATELY_S = 4, 3.0


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

    While a request is on its way, questions gather for the next one. Where questions come often, each also waits until
    the next multiple of `gather_s` of the clock.
    """

    def __init__(
        self,
        choose: Callable[[Waiting[Q, A], Sequence[Waiting[Q, A]]], list[Waiting[Q, A]]],
        answer: Callable[[list[Waiting[Q, A]]], Awaitable[None]],
        gather_s: float,
    ) -> None:
        """Send nothing yet.

        Args:
            choose: Returns which questions one request answers: the first one, and others that fit.
            answer: Sets the answer or the error of each of them, or raises an error for all.
            gather_s: How long a question waits for others, at most, in seconds.
        """
        self._choose = choose
        self._answer = answer
        self._gather_s = gather_s
        self._waiting: dict[Waiting[Q, A], None] = {}
        self._turn: anyio.Lock | None = None
        self._loop: object = None
        self._asked_s: deque[float] = deque(maxlen=_OFTEN)

    @property
    def gather_s(self) -> float:
        """How long a question waits for others at present, in seconds; 0 if they are rare."""
        is_often = len(self._asked_s) == _OFTEN and time.monotonic() - self._asked_s[0] < _LATELY_S
        return self._gather_s if is_often else 0.0

    async def ask(self, question: Q) -> A:
        """Return the answer to a question.

        Raises:
            ServiceError: The request failed.
        """
        # Locks belong to an event loop: after a fork and in the next loop they would never be released.
        loop = anyio.lowlevel.current_token()
        if self._turn is None or self._loop != loop:
            self._turn, self._loop, self._waiting = anyio.Lock(), loop, {}
        self._asked_s.append(time.monotonic())
        waiting: Waiting[Q, A] = Waiting(question)
        self._waiting[waiting] = None
        try:
            async with self._turn:
                # One question sends the request for all; the others find their answer when their turn comes.
                if not waiting.is_over:
                    if gather_s := self.gather_s:
                        await anyio.sleep(gather_s - time.monotonic() % gather_s)
                    await self._send(waiting)
        finally:
            self._waiting.pop(waiting, None)
        if waiting.error is not None:
            raise copy.copy(waiting.error)
        assert waiting.answer is not None
        return waiting.answer

    async def _send(self, first: Waiting[Q, A]) -> None:
        batch = self._choose(first, [one for one in self._waiting if one is not first and not one.is_over])
        try:
            await self._answer(batch)
        except ServiceError as error:
            for one in batch:
                if not one.is_over:
                    one.error = error
