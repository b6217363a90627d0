"""Column generation: the best lower bound over all prices, by turns of a linear program and exact pricing."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from geopetals.placement.bounds.prices import Rows
from geopetals.placement.bounds.pricing import Column, Priced, Pricing
from geopetals.problem import Floats

if TYPE_CHECKING:
    from geopetals.placement.bounds.master import Master

TOLERANCE = 2e-5
"""Relative gap between the linear program and the bound at which the search for prices ends."""
SMOOTHING = 0.5
"""Share of the best prices so far in those that are tried: the linear program's alone swing from one end to the other
(Wentges 1997)."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Dual:
    """Prices, and what follows from them."""

    bound_s: float
    prices_s: Floats
    """(rows,)"""
    columns: tuple[tuple[int, Column, float], ...] = ()
    """(client, column, sessions) of the linear program's last solution: what good placements look like."""
    unserved: float = 0.0
    """Sessions which that solution leaves out: above 0 if memory is, or may be, too small."""


def best_dual(rows: Rows, pricing: Pricing, hop_s: Floats, *, penalty_s: float, rounds: int) -> Dual:
    """hop_s, (C, J, K): what using 1..K blocks costs a session, infinite where it cannot.

    penalty_s: the cost of a session that is left out; more than any session's, or the bound suffers.
    """
    from geopetals.placement.bounds.master import Master

    master = Master(rows, penalty_s)
    best_s, best_prices_s = -np.inf, np.zeros(rows.count)
    weight = 0.0
    for _ in range(rounds):
        solved = master.solve()
        if solved is None:
            return Dual(bound_s=best_s, prices_s=best_prices_s)
        least_s, prices_s = solved
        if least_s - best_s <= TOLERANCE * least_s:
            break
        tried_s = weight * best_prices_s + (1 - weight) * prices_s
        priced = pricing.price(hop_s + rows.use_s(tried_s))
        bound_s = lagrangian_s(rows, priced, tried_s, penalty_s)
        _add_columns(master, pricing, priced, hop_s)
        if bound_s > best_s:
            best_s, best_prices_s = bound_s, tried_s
        weight = SMOOTHING
    return Dual(bound_s=best_s, prices_s=best_prices_s, columns=master.used, unserved=master.unserved)


def lagrangian_s(rows: Rows, priced: Priced, prices_s: Floats, penalty_s: float) -> float:
    """The lower bound that these prices give."""
    served_s = float(rows.sessions @ np.minimum(priced.least_s, penalty_s))
    return served_s - sum(float(worth_s.max(initial=0.0)) for worth_s in rows.worth_s(prices_s))


def _add_columns(master: "Master", pricing: Pricing, priced: Priced, hop_s: Floats) -> None:
    """For each client and server the cheapest session through it: with only the cheapest of all it takes far longer."""
    for client in np.flatnonzero(master.rows.sessions).tolist():
        through_s = priced.through_s[client]
        blocks = through_s.argmin(axis=1)
        for server in np.flatnonzero(np.isfinite(through_s.min(axis=1))).tolist():
            column = priced.column(client, server, int(blocks[server]) + 1)
            cost_s = pricing.delay_s(client, column) + sum(float(hop_s[client, j, k - 1]) for j, k in column)
            master.add(client, column, cost_s)
