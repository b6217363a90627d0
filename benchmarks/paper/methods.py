"""The methods and what is assumed about time, and how one method fares with the sessions of one cell and seed.

Methods: stock PETALS and the paper's three ablations of it; `paper`, CG-BP with WS-RR; `geopetals`, search with
reservation and push. The paper's methods plan for the paper's design load R. For that load, and for the one that agrees
with its placement (demand.py), ours searches; it takes what is better in a forecast: a simulation of as many sessions,
with arrivals of another seed. The first load suits the beginning of an overload, the second what lasts.

Assumptions (settings):

* `constants`: the paper's accounting (waits end at PETALS' retries, 1, 3, 7, 15, 31, 63 s and then every 60 s), no
  contention for compute, and its constants of 250 s per request for PETALS and 60 s for the proposed method, which
  `geopetals` is given as well (and counts in its load, as the paper's R does not);
* `none`: the same without these constants;
* `compute`: servers slow down with their sessions: stock servers, also under `paper`, compute sessions one after
  another, ours those that wait together;
* `compute, constants`: the same with the constants;
* `compute, all batch`: as `compute`, but everybody's servers compute together those that wait: placement, routing and
  push are all that differs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import numpy as np
from paper.cells import Cell, draw_order, draw_sessions, draw_swarm
from paper.swarm import Swarm

from geopetals.errors import MemoryShortage
from geopetals.placement.bounds import lone_push_cost_s
from geopetals.placement.cg_bp import cg_bp
from geopetals.placement.demand import search_for_demand
from geopetals.placement.load import cg_bp_for_demand, design_load
from geopetals.placement.search import search_placement
from geopetals.plan import Placement
from geopetals.simulation import Constants, Fate, Policy, Result, Rules
from geopetals.simulation.engine import Course
from geopetals.simulation.policies import SEARCH_STEPS, Planned, Stock
from geopetals.simulation.runs import run_course
from geopetals.simulation.sessions import Sessions

METHODS = ("petals", "petals+order", "petals+number", "petals+routing", "paper", "geopetals")
_OTHER_SEED = 1_000_000
STEPS = SEARCH_STEPS
"""Of the search, in each of our placements."""
SETTINGS = ("constants", "none", "compute", "compute, constants", "compute, all batch")
_PETALS_S, _PLANNED_S = 250.0, 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """Of one method, setting, cell and seed: means over all sessions, seconds."""

    per_token_s: float
    """The paper's figure: from arrival to the last token, over all tokens."""
    first_s: float
    """From arrival to the first token."""
    rest_s: float
    """Per token after the first."""
    wait_s: float
    late_wait_s: float
    """Of the last fifth of the sessions: where it is long, waits still grow when arrivals end."""
    refused: int


def rules_of(setting: str, swarm: Swarm) -> Rules:
    compute = setting.startswith("compute")
    given = setting.endswith("constants")
    constants = Constants(
        initial_s=swarm.site.initial_s,
        petals_s=_PETALS_S if given else 0.0,
        planned_s=_PLANNED_S if given else 0.0,
    )
    batching = "all" if setting.endswith("all batch") else "own"
    return Rules(paper=not compute, contention=compute, batching=batching, constants=constants)


def policy_of(method: str, sessions: int, order: Sequence[int]) -> Policy:
    """sessions: the paper's design load."""
    if method in ("paper", "geopetals"):
        return Planned(published=method == "paper", sessions=sessions, steps=STEPS)
    return Stock(
        order=tuple(order),
        planned_order=method == "petals+order",
        planned_number=method == "petals+number",
        planned_routing=method == "petals+routing",
        sessions=sessions,
    )


def design_sessions(swarm: Swarm) -> int:
    """The paper's R; where CG-BP cannot place that many, the most that it can."""
    problem = swarm.world.problem
    sessions = design_load(swarm.uncapped(), initial_s=swarm.site.initial_s)
    try:
        return cg_bp(problem, sessions).sessions
    except MemoryShortage:
        return cg_bp_for_demand(problem, initial_s=swarm.site.initial_s).sessions


