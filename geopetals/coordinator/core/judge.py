"""Which of several layouts is to be: what sessions gain over the horizon against what moving costs them.

Per session that arrives each second, a layout costs the horizon times the mean session under it, and the time in which
servers load instead of serving. If all blocks are served, servers move one after another, and their share of the swarm
is missing meanwhile. If not, all load at once, and whoever comes has to wait for that.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from geopetals.coordinator.core.plans import Layout, Plans
from geopetals.coordinator.messages import Span

_FREE_S = 1.0
"""What costs people less in all is for nothing: the planner's layout is preferred then to another as good."""
_SAME = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The layout, and why."""

    layout: Layout
    why: str
    figures: Mapping[str, float]


def judge(
    plans: Plans,
    before: Mapping[str, Span],
    load_s: Callable[[str, Span], float],
    *,
    horizon_s: float,
    arrivals_per_s: float,
    num_blocks: int,
    covered: bool,
    ties_to_plan: bool,
    is_reachable: Callable[[Mapping[str, Span]], bool] = lambda spans: True,
) -> Verdict:
    """before: what servers hold or load. ties_to_plan: prefer the planner's layout to one as good, if moving is free.
    is_reachable: whether servers can go there without taking blocks out of service.

    A layout that serves all blocks comes before any other; then one in which all sessions find room.
    """
    new, stay = plans.new, plans.stay
    if new is None:
        return Verdict(layout=stay, why=plans.failed, figures={})
    if new.spans == stay.spans:
        return Verdict(layout=new, why="it is what servers hold, or were about to", figures=_figures(plans, new, 0.0))
    options = [each for each in (new, plans.repair, stay) if each is not None and covers(each.spans, num_blocks)]
    if not is_reachable(new.spans):
        options = [each for each in options if each is stay or is_reachable(each.spans)]
        if stay in options and len(options) == 1:
            return Verdict(layout=stay, why="no order of moves to a new plan keeps all blocks served", figures={})
    if not options:
        return Verdict(layout=stay, why="no layout serves all blocks", figures={})
    moving_s = {id(each): _moving_s(each, before, load_s, stay, covered=covered) for each in options}

    def total_s(layout: Layout) -> float:
        assert layout.session_s is not None, "asked only where all sessions find room"
        return horizon_s * layout.session_s + moving_s[id(layout)]

    roomy = [each for each in options if each.session_s is not None]
    best = min(roomy or options[:1], key=total_s) if roomy else options[0]
    if ties_to_plan and new in roomy and best is not new:
        gain_s = horizon_s * ((best.session_s or 0.0) - (new.session_s or 0.0))
        is_free = arrivals_per_s * moving_s[id(new)] < _FREE_S
        if is_free and gain_s >= -_SAME * horizon_s * (best.session_s or 0.0):
            best = new
    figures = _figures(plans, best, arrivals_per_s * moving_s[id(best)])
    return Verdict(layout=best, why=_why(best, plans, options, figures, arrivals_per_s * horizon_s), figures=figures)


def covers(spans: Mapping[str, Span], num_blocks: int) -> bool:
    """Whether every block has a server."""
    reached = 0
    for start, end in sorted(spans.values()):
        if start > reached:
            return False
        reached = max(reached, end)
    return reached >= num_blocks


def _moving_s(
    layout: Layout, before: Mapping[str, Span], load_s: Callable[[str, Span], float], stay: Layout, *, covered: bool
) -> float:
    """Seconds that moving adds to a session of every second."""
    moved = [peer for peer, span in layout.spans.items() if before.get(peer) != span]
    if not covered:
        longest_s = max((load_s(peer, layout.spans[peer]) for peer in moved), default=0.0)
        return longest_s * max(longest_s / 2, stay.session_s or 0.0)
    moved = [peer for peer in moved if peer in before]
    held = sum(span.end - span.start for span in before.values())
    share = sum(before[peer].end - before[peer].start for peer in moved) / max(held, 1)
    return sum(load_s(peer, layout.spans[peer]) for peer in moved) * share * (stay.session_s or layout.session_s or 0.0)


def _figures(plans: Plans, layout: Layout, cost_s: float) -> dict[str, float]:
    figures = {"sessions": float(plans.sessions), "cost_s": cost_s}
    for name, each in (("session_s", layout), ("stay_session_s", plans.stay), ("new_session_s", plans.new)):
        if each is not None and each.session_s is not None:
            figures[name] = each.session_s
    return figures


def _why(best: Layout, plans: Plans, options: list[Layout], figures: dict[str, float], arrivals: float) -> str:
    stay = plans.stay
    if best is stay:
        return f"a new plan would not save people more than moving costs them ({arrivals:.3g} sessions in the horizon)"
    if stay not in options:
        return "blocks have no server otherwise"
    if stay.session_s is None or best.session_s is None:
        return "not all sessions find room otherwise"
    saved_s = arrivals * (stay.session_s - best.session_s)
    return f"saves people {max(saved_s, 0.0):.3g} s within the horizon, moving costs them {figures['cost_s']:.3g} s"
