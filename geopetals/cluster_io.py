"""Clusters as files: YAML or JSON, with paths in them relative to the file."""

import json
import re
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from geopetals import models, topology
from geopetals.cluster import Cluster, RttMatrix
from geopetals.cluster.errors import ClusterError, shown_value
from geopetals.cluster.kinds import Files
from geopetals.errors import UnsupportedInput
from geopetals.models import ModelCard
from geopetals.topology import TOPOHUB, Topology

_LARGEST_FILE_BYTES = 50_000_000


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster from a file; `.json` is JSON, anything else YAML. Raises UnsupportedInput or CheckpointError."""
    file = _at_home(path)
    return parse_cluster(_read(file), directory=file.parent, is_json=file.suffix == ".json")


def read_document(path: str | Path) -> tuple[object, Path]:
    """What a YAML or JSON file holds, and its directory. Raises UnsupportedInput."""
    file = _at_home(path)
    return _parse(_read(file), is_json=file.suffix == ".json"), file.parent


def files_in(directory: Path) -> Files:
    """What documents in this directory may refer to."""
    return _Disk(directory)


def parse_cluster(text: str, *, directory: Path, is_json: bool = False) -> Cluster:
    """Read a cluster from text; paths in it are relative to `directory`."""
    return Cluster.from_value(_parse(text, is_json=is_json), _Disk(directory))


def load_rtts(path: str | Path) -> RttMatrix:
    """Read a table of round-trip times from a CSV file, as docs/cluster.md describes it. Raises UnsupportedInput."""
    file = _at_home(path)
    return RttMatrix.from_value(file.name, _Disk(file.parent))


def load_topology(source: str) -> Topology:
    """A `.graph` file, or `topohub:GROUP/NAME`. Raises UnsupportedInput."""
    return _Disk(Path()).topology(source)


def dump_cluster(cluster: Cluster, *, as_json: bool = False) -> str:
    """Text that `parse_cluster` reads as an equal cluster, complete in itself but for a topology's source."""
    value = cluster.to_value()
    if as_json:
        return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def cluster_schema() -> dict[str, Any]:
    """JSON schema of a cluster file, as it is shipped in geopetals/cluster/schema.json."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "GeoPETALS cluster",
        **Cluster.schema(),
    }


class _Disk:
    """What a cluster file refers to, from its directory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def card(self, model: str) -> ModelCard:
        return models.find_card(model)

    def text(self, path: str) -> str:
        return _read(Path(self.absolute(path)))

    def topology(self, source: str) -> Topology:
        if source.startswith(TOPOHUB):
            return topology.from_topohub(source.removeprefix(TOPOHUB))
        return topology.parse_graph(self.text(source), source=source)

    def absolute(self, path: str) -> str:
        return str((self._directory / _at_home(path)).absolute())


def _at_home(path: str | Path) -> Path:
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise UnsupportedInput(f"{path} cannot be found ({error}): write the whole path.") from error


def _read(file: Path) -> str:
    try:
        with file.open(encoding="utf-8") as stream:
            text = stream.read(_LARGEST_FILE_BYTES + 1)
    except UnicodeDecodeError as error:
        raise UnsupportedInput(f"{file} is no text in UTF-8: save it as such.") from error
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnsupportedInput(f"{str(file)[:300]} cannot be read ({reason}): check its name and rights.") from error
    if len(text) > _LARGEST_FILE_BYTES:
        raise UnsupportedInput(f"{file} has more than {_LARGEST_FILE_BYTES} characters: is it the right file?")
    return text


def _parse(text: str, *, is_json: bool) -> object:
    try:
        return json.loads(text, object_pairs_hook=_unique_keys) if is_json else _load_yaml(text)
    except json.JSONDecodeError as error:
        raise ClusterError((), f"line {error.lineno} is no JSON: {error.msg.lower()}.") from error
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = f"line {mark.line + 1}" if mark else "this"
        raise ClusterError((), f"{line} is no YAML: {error.problem or error.context}.") from error
    except (yaml.YAMLError, ValueError, LookupError) as error:
        raise ClusterError((), f"this is no {'JSON' if is_json else 'YAML'}: {shown_value(str(error))}.") from error
    except RecursionError as error:
        raise ClusterError((), "lists and mappings are nested too deeply: is it the right file?") from error


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(key for key, _ in pairs if sum(other == key for other, _ in pairs) > 1)
        raise ClusterError((), f"the key {shown_value(twice)} stands twice in one mapping: keep one of them.")
    return found


def _load_yaml(text: str) -> object:
    loader = _Loader(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, so that 10:20 is a span and no number to the base of 60; no key twice in a mapping."""

    yaml_implicit_resolvers = {}  # noqa: RUF012

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    problem = f"the key {key.value} stands twice in one mapping"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what `_Loader` would not read as text; no anchors."""

    def ignore_aliases(self, data: object) -> bool:
        return True


_SCALARS = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("int", r"[-+]?(?:0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?", "-+0123456789."),
    ("merge", r"<<", "<"),
)
for _name, _pattern, _first in _SCALARS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", re.compile(rf"^(?:{_pattern})$"), list(_first))
