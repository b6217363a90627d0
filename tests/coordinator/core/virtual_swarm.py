"""Servers and clients that do what the core says, in simulated time: they drain, load, report, and finish sessions."""

import heapq
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from geopetals.coordinator.core import Core, ModelFacts, Settings
from geopetals.coordinator.core import actions as act
from geopetals.coordinator.core import events as ev
from geopetals.coordinator.messages import (
    CacheUse,
    ChainHop,
    DecodeSample,
    Limits,
    LinkSample,
    Measured,
    Open,
    PrefillSample,
    Profile,
    Register,
    Report,
    SessionUse,
    Span,
)

MODEL = ModelFacts(
    name="model",
    num_blocks=12,
    hidden_size=64,
    block_bytes=1_000_000,
    kv_bytes_per_token=1_000,
    hidden_bytes_per_token=128,
)


def registration(
    *,
    memory_bytes: int = 20_000_000,
    block_s: float = 0.004,
    pin: Span | None = None,
    max_blocks: int | None = None,
    held: Span | None = None,
    epoch: int = 0,
    load_bytes_s: float | None = 10_000_000.0,
    model: ModelFacts = MODEL,
) -> Register:
    """A server of that speed: a decode step takes block_s for each block alone, half more with four sessions."""
    profile = Profile(
        device="cpu",
        dtype="float32",
        quantization=None,
        block_bytes=model.block_bytes,
        kv_bytes_per_token=model.kv_bytes_per_token,
        memory_bytes=memory_bytes,
        decode=(DecodeSample(1, 128, block_s), DecodeSample(4, 128, 1.5 * block_s)),
        prefill=(PrefillSample(16, block_s), PrefillSample(128, 4 * block_s)),
        overhead_s=0.001,
        load_bytes_s=load_bytes_s,
    )
    limits = Limits(pin=pin, max_blocks=max_blocks, memory_bytes=memory_bytes)
    return Register(
        profile=profile, limits=limits, held=held, epoch=epoch, name="", addresses=(), relayed=False, wire=1
    )


@dataclass
class Machine:
    """A server."""

    peer: str
    register: Register
    span: Span | None = None
    epoch: int = 0
    state: str = "joining"
    up: bool = True
    fails: bool = False
    """Whether its next load fails."""
    used: dict[str, int] = field(default_factory=dict)
    """Block-tokens by session."""
    life: int = 0
    """What was begun in an earlier life is void."""

    @property
    def total(self) -> int:
        """Block-tokens of cache beside its blocks."""
        blocks = 0 if self.span is None else self.span.end - self.span.start
        profile = self.register.profile
        return max(profile.memory_bytes - blocks * profile.block_bytes, 0) // profile.kv_bytes_per_token


@dataclass
class Asked:
    """A session as its client sees it."""

    client: str
    open: Open
    asked_s: float
    admitted_s: float | None = None
    closed_s: float | None = None
    chain: tuple[ChainHop, ...] = ()
    predictions: list[tuple[float, float]] = field(default_factory=list)
    """(when it was told, the start it was told)."""
    predicted: Any = None
    refused: act.Refused | None = None
    ended: str = ""


