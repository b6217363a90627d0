"""The decomposition of one problem: its sizes, rows and pricing, the best prices, and what they rule out."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from geopetals.placement.bounds.decomposition import Dual, best_dual
from geopetals.placement.bounds.prices import Rows
from geopetals.placement.bounds.pricing import Priced, Pricing, PushPricing, RelayPricing
from geopetals.placement.bounds.sizes import Sizes, useful_sizes
from geopetals.problem import Floats, Ints, OneWayDelays, Problem
from geopetals.timing import HopCosts, Objective, session_costs

ROUNDS = 400
MARGIN = 1e-9
"""Relative. Costs that differ by less are equal: the bound is taken down by it, and what may be chosen is widened."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Decomposed:
    """The best prices found and the bound they prove."""

    bound_s: float
    """Infinite if it is proven that no placement carries the sessions."""
    dual: Dual
    sizes: Sizes
    rows: Rows
    priced: Priced

    def kept(self, cutoff_s: float) -> tuple[list[NDArray[np.bool_]], Ints]:
        """What a solution that costs at most cutoff_s may consist of.

        For each server which of its sizes; and (C, J, K) how many sessions may use 1..K blocks of it. What a choice
        costs beyond the one that gave the bound adds to the bound.
        """
        slack_s = cutoff_s * (1 + MARGIN) - self.bound_s
        worths_s = self.rows.worth_s(self.dual.prices_s)
        sizes = [worth_s >= worth_s.max(initial=0.0) - slack_s for worth_s in worths_s]
        dearer_s = np.maximum(self.priced.through_s - self.priced.least_s[:, None, None], 0.0)
        sessions = np.broadcast_to(self.rows.sessions[:, None, None], dearer_s.shape)
        fitting = np.divide(slack_s, dearer_s, out=np.full(dearer_s.shape, np.inf), where=dearer_s > 0)
        fitting = np.where(np.isfinite(self.priced.through_s), fitting, 0.0)
        return sizes, np.floor(np.minimum(fitting, sessions)).astype(np.int64)


def decomposed(problem: Problem, sessions: Ints, *, objective: Objective, rounds: int = ROUNDS) -> Decomposed | None:
    """For `sessions` (C,) at once; None if not even one session of some client fits."""
    costs = session_costs(problem, objective)
    sizes = useful_sizes(problem, sessions, objective)
    if not sizes.most:
        return None
    rows = Rows(sizes=sizes, sessions=np.asarray(sessions, dtype=np.int64))
    pricing, hop_s = pricing_of(costs, problem.num_blocks), hop_costs(costs, sizes, problem.num_clients)
    alone = pricing.price(hop_s)
    if not np.isfinite(alone.least_s[rows.sessions > 0]).all():
        return None
    dual = best_dual(rows, pricing, hop_s, penalty_s=_penalty_s(costs, hop_s), rounds=rounds)
    bound_s = dual.bound_s * (1 - MARGIN)
    if dual.unserved > 0 and _unservable(rows, costs, hop_s, problem.num_blocks, rounds):
        bound_s = float("inf")
    priced = pricing.price(hop_s + rows.use_s(dual.prices_s))
    return Decomposed(bound_s=bound_s, dual=dual, sizes=sizes, rows=rows, priced=priced)


def hop_costs(costs: HopCosts, sizes: Sizes, clients: int) -> Floats:
    """(C, J, K): what using 1..K blocks of a server costs, for push without delays; infinite where it cannot be."""
    compute_s = costs.block_s[:, None] * np.arange(1, sizes.most + 1)
    delay_s = costs.relay_s if costs.relay_s is not None else np.zeros((clients, costs.block_s.size))
    return np.where(sizes.usable, delay_s[:, :, None] + compute_s, np.inf)


def pricing_of(costs: HopCosts, num_blocks: int) -> Pricing:
    if costs.push is None:
        return RelayPricing(num_blocks)
    between_s = costs.push.between_s.copy()
    np.fill_diagonal(between_s, np.inf)
    delays = OneWayDelays(
        from_client_s=costs.push.from_client_s, between_s=between_s, to_client_s=costs.push.to_client_s
    )
    return PushPricing(num_blocks, delays)


def _unservable(rows: Rows, costs: HopCosts, hop_s: Floats, num_blocks: int, rounds: int) -> bool:
    """Whether even at no cost but 1 for each session left out some are left out."""
    pushed = costs.push
    free = HopCosts(
        block_s=np.zeros_like(costs.block_s),
        relay_s=costs.relay_s,
        push=None
        if pushed is None
        else OneWayDelays(
            from_client_s=_free(pushed.from_client_s),
            between_s=_free(pushed.between_s),
            to_client_s=_free(pushed.to_client_s),
        ),
    )
    left_out = best_dual(rows, pricing_of(free, num_blocks), _free(hop_s), penalty_s=1.0, rounds=rounds)
    return bool(left_out.bound_s > 1e-6)


def _free(costs_s: Floats) -> Floats:
    return np.where(np.isfinite(costs_s), 0.0, np.inf)


def _penalty_s(costs: HopCosts, hop_s: Floats) -> float:
    """More than any session costs: its chain has each server at most once."""
    dearest_s = float(np.where(np.isfinite(hop_s), hop_s, 0.0).max(axis=2).sum(axis=1).max())
    if costs.push is None:
        return dearest_s
    every = (costs.push.from_client_s, costs.push.between_s, costs.push.to_client_s)
    longest_s = max(float(each[np.isfinite(each)].max(initial=0.0)) for each in every)
    return dearest_s + (int(hop_s.shape[1]) + 1) * longest_s
