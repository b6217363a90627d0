"""What the compose file describes, run without containers: the same commands and ports, and a real Prometheus."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlencode
from urllib.request import urlopen

import pytest
import yaml

from tests.live.commands import wait_for

ROOT = Path(__file__).parents[2]
PORTS = (31300, 31330, 31331, 31332, 31333, 31380, 31381, 31382, 31383, 9090)
pytestmark = [
    pytest.mark.live,
    pytest.mark.timeout(400),
    pytest.mark.skipif(
        shutil.which("prometheus") is None or shutil.which("promtool") is None, reason="no Prometheus here"
    ),
]
# These have data only once something has gone wrong, or for a while after it.
QUIET = ("failovers", "prediction", "predicted", "measured", "bound_ratio")


def ask(path: str, **query: str) -> Any:
    with urlopen(f"http://127.0.0.1:9090/api/v1/{path}?{urlencode(query)}", timeout=20) as answer:
        return json.load(answer)["data"]


def post(path: str, body: dict[str, Any]) -> Any:
    import urllib.request

    data = json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:31300{path}", data, {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return json.load(answer)


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


@pytest.fixture(scope="module")
def deployed(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    taken = [port for port in PORTS if not is_free(port)]
    assert not taken, f"ports {taken} of deploy/compose.yaml are taken on this machine"
    root = tmp_path_factory.mktemp("deployed")
    environment = {
        **os.environ,
        "MODEL": str(llama),
        "HOST": "127.0.0.1",  # libp2p passes on neither private nor reserved addresses to peers met at reserved ones
        "OMP_NUM_THREADS": "1",
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    with (root / "log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, ROOT / "deploy/run_local.py", "--root", root / "volumes"],
            env=environment,
            stdout=log,
            stderr=log,
        )
    try:
        wait_for(
            lambda: "all started" in (root / "log").read_text() or process.poll() is not None,
            timeout_s=120,
            what=lambda: (root / "log").read_text()[-4000:],
        )
        assert process.poll() is None, (root / "log").read_text()[-4000:]
        yield root
    finally:
        process.terminate()
        process.wait(60)
        wait_for(lambda: all(map(is_free, PORTS)), timeout_s=30, what="the end of all services")


def test_the_swarm_answers_and_prometheus_sees_all_of_it(deployed: Path) -> None:
    def answer() -> Any:
        try:
            return post("/v1/completions", {"model": str(json_models()), "prompt": "hello", "max_tokens": 4})
        except OSError:
            return None

    found = wait_for(answer, timeout_s=120, what=lambda: (deployed / "log").read_text()[-4000:])
    assert found["usage"]["completion_tokens"] == 4
    wait_for(lambda: targets_up() == 5, timeout_s=60, what=lambda: str(ask("targets")["activeTargets"]))
    assert ask("rules")["groups"][0]["name"] == "geopetals"


def json_models() -> str:
    with urlopen("http://127.0.0.1:31300/v1/models", timeout=20) as answer:
        name: str = json.load(answer)["data"][0]["id"]
    return name


def targets_up() -> int:
    return sum(target["health"] == "up" for target in ask("targets")["activeTargets"])


def expressions() -> list[tuple[str, str]]:
    """Every query of the dashboard and the alerts, and what explains that it may have no data."""
    panels = json.loads((ROOT / "deploy/grafana/dashboards/geopetals.json").read_text())["panels"]
    found = [(target["expr"], panel["description"]) for panel in panels for target in panel["targets"]]
    rules = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
    return found + [(side, "") for rule in rules for side in watched(rule["expr"])]


def watched(expression: str) -> list[str]:
    """What an alert compares with its threshold: that has data while it does not fire. Sessions make predictions."""
    sides = [re.sub(r"\s(<|>|==)=?\s*[\d.]+$", "", each.strip()) for each in expression.split(" and ")]
    return [side for side in sides if not any(quiet in side for quiet in QUIET)]


def test_every_query_has_data_or_a_reason_not_to(deployed: Path) -> None:
    def missing() -> list[str]:
        post("/v1/completions", {"model": json_models(), "prompt": "hello", "max_tokens": 4})
        return [
            expression
            for expression, reason in expressions()
            if not ask("query", query=expression)["result"] and "No data" not in reason
        ]

    wait_for(lambda: not missing(), timeout_s=90, what=lambda: f"data for {missing()}")


def test_every_metric_in_a_query_exists(deployed: Path) -> None:
    names = {name for expression, _ in expressions() for name in re.findall(r"geopetals_\w+", expression)}
    exported = set(ask("label/__name__/values"))
    unknown = {name for name in names if name not in exported and not any(quiet in name for quiet in QUIET)}
    assert not unknown
    for host in ("127.0.0.1:31380", "127.0.0.1:31381", "127.0.0.1:31300"):
        text = urlopen(f"http://{host}/metrics", timeout=20).read()
        done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, check=False)
        assert b"error" not in done.stderr.lower(), done.stderr


def test_the_rules_are_valid() -> None:
    subprocess.run(
        ["promtool", "check", "rules", ROOT / "deploy/prometheus/alerts.yml"], check=True, capture_output=True
    )
