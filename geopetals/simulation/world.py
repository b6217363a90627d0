"""What the simulator knows of a swarm beyond the Problem: sessions of any length, and what stock PETALS believes.

A Problem prices one session, of the workload's length. Prefill and the transfer of the prompt are a constant and a part
in proportion to its tokens, so the values for two lengths give those for any other.
"""

import math
from dataclasses import dataclass, replace

import numpy as np

from geopetals.cluster import Cluster, to_problem
from geopetals.errors import UnsupportedInput
from geopetals.placement.petals import PetalsServers
from geopetals.plan import Chain
from geopetals.planning.stock import StockSwarm
from geopetals.problem import Floats, OneWayDelays, Problem
from geopetals.routing.petals import PingTimes
from geopetals.timing import HopCosts, Objective, decode_costs, prefill_costs

_PAGES = 8
"""Sessions of different lengths hold cache in pages of one eighth of the workload's session."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StockFacts:
    """What stock servers announce and stock clients measure."""

    servers: PetalsServers
    pings: PingTimes


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Tokens:
    """The workload's lengths, and the same swarm for prompts of another length."""

    prompt: int
    output: int
    other_prompt: int
    other: Problem


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class World:
    """The swarm in which sessions are simulated. Without `tokens`, all have the length that the problem is for."""

    problem: Problem
    stock: StockFacts | None = None
    tokens: Tokens | None = None

    @classmethod
    def of(cls, subject: "World | Cluster | Problem") -> "World":
        """Raises what to_problem raises."""
        if isinstance(subject, World):
            return subject
        if isinstance(subject, Problem):
            return cls(problem=subject)
        problem = to_problem(subject)
        work, stock = subject.workload, StockSwarm(subject, problem)
        other_prompt = 1 if work.prompt_tokens > 1 else 2
        other = to_problem(replace(subject, workload=replace(work, prompt_tokens=other_prompt)))
        return cls(
            problem=problem,
            stock=StockFacts(servers=stock.announced, pings=stock.pings),
            tokens=Tokens(prompt=work.prompt_tokens, output=work.output_tokens, other_prompt=other_prompt, other=other),
        )

    def page_tokens(self) -> int:
        """Tokens of a page of cache, where sessions differ in length."""
        tokens = self.required_tokens()
        return math.ceil((tokens.prompt + tokens.output) / _PAGES)

    def paged(self) -> Problem:
        """The problem whose unit of cache is one page; its times are those of the workload's session."""
        tokens = self.required_tokens()
        per_token = self.problem.kv_bytes / (tokens.prompt + tokens.output)
        return replace(self.problem, kv_bytes=per_token * self.page_tokens())

    def required_tokens(self) -> Tokens:
        if self.tokens is None:
            raise UnsupportedInput("How times depend on tokens is not known: simulate a cluster, or leave lengths out.")
        return self.tokens


class SessionTimes:
    """Prefill of any number of tokens, and one decode step, on a chain without other sessions."""

    def __init__(self, world: World, objective: Objective) -> None:
        self._prefill = prefill_costs(world.problem, objective)
        self._decode = decode_costs(world.problem, objective)
        self._tokens = world.tokens
        self._growth = None if world.tokens is None else _growth(world.problem, world.tokens, objective)
        self._prefill_links, self._decode_links = _links(self._prefill), _links(self._decode)
        self._growth_links = None if self._growth is None else _links(self._growth)

    def first_s(self, client: int, chain: Chain, prompt: int) -> float:
        """From the start to the first token; prompt 0: the workload's."""
        return self._for_prompt(self._prefill, self._growth, client, chain, prompt)

    def step_s(self, client: int, chain: Chain) -> float:
        """One decode step."""
        return self._decode.chain_s(client, chain)

    def first_links_s(self, client: int, chain: Chain, prompt: int) -> float:
        """The part of first_s that is no computing."""
        return self._for_prompt(self._prefill_links, self._growth_links, client, chain, prompt)

    def step_links_s(self, client: int, chain: Chain) -> float:
        """The part of step_s that is no computing."""
        return self._decode_links.chain_s(client, chain)

    def prefill_work_s(self, chain: Chain, prompt: int) -> list[float]:
        """Computing of the prompt on each server of the chain."""
        work_s = [float(self._prefill.block_s[hop.server]) * hop.blocks for hop in chain]
        if self._growth is None or self._tokens is None or not prompt:
            return work_s
        more = prompt - self._tokens.prompt
        block_s = self._growth.block_s
        return [work + more * float(block_s[hop.server]) * hop.blocks for work, hop in zip(work_s, chain, strict=True)]

    def decode_work_s(self, chain: Chain) -> list[float]:
        """Computing of one decode step on each server of the chain, for one session."""
        return [float(self._decode.block_s[hop.server]) * hop.blocks for hop in chain]

    def _for_prompt(self, nominal: HopCosts, growth: HopCosts | None, client: int, chain: Chain, prompt: int) -> float:
        cost_s = nominal.chain_s(client, chain)
        if growth is None or self._tokens is None or prompt in (0, self._tokens.prompt):
            return cost_s
        return cost_s + (prompt - self._tokens.prompt) * growth.chain_s(client, chain)


def _growth(problem: Problem, tokens: Tokens, objective: Objective) -> HopCosts:
    """What each token more of a prompt adds."""
    here, there = prefill_costs(problem, objective), prefill_costs(tokens.other, objective)

    def per_token(one: Floats, other: Floats) -> Floats:
        # A link that does not exist is infinite for any prompt; the difference of infinities is undefined.
        known = np.isfinite(one)
        more = (np.where(known, one, 0.0) - np.where(known, other, 0.0)) / (tokens.prompt - tokens.other_prompt)
        return np.asarray(np.maximum(more, 0.0))

    block_s = per_token(here.block_s, there.block_s)
    if here.push is None or there.push is None:
        assert here.relay_s is not None, "costs have relay or push delays"
        assert there.relay_s is not None, "costs have relay or push delays"
        return HopCosts(block_s=block_s, relay_s=per_token(here.relay_s, there.relay_s))
    delays = OneWayDelays(
        from_client_s=per_token(here.push.from_client_s, there.push.from_client_s),
        between_s=per_token(here.push.between_s, there.push.between_s),
        to_client_s=per_token(here.push.to_client_s, there.push.to_client_s),
    )
    return HopCosts(block_s=block_s, push=delays)


def _links(costs: HopCosts) -> HopCosts:
    return replace(costs, block_s=np.zeros_like(costs.block_s))
