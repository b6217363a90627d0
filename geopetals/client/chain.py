"""A session's chain of servers: hidden states go in at the first and come out at the last.

Where two neighbours can, the first pushes to the second; otherwise its output comes here and is sent on. Long inputs
go in pieces, none of which waits for the answer to the one before. Whatever fails, fails the whole chain, and is
blamed on a server or on the link between two.
"""

import asyncio
import logging
from collections import deque
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch

from geopetals.client.hop import HopSession
from geopetals.client.routing import Hop
from geopetals.errors import InputRefused, ServerBroken, ServerGone, ServerRefused, SwarmFailure
from geopetals.swarm.heartbeat import HEARTBEAT_S
from geopetals.swarm.ring_messages import Link, Opening, Step, Want, chunk_tokens
from geopetals.swarm.wire import gone, is_finite, short_peer

if TYPE_CHECKING:
    from geopetals.client.swarm import SwarmClient

log = logging.getLogger(__name__)

_DOUBT_S = HEARTBEAT_S + 0.2
_WIDEST_BYTES = 4
"""Of a value: servers may compute in a wider format than ours, and what they push has to fit one message too."""


class _Flight(NamedTuple):
    """A step on its way, and what goes to every hop beside its hidden states."""

    number: int
    tokens: int
    hypo_ids: torch.Tensor | None
    prompts: torch.Tensor | None


class _Doubt(NamedTuple):
    """The link behind a hop was lost. If the next server is heard of after `frames`, it is not the one that failed."""

    hop: int
    frames: int
    why: str


