"""How many sessions of each client a placement is made for."""

import numpy as np

from geopetals.errors import UnsupportedInput
from geopetals.problem import Ints, Problem


def sessions_by_client(problem: Problem, sessions: int | Ints) -> Ints:
    """(C,): a number is shared out by demand, largest remainder first; a vector is checked and passed on."""
    if isinstance(sessions, int):
        return _shared_out(problem, sessions)
    counts = np.asarray(sessions)
    if counts.shape != (problem.num_clients,) or (counts < 0).any() or not counts.any():
        raise UnsupportedInput(f"sessions has to be one number or {problem.num_clients}, at least one session in all.")
    return np.asarray(counts, dtype=np.int64)


def _shared_out(problem: Problem, sessions: int) -> Ints:
    if sessions < 1:
        raise UnsupportedInput(f"A placement for {sessions} sessions makes no sense: plan for at least one.")
    demand = problem.demand_per_s if problem.demand_per_s.any() else np.ones(problem.num_clients)
    shares = sessions * demand / demand.sum()
    counts: Ints = np.floor(shares).astype(np.int64)
    # Rounded, so that equal demands are served in the order of the clients whatever the last bit says.
    order = np.argsort(-np.round(shares - counts, 9), kind="stable")
    counts[order[: sessions - int(counts.sum())]] += 1
    return counts