class VirtualSwarm:
    """Everything that happens is an event on one heap; what the core is told is kept in `log` with what it answered."""

    def __init__(
        self,
        *,
        settings: Settings | None = None,
        model: ModelFacts = MODEL,
        seed: int = 0,
        core: Core | None = None,
        check: Callable[["VirtualSwarm"], None] | None = None,
    ) -> None:
        self.core = core or Core(model, settings)
        self.model = model
        self.rng = random.Random(seed)
        self.now = 1_000.0
        self.log: list[tuple[float, ev.Event, tuple[act.Action, ...]]] = []
        self.machines: dict[str, Machine] = {}
        self.sessions: dict[str, Asked] = {}
        self.explained: list[act.Explained] = []
        self.assigned: list[act.Assign] = []
        self.noise = 1.0
        """By how much sessions last longer than is predicted."""
        self.rtts: dict[tuple[str, str], float] = {}
        self.covered = False
        """At the last check."""
        self._check = check
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self.at(0.0, self._beat)

    # ---- time

    def at(self, in_s: float, what: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now + in_s, self._count, what))

    def run(self, seconds: float) -> None:
        until_s = self.now + seconds
        while True:
            due_s = max(self.core.next_due_s(), self.now)
            next_s = self._heap[0][0] if self._heap else float("inf")
            if min(due_s, next_s) > until_s:
                break
            if due_s < next_s:
                self.now = due_s + 1e-6
                self.tell(ev.Tick())
            else:
                self.now = max(next_s, self.now)
                heapq.heappop(self._heap)[2]()
        self.now = until_s

    def run_until(self, condition: Callable[[], bool], seconds: float = 300.0) -> None:
        until_s = self.now + seconds
        while not condition():
            assert self.now < until_s, "it never came"
            self.run(0.1)

    def tell(self, event: ev.Event) -> tuple[act.Action, ...]:
        actions = self.core.apply(event, self.now)
        self.log.append((self.now, event, actions))
        self._carry_out(actions)
        if self._check is not None:
            self._check(self)
        return actions

    # ---- servers

    def join(self, peer: str, register: Register | None = None) -> Machine:
        machine = self.machines.get(peer) or Machine(peer=peer, register=register or registration())
        self.machines[peer] = machine
        machine.up = True
        register = registration() if register is None else register
        machine.register = register
        machine.span, machine.state = register.held, "ready" if register.held else "joining"
        self.tell(ev.ServerRegistered(peer=peer, register=register))
        self.report(machine)
        return machine

    def kill(self, peer: str) -> None:
        machine = self.machines[peer]
        machine.up, machine.span, machine.state = False, None, "joining"
        machine.life += 1
        machine.used.clear()
        self.tell(ev.ServerLost(peer=peer))

    def report(self, machine: Machine) -> None:
        if not machine.up:
            return
        used = sum(machine.used.values())
        links = tuple(
            LinkSample(other, self.rtt_s(machine.peer, other), False)
            for other in self.machines
            if other != machine.peer and self.machines[other].up
        )
        ready = machine.span if machine.state != "loading" else None
        report = Report(
            epoch=machine.epoch,
            state=machine.state,  # type: ignore[arg-type]
            span=ready,
            cache=CacheUse(total=machine.total, free=max(machine.total - used, 0), running=0, waiting=0),
            sessions=tuple(SessionUse(name, tokens, 0) for name, tokens in machine.used.items()),
            links=links,
        )
        self.tell(ev.ServerReported(peer=machine.peer, report=report))

    def rtt_s(self, one: str, other: str) -> float:
        pair = (min(one, other), max(one, other))
        return self.rtts.setdefault(pair, 0.02)

    def serving(self) -> list[int]:
        """Ready replicas of each block, as they really are."""
        replicas = [0] * self.model.num_blocks
        for machine in self.machines.values():
            if machine.up and machine.state == "ready" and machine.span is not None:
                for block in range(machine.span.start, machine.span.end):
                    replicas[block] += 1
        return replicas

    # ---- clients

    def ask(
        self, client: str, session_id: str, *, prompt: int = 32, output: int = 32, batch: int = 1
    ) -> tuple[act.Action, ...]:
        asked = Open(
            session_id=session_id, batch=batch, max_length=prompt + output, prompt_tokens=prompt, output_tokens=output
        )
        self.sessions[session_id] = Asked(client=client, open=asked, asked_s=self.now)
        return self.tell(ev.SessionAsked(client=client, open=asked))

    def close(self, session_id: str, *, tokens: int | None = None) -> None:
        asked = self.sessions[session_id]
        if asked.closed_s is not None or asked.ended or asked.admitted_s is None:
            return
        asked.closed_s = self.now
        for hop in asked.chain:
            self.machines[hop.peer_id].used.pop(session_id, None)
        tokens = asked.open.output_tokens if tokens is None else tokens
        measured = Measured(tokens=tokens or 0, wait_s=asked.admitted_s - asked.asked_s)
        self.tell(ev.SessionClosed(client=asked.client, session_id=session_id, measured=measured))

    # ---- what the core wants

    def _carry_out(self, actions: Iterable[act.Action]) -> None:
        for action in actions:
            if isinstance(action, act.Assign):
                self.assigned.append(action)
                self._assign(action)
            elif isinstance(action, act.Admitted):
                self._admitted(action)
            elif isinstance(action, act.Queued):
                self.sessions[action.session_id].predictions.append((self.now, self.now + action.start_in_s))
            elif isinstance(action, act.Refused):
                self.sessions[action.session_id].refused = action
            elif isinstance(action, act.SessionEnded):
                asked = self.sessions[action.session_id]
                asked.ended = action.why
                for hop in asked.chain:
                    self.machines[hop.peer_id].used.pop(action.session_id, None)
            elif isinstance(action, act.Explained):
                self.explained.append(action)

    def _assign(self, action: act.Assign) -> None:
        machine = self.machines[action.peer]
        life = machine.life

        def load() -> None:
            if not machine.up or machine.life != life or machine.epoch > action.epoch:
                return
            machine.epoch, before, machine.state = action.epoch, machine.span, "loading"
            machine.used.clear()
            self.report(machine)
            self.at(0.5 + self.rng.random(), lambda: done(before))

        def done(before: Span | None) -> None:
            if not machine.up or machine.life != life or machine.epoch != action.epoch:
                return
            if machine.fails:
                machine.fails, machine.span, machine.state = False, before, "failed"
                self.report(machine)
                machine.state = "ready" if before is not None else "joining"
            else:
                machine.span, machine.state = action.span, "ready" if action.span else "joining"
            self.report(machine)

        self.at(0.05, load)

    def _admitted(self, action: act.Admitted) -> None:
        asked = self.sessions[action.session_id]
        if asked.admitted_s is not None:
            return
        asked.admitted_s, asked.chain, asked.predicted = self.now, action.chain, action.predicted
        for hop in action.chain:
            tokens = (hop.end - hop.start) * action.batch * action.max_tokens
            self.machines[hop.peer_id].used[action.session_id] = tokens
        session = self.core.desk.sessions[action.session_id]
        service_s = session.first_s + (session.output - 1) * session.step_s
        self.at(self.noise * service_s, lambda: self.close(action.session_id))

    def _beat(self) -> None:
        for machine in list(self.machines.values()):
            self.report(machine)
        self.tell(ev.Tick())
        self.at(0.5, self._beat)
