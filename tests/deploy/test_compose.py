"""The deployment files are valid, agree with the commands that exist, and are what the script runs."""

import argparse
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from deploy.run_local import COMPOSE, read_services
from geopetals.cli import build_parser

ROOT = Path(__file__).parents[2]
SCHEMA = Path(__file__).with_name("compose_spec.json")
"""The Compose Specification's own, from https://github.com/compose-spec/compose-spec (Apache License 2.0)."""
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))


def services() -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
    return found


def parse(arguments: list[str]) -> argparse.Namespace:
    """As the command line of today reads it; fails where an option does not exist. Files of tokens are elsewhere."""
    return build_parser().parse_args([re.sub(r"^@/.*", "gp2x", argument) for argument in arguments])


def test_the_compose_file_follows_the_specification() -> None:
    schema = {key: value for key, value in json.loads(SCHEMA.read_text()).items() if key not in ("$schema", "$id")}
    jsonschema.Draft7Validator(schema).validate(yaml.safe_load(COMPOSE.read_text()))


def test_every_service_of_ours_is_a_command_that_exists(tmp_path: Path) -> None:
    ours = [service for service in read_services(COMPOSE, tmp_path, {}) if service.command[0] == "geopetals"]
    assert {service.name for service in ours} == {"coordinator", "server-1", "server-2", "server-3", "gateway"}
    for service in ours:
        parse(list(service.command[1:]))


def test_the_script_runs_the_files_commands_with_paths_of_this_machine(tmp_path: Path) -> None:
    for service in read_services(COMPOSE, tmp_path, {"MODEL": "a-model"}):
        written = [str(part) for part in services()[service.name].get("command", [])]
        run = list(service.command[1:])
        assert len(run) == len(written)
        for told, ran in zip(written, run, strict=True):
            if "/" not in told:
                expected = told.replace("${MODEL:-HuggingFaceTB/SmolLM2-135M-Instruct}", "a-model")
                assert ran == expected.replace("${HOST:-0.0.0.0}", "0.0.0.0")
        assert not [part for part in run if re.match(r"(^|.*[@=])/(data|tokens|state)(/|$)", part)]


def test_ports_are_each_used_once_and_scraped() -> None:
    text = COMPOSE.read_text()
    ports = re.findall(r'"(313\d\d)"|:(313\d\d)\n', text)
    used = [first or second for first, second in ports]
    assert len(used) == len(set(used))
    scraped = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())["scrape_configs"]
    targets = {target for job in scraped for static in job["static_configs"] for target in static["targets"]}
    assert targets == {f"127.0.0.1:{port}" for port in ("31380", "31381", "31382", "31383", "31300")}


@pytest.mark.parametrize("unit", UNITS, ids=lambda unit: unit.stem)
def test_units_run_commands_that_exist(unit: Path) -> None:
    (command,) = re.findall(r"^ExecStart=\S+/geopetals (.+)$", unit.read_text(), re.MULTILINE)
    parse(re.sub(r"\$\{PUBLIC_IP\}", "192.0.2.1", re.sub(r"\$\{MODEL\}", "a-model", command)).split())


def test_kubernetes_runs_commands_that_exist() -> None:
    kinds = []
    for manifest in yaml.safe_load_all((ROOT / "deploy/kubernetes/geopetals.yaml").read_text()):
        kinds.append(manifest["kind"])
        assert manifest["metadata"].get("namespace") == "geopetals" or manifest["kind"] == "Namespace"
        for container in manifest.get("spec", {}).get("template", {}).get("spec", {}).get("containers", []):
            assert container["command"] == ["geopetals"]
            parse([str(part) for part in container["args"]])
            mounted = {mount["name"] for mount in container["volumeMounts"]}
            claims = {each["metadata"]["name"] for each in manifest["spec"].get("volumeClaimTemplates", [])}
            volumes = {volume["name"] for volume in manifest["spec"]["template"]["spec"]["volumes"]}
            assert mounted == volumes | claims
    assert kinds.count("Deployment") == 2


def test_every_secret_is_in_the_instructions() -> None:
    text = (ROOT / "deploy/kubernetes/geopetals.yaml").read_text()
    used = set(re.findall(r"secretName: ([\w-]+)|secretKeyRef: \{name: ([\w-]+)", text))
    names = {first or second for first, second in used}
    assert names == {"tokens", "api-keys", "coordinator-http"}
    assert names == set(re.findall(r"^#.* create secret generic ([\w-]+)", text, re.MULTILINE))


def test_the_coordinators_address_is_known_before_its_pod_starts() -> None:
    found = list(yaml.safe_load_all((ROOT / "deploy/kubernetes/geopetals.yaml").read_text()))
    order = [(each["kind"], each["metadata"]["name"]) for each in found]
    assert order.index(("Service", "coordinator")) < order.index(("Deployment", "coordinator"))


def test_each_server_is_asked_for_its_own_health() -> None:
    for name, service in services().items():
        if "--metrics-port" in service.get("command", []):
            port = service["command"][service["command"].index("--metrics-port") + 1]
            assert service["environment"]["HEALTH_URL"] == f"http://127.0.0.1:{port}/metrics", name


def test_all_volumes_belong_to_the_images_user() -> None:
    (owned,) = re.findall(r"install -d -o geopetals -g geopetals (.+)", (ROOT / "Dockerfile").read_text())
    ours = [service for service in services().values() if service["image"] == "geopetals"]
    assert {volume.split(":")[1] for service in ours for volume in service["volumes"]} == set(owned.split())


def test_relays_join_as_relays() -> None:
    (relay,) = [unit for unit in UNITS if "relay" in unit.stem]
    assert "@/etc/geopetals/relay.token" in relay.read_text()