def run(swarm: Swarm, policy: Policy, placement: Placement, sessions: Sessions, rules: Rules) -> Result:
    """All sessions to their end."""
    world = swarm.world
    desk = policy.desk(world, world.problem, placement, rules)
    course = Course(world=world, problem=world.problem, sessions=sessions, contention=rules.contention)
    return run_course(course, desk, placement, policy_name=policy.name)


def figures_of(result: Result) -> Figures:
    log = result.log
    served = log.fate == Fate.COMPLETED
    if not served.any():
        nan = float("nan")
        return Figures(per_token_s=nan, first_s=nan, rest_s=nan, wait_s=nan, late_wait_s=nan, refused=served.size)
    late = np.arange(served.size) >= served.size * 4 // 5
    return Figures(
        per_token_s=float(result.per_token_s().mean()),
        first_s=float(result.ttft_s().mean()),
        rest_s=float(result.tpot_s().mean()),
        wait_s=float(log.wait_s[served].mean()),
        late_wait_s=float(log.wait_s[served & late].mean()) if (served & late).any() else float("nan"),
        refused=int((~served).sum()),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Round:
    """One cell and seed: all settings and methods on the same sessions, places and order of joining."""

    cell: Cell
    seed: int
    figures: dict[str, dict[str, Figures]]
    """By setting and method."""
    design_sessions: int
    lone_s: dict[str, float]
    """By setting, per token: no session is faster under any placement and routing, by relay or push. With the constants
    of the setting, which ours are given too."""


def run_round(cell: Cell, seed: int, topologies: Path | None) -> Round:
    """Placements are made once for settings that do not differ for the method that makes them."""
    swarm, sessions, order = draw_swarm(cell, seed, topologies), draw_sessions(cell, seed), draw_order(cell, seed)
    forecast = draw_sessions(cell, seed + _OTHER_SEED)
    load, ours, theirs = design_sessions(swarm), _Candidates(), dict[str, Placement]()
    figures: dict[str, dict[str, Figures]] = {setting: {} for setting in SETTINGS}
    for setting, method in product(SETTINGS, METHODS):
        own = swarm.with_contention() if setting.startswith("compute") else swarm
        rules, policy = rules_of(setting, own), policy_of(method, load, order)
        if method == "geopetals":
            placement = ours.best(own, policy, rules, forecast, load, seed)
        elif method in theirs:
            placement = theirs[method]
        else:
            placement = theirs[method] = policy.place(own.world, seed)
        figures[setting][method] = figures_of(run(own, policy, placement, sessions, rules))
    return Round(cell=cell, seed=seed, figures=figures, design_sessions=load, lone_s=_lone_s(cell, swarm))


class _Candidates:
    """Our placements of one round."""

    def __init__(self) -> None:
        self._made: dict[tuple[bool, float | None], Placement] = {}

    def best(self, swarm: Swarm, policy: Policy, rules: Rules, forecast: Sessions, load: int, seed: int) -> Placement:
        initial_s = rules.constants.initial_s + rules.constants.planned_s
        found = [self._placement(swarm, rules, load, seed, None), self._placement(swarm, rules, load, seed, initial_s)]
        if np.array_equal(found[0].starts, found[1].starts) and np.array_equal(found[0].ends, found[1].ends):
            return found[0]
        return min(found, key=lambda each: figures_of(run(swarm, policy, each, forecast, rules)).per_token_s)

    def _placement(self, swarm: Swarm, rules: Rules, load: int, seed: int, initial_s: float | None) -> Placement:
        """initial_s: what sessions take beside their chains, for the load that agrees; None: for the given load."""
        key = (rules.contention, initial_s)
        if key not in self._made:
            problem = swarm.world.problem
            self._made[key] = (
                search_placement(problem, load, objective="push", steps=STEPS, seed=seed)
                if initial_s is None
                else search_for_demand(
                    problem, objective="push", steps=STEPS, seed=seed, sessions=load, initial_s=initial_s
                )
            ).placement
        return self._made[key]


def _lone_s(cell: Cell, swarm: Swarm) -> dict[str, float]:
    chain_s = lone_push_cost_s(swarm.world.problem, np.array([1]))
    constants = {setting: rules_of(setting, swarm).constants for setting in SETTINGS}
    return {name: (chain_s + each.initial_s + each.planned_s) / cell.output_tokens for name, each in constants.items()}