class Chain:
    """Open sessions on all servers of a chain. For one user at a time; unusable after the first failure."""

    def __init__(
        self,
        swarm: "SwarmClient",
        hops: list[HopSession],
        openings: list[Opening],
        reasons: list[str],
        *,
        batch: int,
    ) -> None:
        self._swarm, self._hops, self._batch = swarm, hops, batch
        self._modes: list[tuple[Literal["push", "relay", "answer"] | None, str]]
        self._modes = [
            ("answer", "") if opening.is_last else (None if opening.next_hop else "relay", why)
            for opening, why in zip(openings, reasons, strict=True)
        ]
        self._has_link = [opening.next_hop is not None for opening in openings]
        self._answered = [-1] * len(hops)
        self._done: list[tuple[int, ...]] = [(0, 0, 0)] * len(hops)
        self._number = 0
        self._flights: deque[_Flight] = deque()
        self._awaited: dict[int, asyncio.Future[torch.Tensor]] = {}
        self._is_busy = False
        self._waited_s = 0.0
        self._doubt: _Doubt | None = None
        self._doubt_s = 0.0
        self.failure: SwarmFailure | None = None
        self.trace: tuple[tuple[float, ...], ...] = ()
        for hop in hops:
            hop.listen(self)
        swarm.watch(self)

    @property
    def route(self) -> tuple[Hop, ...]:
        """The servers with the mode of each hop."""
        return tuple(
            replace(hop.hop, mode=mode, why=why) for hop, (mode, why) in zip(self._hops, self._modes, strict=True)
        )

    @property
    def can_grow(self) -> bool:
        """Whether its sessions may outgrow the length that they were opened for: stock servers' may not."""
        return all(hop.has_heartbeats for hop in self._hops)

    def show(self, credential: bytes) -> None:
        """Show all servers a newer ticket."""
        for hop in self._hops:
            hop.show(credential)

    # -- steps ---------------------------------------------------------------------------------------------------------

    async def run(
        self,
        hidden: torch.Tensor,
        *,
        position: int,
        want: Want,
        hypo_ids: torch.Tensor | None = None,
        prompts: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """Hidden states [batch, tokens, hidden] of new tokens from `position` on through all blocks.

        `want` says for which of them the result is needed; for none it returns as soon as all is sent. `hypo_ids` go
        with the first piece, `prompts` [blocks, batch or 1, prefix, hidden] with the positions they are for. Raises
        SwarmFailure.
        """
        self._is_busy, self._waited_s = True, 0.0
        try:
            return await self._run(hidden, position, want, hypo_ids, prompts)
        finally:
            self._is_busy = False

    async def _run(
        self,
        hidden: torch.Tensor,
        position: int,
        want: Want,
        hypo_ids: torch.Tensor | None,
        prompts: torch.Tensor | None,
    ) -> torch.Tensor | None:
        limit = chunk_tokens(hidden.shape[0], hidden.shape[2], _WIDEST_BYTES)
        pieces = hidden.split(limit, dim=1) if hidden.shape[1] > limit else (hidden,)
        answers: list[asyncio.Future[torch.Tensor]] = []
        for piece in pieces:
            is_last = piece is pieces[-1]
            here = _part_of(prompts, position, piece.shape[1])
            wanted = want if is_last or want is Want.ALL else Want.NOTHING
            # Every hop needs prompts of its own, from here: such a step is relayed, and none may overtake it.
            step = Step(self._number, position, wanted if here is None else Want.ALL, here is not None)
            answer = await self._send(step, piece, hypo_ids, here)
            if answer is not None and here is not None:
                await answer
            if answer is not None and wanted is not Want.NOTHING:
                answers.append(answer)
            hypo_ids = None
            position += piece.shape[1]
        if not answers:
            return None
        if len(answers) == 1:
            output = await answers[0]
            return output[:, -1:] if want is Want.LAST else output
        return torch.cat([await answer for answer in answers], dim=1)

    async def _send(
        self, step: Step, hidden: torch.Tensor, hypo_ids: torch.Tensor | None, prompts: torch.Tensor | None
    ) -> "asyncio.Future[torch.Tensor] | None":
        if self.failure is not None:
            raise self.failure
        self._number += 1
        self._flights.append(_Flight(step.number, hidden.shape[1], hypo_ids, prompts))
        answer = None
        if step.want is not Want.NOTHING:
            answer = asyncio.get_running_loop().create_future()
            answer.add_done_callback(_look_at_outcome)
            self._awaited[step.number] = answer
        first = self._hops[0]
        first.post(step, hidden, hypo_ids, _blocks_of(prompts, first.hop))
        try:
            await first.drain()
        except ServerGone as error:
            self.on_failure(first, error)
            raise self.failure or error from error
        return answer

    # -- what the hops say ---------------------------------------------------------------------------------------------

    def on_output(self, source: HopSession, step: Step, hidden: torch.Tensor) -> None:
        """An answer from the last hop; from any other one an output that is to be relayed."""
        if self.failure is not None:
            return
        index = self._hops.index(source)
        flight = next((flight for flight in self._flights if flight.number == step.number), None)
        if flight is None or step.number <= self._answered[index]:  # whoever answers twice gains no time by it
            return
        self._answered[index], self._waited_s = step.number, 0.0
        is_answer = source is self._hops[-1]
        tokens = 1 if is_answer and step.want is Want.LAST and hidden.shape[1] == 1 else flight.tokens
        due = (self._batch, tokens, self._swarm.hidden_size)
        if hidden.shape != due or not is_finite(hidden):
            what = "values that are no numbers" if hidden.shape == due else f"the shape {tuple(hidden.shape)} to {due}"
            self._fail(ServerBroken(f"server {short_peer(source.hop.peer_id)} answered with {what}."), source)
        elif is_answer:
            self._deliver(step, hidden)
        else:
            self._relay(source, step, hidden, flight)

    def _deliver(self, step: Step, hidden: torch.Tensor) -> None:
        while self._flights and self._flights[0].number <= step.number:
            self._flights.popleft()
        for index, (mode, why) in enumerate(self._modes):
            if mode is None:  # it got here, and not through us
                self._modes[index] = ("push", why)
        answer = self._awaited.pop(step.number, None)
        if answer is not None and not answer.done():
            self.trace = step.trace
            answer.set_result(hidden)

    def _relay(self, source: HopSession, step: Step, hidden: torch.Tensor, flight: _Flight) -> None:
        """Not more waits here to be sent than the session's inputs, which are kept anyway."""
        following = self._hops[self._hops.index(source) + 1]
        following.post(step, hidden, flight.hypo_ids, _blocks_of(flight.prompts, following.hop))

    def on_link(self, source: HopSession, link: Link, why: str) -> None:
        index = self._hops.index(source)
        if not self._has_link[index]:
            text = f"server {short_peer(source.hop.peer_id)} told of a link to the next server, and has none."
            self._fail(ServerBroken(text), source)
        elif link is Link.UP:
            self._modes[index] = ("push", "")
        elif link is Link.REFUSED:
            self._has_link[index] = False
            self._modes[index] = ("relay", why)
            log.info("link.refused from=%s reason=%s", short_peer(source.hop.peer_id), why)
        elif self._doubt is None:
            following = self._hops[index + 1]
            heard = why == "silent" and following.silence.seconds <= _DOUBT_S
            self._doubt = _Doubt(index, following.frames - heard, why)
            self._doubt_s = 0.0
            self._decide(0.0)

    def on_failure(self, source: HopSession, error: SwarmFailure) -> None:
        index = self._hops.index(source)
        if isinstance(error, InputRefused):
            if index > 0:
                source = self._hops[index - 1]
            error = ServerBroken(f"server {short_peer(source.hop.peer_id)} sent on what is no result: {error}")
        self._fail(error, source)

    def tick(self, seconds: float) -> None:
        """Heartbeats, silence and time limits."""
        if self.failure is not None:
            return
        for hop in self._hops:
            error = hop.tick(seconds)
            if error is not None:
                self._fail(error, hop)
                return
        if self._doubt is not None:
            self._decide(seconds)
        done = self._count_done()
        if done != self._done:
            self._done, self._waited_s = done, 0.0
        if self._is_busy:
            self._waited_s += seconds
            if self._waited_s > self._swarm.config.request_timeout:
                self._blame_the_slowest()

    def _count_done(self) -> list[tuple[int, ...]]:
        """What the hops' heartbeats say, as far as it can be: counts never fall, nor pass what was sent. Else a server
        could feign progress for ever.
        """
        least, most = self._flights[0].number if self._flights else self._number, self._number
        return [
            tuple(
                min(max(told, before, least), most)
                for told, before in zip((hop.beat.received, hop.beat.computed, hop.beat.handed_on), done, strict=True)
            )
            for hop, done in zip(self._hops, self._done, strict=True)
        ]

    def _decide(self, seconds: float) -> None:
        """Who failed when a link is lost: the next server, if it is not heard of any more, or the link alone."""
        doubt = self._doubt
        assert doubt is not None
        following = self._hops[doubt.hop + 1]
        self._doubt_s += seconds
        if following.frames > doubt.frames:
            self._lose_link(doubt.hop, doubt.why)
        elif self._doubt_s >= _DOUBT_S:
            self._fail(gone(following.hop.peer_id, f"the link to it was lost ({doubt.why})"), following)

    def _blame_the_slowest(self) -> None:
        """When nothing comes: the most silent hop, or the first that has not done what reached it. Where one says that
        it pushed and the next that nothing came, one of them lies or their link fails: the next chain relays it.
        """
        why = f"no answer within {self._swarm.config.request_timeout:.0f} s"
        silent = max(self._hops, key=lambda hop: hop.silence.seconds)
        if silent.has_heartbeats and silent.silence.seconds > _DOUBT_S:
            self._fail(gone(silent.hop.peer_id, why), silent)
            return
        oldest = self._flights[0].number if self._flights else 0
        is_relayed = bool(self._flights) and self._flights[0].prompts is not None
        for index, hop in enumerate(self._hops[:-1]):
            pushes = self._has_link[index] and not is_relayed
            if not (self._done[index][2] > oldest if pushes else self._answered[index] >= oldest):
                self._fail(gone(hop.hop.peer_id, why), hop)
                return
            if pushes and self._done[index + 1][0] <= oldest:
                self._lose_link(index, why)
                return
        self._fail(gone(self._hops[-1].hop.peer_id, why), self._hops[-1])

    def _lose_link(self, index: int, why: str) -> None:
        here, there = (hop.hop.peer_id for hop in self._hops[index : index + 2])
        self._swarm.avoid_link(here, there)
        text = f"the link from server {short_peer(here)} to {short_peer(there)} was lost ({why})."
        self._fail(ServerGone(text), None)

    # -- the end -------------------------------------------------------------------------------------------------------

    def _fail(self, error: SwarmFailure, culprit: HopSession | None) -> None:
        if self.failure is not None:
            return
        self.failure = error
        log.info("chain.failed reason=%s", error)
        if culprit is not None and not isinstance(error, ServerRefused):
            self._swarm.avoid(culprit.hop.peer_id, error)
        self.abort()
        for answer in self._awaited.values():
            if not answer.done():
                answer.set_exception(error)

    def abort(self) -> None:
        """Drop all connections; the servers free their caches when they notice."""
        self._swarm.unwatch(self)
        for hop in self._hops:
            hop.abort()

    async def close(self) -> None:
        """Tell all servers that the session is over."""
        self._swarm.unwatch(self)
        try:
            await asyncio.gather(*(hop.close() for hop in self._hops), return_exceptions=True)
        finally:  # cancelled before it began, a hop's close() does nothing at all
            self.abort()


def _part_of(prompts: torch.Tensor | None, position: int, tokens: int) -> torch.Tensor | None:
    """What is added to the tokens from `position` on."""
    if prompts is None or position >= prompts.shape[2]:
        return None
    return prompts[:, :, position : position + tokens]


def _blocks_of(prompts: torch.Tensor | None, hop: Hop) -> torch.Tensor | None:
    return None if prompts is None else prompts[hop.start : hop.end]


def _look_at_outcome(answer: "asyncio.Future[torch.Tensor]") -> None:
    """A failure is told to one waiter; Python would report those of the others as never retrieved."""
    if not answer.cancelled():
        answer.exception()
