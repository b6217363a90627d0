"""Nobody is ended at the word of a directory that others could have written."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from geopetals.wan import Wan, WanError, processes
from geopetals.wan.control import request
from geopetals.wan.enter import fetch
from geopetals.wan.state import StateDirectory
from geopetals.wan.wan import down

STRANGER = 12345
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory to another user")

USES: dict[str, Callable[[Path], object]] = {
    "exists": lambda path: StateDirectory(path).exists(),
    "state": lambda path: StateDirectory(path).state(),
    "lock": lambda path: StateDirectory(path).lock(),
    "make": lambda path: StateDirectory(path).make(),
    "down": lambda path: down(StateDirectory(path)),
    "attach": Wan.attach,
    "status": lambda path: request(path, {"do": "status"}),
}


@pytest.fixture(params=USES)
def use(request: pytest.FixtureRequest) -> Callable[[Path], object]:
    return USES[request.param]


@pytest.fixture
def network(tmp_path: Path) -> Path:
    """As `geopetals wan up` makes it, with a state that names this machine's own network."""
    path = tmp_path / "geopetals-wan-0" / "wan"
    StateDirectory(path).make()
    own = Path("/proc/self/ns/net").stat()
    hosts = {"a": {"namespace": [own.st_dev, own.st_ino], "cookie": 1}}
    (path / "state.json").write_text(json.dumps({"pid": os.getpid(), "start_time": 0, "hosts": hosts}))
    return path


@needs_root
@pytest.mark.parametrize("planted", ["wan", "geopetals-wan-0"])
def test_what_another_user_has_planted_is_refused(use: Callable[[Path], object], network: Path, planted: str) -> None:
    os.chown(network if network.name == planted else network.parent, STRANGER, STRANGER)
    with pytest.raises(WanError, match=f"{planted} belongs to another user"):
        use(network)
    assert [file.name for file in network.iterdir()] == ["state.json"]


@pytest.mark.parametrize("planted", ["wan", "geopetals-wan-0"])
@pytest.mark.parametrize("mode", [0o770, 0o707])
def test_where_others_may_write_is_refused(
    use: Callable[[Path], object], network: Path, planted: str, mode: int
) -> None:
    (network if network.name == planted else network.parent).chmod(mode)
    with pytest.raises(WanError, match=f"others may write into .*{planted}:"):
        use(network)


@pytest.mark.parametrize("planted", ["wan", "geopetals-wan-0"])
def test_a_symbolic_link_is_refused(use: Callable[[Path], object], network: Path, tmp_path: Path, planted: str) -> None:
    link = network if network.name == planted else network.parent
    link.rename(tmp_path / "elsewhere")
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(WanError, match=f"{planted} is a symbolic link"):
        use(network)


def test_no_host_of_a_refused_network_is_entered(network: Path) -> None:
    network.chmod(0o777)
    with pytest.raises(LookupError, match="others may write"):
        fetch(str(network), "a")


def test_one_that_is_not_there_is_no_network(tmp_path: Path) -> None:
    assert not StateDirectory(tmp_path / "geopetals-wan-0" / "wan").exists()
    assert not down(StateDirectory(tmp_path / "none"))


def test_the_networks_of_this_process_and_of_the_machine_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "_signal", lambda *_: pytest.fail("somebody would have been killed"))
    monkeypatch.setattr(processes, "_cookies", lambda files: [1] * len(files))
    paths = [path for pid in ("self", "1") if os.access(path := Path(f"/proc/{pid}/ns/net"), os.R_OK)]
    own = {(status.st_dev, status.st_ino): 1 for status in (path.stat() for path in paths)}
    assert own
    with processes.still_theirs(own) as left:
        assert left == set()
    assert processes.end_all(own) == 0
