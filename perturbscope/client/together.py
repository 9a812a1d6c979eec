"""Several conversations held at a time: by threads, or by tasks of an event loop."""

from __future__ import annotations

import asyncio
import contextvars
import threading
from collections.abc import Awaitable, Callable
from queue import SimpleQueue
from typing import TypeVar

from perturbscope.client.conversation import Conversation, Together

T = TypeVar("T")


def hold_together(hold: Callable[[Conversation[T]], T], step: Together) -> list[T]:
    """Return the results of the conversations of `step`, in their order.

    The first error is raised, and no new conversation begins after it. `step.each` is called in the caller's thread.
    """
    results: dict[int, T] = {}
    waiting = iter(enumerate(step.conversations))
    outcomes: SimpleQueue[tuple[int, T | BaseException]] = SimpleQueue()
    taking, stopped = threading.Lock(), threading.Event()

    def work() -> None:
        while not stopped.is_set():
            with taking:
                number, conversation = next(waiting, (-1, None))
            if conversation is None:
                return
            try:
                outcomes.put((number, hold(conversation)))
            except BaseException as error:  # noqa: BLE001  the caller's thread raises it
                outcomes.put((number, error))
                return

    workers = min(step.at_a_time, len(step.conversations))
    try:
        # Daemon threads: an interrupted program does not wait for answers that nobody needs any more.
        for _ in range(workers):
            # Each thread runs in a copy of the caller's context, which holds its trace.
            run = contextvars.copy_context().run
            threading.Thread(target=run, args=(work,), daemon=True, name="perturbscope-client").start()
        while len(results) < len(step.conversations):
            number, outcome = outcomes.get()
            if isinstance(outcome, BaseException):
                raise outcome
            results[number] = outcome
            step.each(outcome)
    finally:
        stopped.set()
    return [results[number] for number in range(len(results))]


async def hold_together_async(hold: Callable[[Conversation[T]], Awaitable[T]], step: Together) -> list[T]:
    """Do what :func:`hold_together` does with tasks, which an error or the caller's cancellation cancels."""
    results: dict[int, T] = {}
    waiting = iter(enumerate(step.conversations))

    async def work() -> None:
        for number, conversation in waiting:
            results[number] = await hold(conversation)
            step.each(results[number])

    tasks = [asyncio.ensure_future(work()) for _ in range(min(step.at_a_time, len(step.conversations)))]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return [results[number] for number in range(len(results))]
