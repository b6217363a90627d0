"""The tables as Markdown, written from the rows alone."""

from collections.abc import Iterator, Sequence
from statistics import median

from paper.methods import METHODS, SETTINGS
from paper.statistics import GOAL, WITHOUT_CONSTANTS, Row, reason

_TITLES = {
    "constants": "The paper's accounting with its constants (250 s for PETALS, 60 s for the others)",
    "none": "The paper's accounting without constants",
    "compute": "Contention for compute; only GeoPETALS' servers compute waiting sessions together",
    "compute, constants": "Contention for compute, with the paper's constants",
    "compute, all batch": "Contention for compute; everybody's servers compute waiting sessions together",
}
_NETWORKS = {"abovenet": "AboveNet", "bellcanada": "BellCanada", "gts-ce": "GTS-CE", "clustered": "clustered"}


def markdown(rows: Sequence[Row], *, seeds: int, sources: dict[str, str]) -> str:
    return "\n".join(_lines(rows, seeds, sources)) + "\n"


def _lines(rows: Sequence[Row], seeds: int, sources: dict[str, str]) -> Iterator[str]:
    yield "# The paper's comparisons, repeated"
    yield ""
    yield "Written by `python benchmarks/paper_tables.py`; docs/paper-tables.md says what is compared and how."
    yield f"{seeds} seeds; {', '.join(f'{_NETWORKS[name]}: {source}' for name, source in sources.items())}."
    yield ""
    yield "Seconds per token (arrival to last token over all tokens), ± half of the 95 % interval over seeds."
    yield "`saved`: what `geopetals` takes less than `paper`, of the paper's time, with the interval of the paired"
    yield "differences. `at most`: what the time of a session alone on the best chain of any placement would save."
    yield from _overview(rows)
    for setting in SETTINGS:
        yield from _table(setting, [row for row in rows if row.setting == setting])
    yield from _reasons([row for row in rows if row.setting in WITHOUT_CONSTANTS])


def _overview(rows: Sequence[Row]) -> Iterator[str]:
    yield ""
    yield "## GeoPETALS against the paper's method, over all cells"
    yield ""
    yield f"| | cells | dearer than `paper` | saved: least, median, most | tight cells | of them {GOAL:.0%} saved |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    for setting in SETTINGS:
        mine = [row for row in rows if row.setting == setting]
        saved, tight = sorted(row.saved for row in mine), [row for row in mine if row.tight]
        spread = f"{saved[0]:.1%}, {median(saved):.1%}, {saved[-1]:.1%}"
        lost, reached = sum(share < 0 for share in saved), sum(row.saved >= GOAL for row in tight)
        yield f"| {_TITLES[setting]} | {len(mine)} | {lost} | {spread} | {len(tight)} | {reached} |"


def _table(setting: str, rows: Sequence[Row]) -> Iterator[str]:
    yield ""
    yield f"## {_TITLES[setting]}"
    yield ""
    yield f"| cell | {' | '.join(METHODS)} | saved | at most |"
    yield f"| --- |{' ---: |' * (len(METHODS) + 2)}"
    for row in rows:
        paired, papers = row.against_paper["geopetals"], row.per_token_s["paper"].value
        saved = f"{row.saved:.1%} ({-paired.high / papers:.1%} to {-paired.low / papers:.1%})"
        name = f"{_NETWORKS[row.cell.network]}, {row.cell.value}"
        yield f"| {name} | {' | '.join(_time(row, m) for m in METHODS)} | {saved} | {row.most_saved:.1%} |"


def _time(row: Row, method: str) -> str:
    mean = row.per_token_s[method]
    note = f" ({row.refused[method]} refused)" if row.refused[method] else ""
    return f"{mean.value:.3f} ±{(mean.high - mean.low) / 2:.3f}{note}"


def _reasons(rows: Sequence[Row]) -> Iterator[str]:
    yield ""
    yield f"## Where less than {GOAL:.0%} is saved without constants, and why"
    yield ""
    for row in rows:
        if row.saved < GOAL:
            cell = row.cell
            yield f"* {_NETWORKS[cell.network]}, {cell.value}; {row.setting}: {row.saved:.1%}; {reason(row)}."
