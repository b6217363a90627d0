"""Scenarios as files: YAML or JSON, with paths in them relative to the file."""

from pathlib import Path

from geopetals.cluster.errors import ClusterError, at
from geopetals.cluster.kinds import mapping
from geopetals.cluster_io import files_in, load_cluster, read_document
from geopetals.simulation.scenario import Scenario


def load_scenario(path: str | Path) -> Scenario:
    """Read a scenario with its cluster; `.json` is JSON, anything else YAML. Raises UnsupportedInput."""
    document, directory = read_document(path)
    given = dict(mapping(document, Scenario.WHAT))
    if isinstance(given.get("cluster"), str):
        with at("cluster"):
            given["cluster"] = load_cluster(files_in(directory).absolute(str(given["cluster"])))
    scenario = Scenario.from_value(given, files_in(directory))
    if scenario.cluster is None:
        raise ClusterError((), "scenario has no 'cluster': add cluster, a cluster or the path of one.")
    return scenario
