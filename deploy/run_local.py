"""Runs the services of compose.yaml on this machine without containers: the same commands, ports and start order.

    python deploy/run_local.py --root DIR [SERVICE ...]

Volumes are folders below DIR, and paths in commands are rewritten to them. Programs that are not installed (prometheus,
grafana) are left out with a word. Ctrl-C, or the end of any service, ends all of them.
"""

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import yaml

COMPOSE = Path(__file__).with_name("compose.yaml")
IMAGE_ENVIRONMENT = {"GEOPETALS_CACHE": "/data/geopetals", "HF_HOME": "/data/huggingface", "PYTHONUNBUFFERED": "1"}
"""As the Dockerfile sets it."""
PROGRAMS = {"prom/prometheus": "prometheus", "grafana/grafana": "grafana-server"}
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")
_POLL_S, _STOP_S, _READY_S = 0.1, 20.0, 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Service:
    """One service with its paths on this machine. `after` must be healthy before it starts."""

    name: str
    command: tuple[str, ...]
    environment: Mapping[str, str]
    after: tuple[str, ...] = ()
    health: tuple[str, ...] = ()
    folders: tuple[Path, ...] = field(default=())

    @property
    def program(self) -> str | None:
        return shutil.which(self.command[0], path=self.environment.get("PATH"))


def read_services(compose: Path, root: Path, environment: Mapping[str, str]) -> list[Service]:
    """All services of the file, in its order. Raises ValueError for what cannot be run without containers."""
    found = yaml.safe_load(compose.read_text(encoding="utf-8"))
    return [_service(name, each, compose.parent, root, environment) for name, each in found["services"].items()]


def _service(name: str, raw: dict[str, Any], folder: Path, root: Path, environment: Mapping[str, str]) -> Service:
    if raw.get("network_mode") != "host":
        raise ValueError(f"service {name} has a network of its own: only services on the machine's can be run here")
    mounts = _mounts(raw.get("volumes", []), folder, root)

    def local(text: Any) -> str:
        return _relocate(_substitute(str(text), environment), mounts)

    image = str(raw["image"]).partition(":")[0]
    entrypoint = [PROGRAMS[image]] if image in PROGRAMS else raw["entrypoint"]
    own = {**IMAGE_ENVIRONMENT, **raw.get("environment", {})}
    health = [sys.executable if part == "python" else part for part in raw.get("healthcheck", {}).get("test", [])[1:]]
    return Service(
        name=name,
        command=tuple(map(local, [*entrypoint, *raw.get("command", [])])),
        environment={**environment, **{key: local(value) for key, value in own.items()}},
        after=tuple(raw.get("depends_on", {})),
        health=tuple(health),
        folders=tuple(path for path in mounts.values() if path.is_relative_to(root)),
    )


def _mounts(volumes: Sequence[str], folder: Path, root: Path) -> dict[str, Path]:
    """Where each path of the container is here: a volume below `root`, or what the file names."""
    mounts = {}
    for volume in volumes:
        source, target, *_ = volume.split(":")
        mounts[target] = (folder / source).resolve() if source.startswith(".") else root / source
    return mounts


def _relocate(text: str, mounts: Mapping[str, Path]) -> str:
    """A path may stand alone, after `@` or after `--option=`."""
    for target, path in mounts.items():
        text = re.sub(rf"(^|[@=]){re.escape(target)}(?=/|$)", lambda match, path=path: match[1] + str(path), text)
    return text


def _substitute(text: str, environment: Mapping[str, str]) -> str:
    return _VARIABLE.sub(lambda match: environment.get(match[1]) or match[2] or "", text)


class Runner:
    """The processes. A context manager: they end with the block."""

    def __init__(self, services: Sequence[Service]) -> None:
        self._services = {service.name: service for service in services}
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """In the order of the file. Raises RuntimeError if one ends, or does not become healthy."""
        for service in self._services.values():
            if service.program is None:
                print(f"{service.name}: {service.command[0]} is not installed here, left out", flush=True)
                continue
            for name in service.after:
                self._wait_healthy(self._services[name])
            for path in service.folders:
                path.mkdir(parents=True, exist_ok=True)
            print(f"{service.name}: {' '.join(service.command)}", flush=True)
            self.running[service.name] = subprocess.Popen(
                [service.program, *service.command[1:]], env=dict(service.environment), start_new_session=True
            )

    def wait_any_end(self) -> str:
        """The name of the first that ends."""
        while True:
            for name, process in self.running.items():
                if process.poll() is not None:
                    return name
            time.sleep(_POLL_S)

    def _wait_healthy(self, service: Service) -> None:
        deadline = time.monotonic() + _READY_S
        while subprocess.run(
            service.health, env=dict(service.environment), capture_output=True, check=False
        ).returncode:
            if self.running[service.name].poll() is not None:
                raise RuntimeError(f"{service.name} has ended")
            if time.monotonic() > deadline:
                raise RuntimeError(f"{service.name} is not healthy after {_READY_S:.0f} s")
            time.sleep(_POLL_S)

    def __enter__(self) -> "Runner":
        return self

    def __exit__(self, *_: object) -> None:
        for process in reversed(self.running.values()):
            process.terminate()
        deadline = time.monotonic() + _STOP_S
        for process in self.running.values():
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, metavar="DIR", help="where volumes are kept")
    parser.add_argument("services", nargs="*", metavar="SERVICE", help="default: all")
    args = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    services = read_services(COMPOSE, args.root.resolve(), os.environ)
    chosen = [service for service in services if not args.services or service.name in args.services]
    with Runner(chosen) as runner:
        try:
            runner.start()
            print("all started; Ctrl-C ends them", flush=True)
            ended = runner.wait_any_end()
        except KeyboardInterrupt:
            return 0
        except RuntimeError as error:
            print(error, file=sys.stderr)
            return 1
    print(f"{ended} has ended by itself", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
