"""Long computations in a process of their own, so that the event loop has the interpreter to itself.

Plans of hundreds of servers take seconds. In a thread they would take every other turn of the loop for as long: tickets
would wait for them. The process has a low priority, so that even on one core it gives way.

    python -m geopetals.coordinator.aside PARENT_PID    reads one question from stdin, writes the answer to stdout
"""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

import msgpack

from geopetals.coordinator.bounds import bound_tpot_s
from geopetals.coordinator.core.planner import make_plan
from geopetals.coordinator.core.plans import Plans
from geopetals.coordinator.core.subject import PlanJob, Subject
from geopetals.swarm.orphan_guard import die_with_parent

log = logging.getLogger(__name__)

_NICE = 10
_FEW = 16
"""Servers: what is computed of so few takes less time than to start a process."""


async def plan(job: PlanJob) -> Plans:
    """`make_plan(job)`."""
    if len(job.subject.servers) <= _FEW:
        return await asyncio.to_thread(make_plan, job)
    answer = await _ask("plan", job.to_dict)
    return await asyncio.to_thread(make_plan, job) if answer is None else Plans.from_dict(answer)


async def bound(subject: Subject) -> float | None:
    """`bound_tpot_s` of its cluster."""
    if len(subject.servers) <= _FEW:
        return await asyncio.to_thread(lambda: bound_tpot_s(subject.cluster))
    answer = await _ask("bound", subject.to_dict)
    return None if answer is None else answer["tpot_s"]


async def _ask(what: str, body: Callable[[], dict[str, Any]]) -> dict[str, Any] | None:
    """What another process answers; None if it could not be started, or was killed."""
    question = await asyncio.to_thread(lambda: msgpack.packb([what, body()]))
    pipe = asyncio.subprocess.PIPE
    command = (sys.executable, "-m", __name__, str(os.getpid()))
    try:
        # Ctrl-C in a terminal is for the coordinator, which then ends this one.
        process = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe, start_new_session=True)
    except OSError as error:
        log.warning("aside.not_started what=%s why=%s", what, error)
        return None
    try:
        answer, _ = await process.communicate(question)
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        raise
    if process.returncode != 0:
        log.warning("aside.failed what=%s code=%s", what, process.returncode)
        return None
    found: dict[str, Any] = msgpack.unpackb(answer)
    return found


def _answer(what: str, body: dict[str, Any]) -> dict[str, Any]:
    if what == "plan":
        return make_plan(PlanJob.from_dict(body)).to_dict()
    return {"tpot_s": bound_tpot_s(Subject.from_dict(body).cluster)}


def main() -> int:
    if sys.platform == "linux":
        die_with_parent(int(sys.argv[1]))
    os.nice(_NICE)
    what, body = msgpack.unpackb(sys.stdin.buffer.read())
    sys.stdout.buffer.write(msgpack.packb(_answer(what, body)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
