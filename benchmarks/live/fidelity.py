"""Predictions against what was measured: errors of each session's times, and the order of the systems. Pure.

The error of a figure is |predicted - measured| / measured, of each session that was answered in a run that counts.
"""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from live.records import Key, digest
from live.summary import Run, figures

TIMES = ("ttft_s", "tpot_s", "e2e_s")
LIMITS = {"tpot_mean": 0.05, "tpot_p90": 0.10, "ttft_mean": 0.10}
"""Of errors, as shares."""


def check_hashes(runs: Sequence[Run], predictions: Mapping[Key, Mapping[str, Any]]) -> list[str]:
    """What is wrong: predictions that are missing, changed, or younger than their run."""
    wrong = []
    for run in runs:
        if "failed" in run:
            continue
        key = (run["order"], run["system"], run["load"])
        line = predictions.get(key)
        if line is None:
            wrong.append(f"{key}: there is no prediction")
        elif not digest(line["prediction"]) == line["sha256"] == run["prediction_sha256"]:
            wrong.append(f"{key}: the prediction is not the one that was written before the run")
        elif line["written_at"] >= run["began_at"]:
            wrong.append(f"{key}: the prediction was written after the run had begun")
    return wrong


def errors(run: Run, prediction: Mapping[str, Any]) -> dict[str, list[float]]:
    """By figure, of each session that both have."""
    predicted = {each["number"]: each for each in prediction["sessions"]}
    found: dict[str, list[float]] = {name: [] for name in TIMES}
    for session in run["sessions"]:
        guess = predicted.get(session["number"])
        for name in TIMES:
            if guess is not None and session[name] and guess[name] is not None:
                found[name].append(abs(guess[name] - session[name]) / session[name])
    return found


def right_chains(runs: Sequence[Run], predictions: Mapping[Key, Mapping[str, Any]]) -> float:
    """The share of sessions that took the chain that was predicted: the same servers and blocks."""
    right: list[bool] = []
    for run in runs:
        sessions = predictions[run["order"], run["system"], run["load"]]["prediction"]["sessions"]
        guesses = {each["number"]: each["chain"] for each in sessions}
        right += [session["chain"] == guesses.get(session["number"]) for session in run["sessions"]]
    return sum(right) / max(len(right), 1)


def summarize(runs: Sequence[Run], predictions: Mapping[Key, Mapping[str, Any]]) -> dict[str, float]:
    """LOAD_SYSTEM_FIGURE_mean and _p90, over all sessions; the same over all systems; how often rankings agree."""
    summary: dict[str, float] = {}
    counted = [run for run in runs if figures(run) is not None]
    for load in dict.fromkeys(run["load"] for run in counted):
        here = [run for run in counted if run["load"] == load]
        for system in dict.fromkeys(run["system"] for run in here):
            own = [run for run in here if run["system"] == system]
            summary |= _errors(f"{load}_{system}", own, predictions)
            summary[f"{load}_{system}_right_chains"] = right_chains(own, predictions)
        summary |= _errors(f"{load}_all", here, predictions)
        summary |= ranking(load, here, predictions)
    return summary


def ranking(load: str, runs: Sequence[Run], predictions: Mapping[Key, Mapping[str, Any]]) -> dict[str, float]:
    """Pairs of systems whose medians of the time per token are in the predicted order, of those 3 % apart."""
    measured, predicted = (_medians(runs, predictions, guessed=guessed) for guessed in (False, True))
    systems = [system for system in measured if system in predicted]
    pairs = [
        (one, other)
        for index, one in enumerate(systems)
        for other in systems[index + 1 :]
        if abs(measured[one] / measured[other] - 1) > 0.03
    ]
    right = sum((measured[a] < measured[b]) == (predicted[a] < predicted[b]) for a, b in pairs)
    return {f"{load}_ranked_pairs": len(pairs), f"{load}_ranked_right": right}


def _medians(runs: Sequence[Run], predictions: Mapping[Key, Mapping[str, Any]], *, guessed: bool) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in runs:
        key = (run["order"], run["system"], run["load"])
        sessions = predictions[key]["prediction"]["sessions"] if guessed else run["sessions"]
        times = [each["tpot_s"] for each in sessions if each["tpot_s"]]
        if times:
            values.setdefault(run["system"], []).append(statistics.mean(times))
    return {system: statistics.median(each) for system, each in values.items()}


def _errors(name: str, runs: Sequence[Run], predictions: Mapping[Key, Mapping[str, Any]]) -> dict[str, float]:
    found: dict[str, list[float]] = {each: [] for each in TIMES}
    for run in runs:
        line = predictions[run["order"], run["system"], run["load"]]
        for figure, values in errors(run, line["prediction"]).items():
            found[figure] += values
    summary: dict[str, float] = {}
    for figure, values in found.items():
        if values:
            key = f"{name}_{figure.removesuffix('_s')}"
            summary |= {f"{key}_mean": float(np.mean(values)), f"{key}_p90": float(np.percentile(values, 90))}
            summary[f"{key}_n"] = len(values)
    return summary


def markdown(name: str, summary: Mapping[str, float]) -> str:
    """A table: loads and systems down, errors in percent across."""
    rows = list(dict.fromkeys(key.rsplit("_", 2)[0] for key in summary if key.endswith("_tpot_mean")))
    lines = [f"# {name}: predicted against measured", "", "Errors of each session's times in percent: mean / p90.", ""]
    lines += ["| load, system | TPOT | TTFT | end to end | sessions |", "| --- | --- | --- | --- | --- |"]
    for row in rows:
        cells = [
            f"{100 * summary[f'{row}_{time}_mean']:.1f} / {100 * summary[f'{row}_{time}_p90']:.1f}"
            for time in ("tpot", "ttft", "e2e")
        ]
        lines.append(f"| {row.replace('_', ', ', 1)} | {' | '.join(cells)} | {int(summary[f'{row}_tpot_n'])} |")
    lines.append("")
    for key in [key for key in summary if key.endswith("_ranked_pairs")]:
        load = key.removesuffix("_ranked_pairs")
        right, pairs = int(summary[f"{load}_ranked_right"]), int(summary[key])
        lines.append(f"{load}: {right} of {pairs} pairs of systems that are 3 % apart or more are ranked right.")
    return "\n".join(lines) + "\n"
