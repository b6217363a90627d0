"""What holds for every run of the tests: none is silently skipped, and no process or file outlives them.

* With CI=true a skipped test that `ci_skips.txt` does not name fails the run; so does a run that executed no test.
* A process or temporary file that is left when the last test has ended fails the run, here too.
"""

import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

ALLOWED_SKIPS = Path(__file__).with_name("ci_skips.txt")
MARK = "GEOPETALS_TEST_RUN"
GRACE_S = 5.0
GUARD = "geopetals-run-guard"


def read_allowed_skips(path: Path) -> dict[str, str]:
    """Reasons by node id. Lines are `NODE_ID # reason`; a node id without its `[parameters]` allows all of them."""
    allowed = {}
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        node_id, _, reason = line.partition(" # ")
        if not reason.strip():
            raise pytest.UsageError(f"{path.name}:{number}: give the reason: NODE_ID # reason")
        allowed[node_id.strip()] = reason.strip()
    return allowed


def processes_of_run(run_id: str) -> list[psutil.Process]:
    """Descendants of this process, and orphans of theirs, which the mark in their environment gives away."""
    found = set(psutil.Process().children(recursive=True))
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(MARK) == run_id:
                found.add(process)
        except (psutil.Error, OSError):
            continue  # ended meanwhile, or another user's
    return [process for process in found if not is_harmless(process)]


def is_harmless(process: psutil.Process) -> bool:
    """Whether it is dead already, or Python's own resource tracker, which ends with its parent."""
    try:
        return process.status() == psutil.STATUS_ZOMBIE or "multiprocessing.resource_tracker" in " ".join(
            process.cmdline()
        )
    except psutil.NoSuchProcess:
        return True


class RunGuard:
    """Watches one run; its findings appear in the summary and in the exit status."""

    def __init__(self, temp_dir: Path) -> None:
        self.run_id = uuid.uuid4().hex
        self.temp_dir = temp_dir
        self.skipped: dict[str, str] = {}
        self.executed = 0
        self.findings: list[str] = []

    @pytest.hookimpl
    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.executed += report.when == "call" and not report.skipped
        self._note_skip(report)

    @pytest.hookimpl
    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        self._note_skip(report)

    def _note_skip(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.skipped and not hasattr(report, "wasxfail"):
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self.skipped[report.nodeid] = reason

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        self.findings += self._leaks()
        if os.environ.get("CI") == "true":
            self.findings += self._forbidden_skips()
        if self.findings and session.exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED
        if not self.executed and not session.config.option.collectonly and session.exitstatus == pytest.ExitCode.OK:
            self.findings.append("no test was executed")
            session.exitstatus = pytest.ExitCode.NO_TESTS_COLLECTED

    def _leaks(self) -> Iterator[str]:
        _, alive = psutil.wait_procs(processes_of_run(self.run_id), timeout=GRACE_S)
        for process in alive:
            try:
                yield f"process {process.pid} outlived the tests: {' '.join(process.cmdline())}"
                process.kill()
            except psutil.NoSuchProcess:
                continue
        for path in self.temp_dir.iterdir():
            # multiprocessing removes its own when Python exits; torch keeps one cache for each user.
            if not path.name.startswith(("pymp-", "torchinductor_")):
                yield f"the tests left {path.name} in the temporary directory"

    def _forbidden_skips(self) -> Iterator[str]:
        allowed = read_allowed_skips(ALLOWED_SKIPS)
        for node_id, reason in self.skipped.items():
            if node_id not in allowed and node_id.partition("[")[0] not in allowed:
                yield f"{node_id} was skipped and is not in tests/{ALLOWED_SKIPS.name}: {reason}"

    @pytest.hookimpl
    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self.findings:
            terminalreporter.section("the run fails", red=True, bold=True)
        for finding in self.findings:
            terminalreporter.line(f"ERROR {finding}", red=True)


def pytest_configure(config: pytest.Config) -> None:
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background jobs
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # pytest's own directories stay where they were; the code under test gets one that must be empty in the end.
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", tempfile.gettempdir())
    temp_dir = Path(tempfile.mkdtemp(prefix="gp-"))
    guard = RunGuard(temp_dir)
    os.environ["TMPDIR"] = tempfile.tempdir = str(temp_dir)
    os.environ[MARK] = guard.run_id
    config.pluginmanager.register(guard, GUARD)


def pytest_unconfigure(config: pytest.Config) -> None:
    guard = config.pluginmanager.get_plugin(GUARD)
    if isinstance(guard, RunGuard):
        shutil.rmtree(guard.temp_dir, ignore_errors=True)
