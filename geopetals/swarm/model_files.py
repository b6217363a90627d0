"""Where a checkpoint's files come from: a local directory, or the Hugging Face Hub and its cache."""

import contextlib
import errno
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import HfApi, errors, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import logging as hub_logging
from tqdm import tqdm

from geopetals.errors import CheckpointError
from geopetals.progress import Advance, Reporter
from geopetals.swarm.licence import stated_licence

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_LOOKUP_TIMEOUT_S = 10.0
# HfHubHTTPError derives from the error of the HTTP library that this release of huggingface_hub uses.
_NETWORK_ERRORS: tuple[type[Exception], ...] = (
    *HfHubHTTPError.__bases__,
    getattr(errors, "XetDownloadError", OSError),
    OSError,
    ValueError,
    RuntimeError,
)


class ModelFiles(Protocol):
    """The files of one checkpoint at one revision."""

    short_name: str
    revision: str | None
    names: frozenset[str]

    def present(self, name: str) -> Path | None:
        """Where the file is on this machine, or None."""

    def fetch(self, name: str) -> Path:
        """Where the file is on this machine, downloaded if need be. Raises CheckpointError."""


def find_model(model: str, *, revision: str | None, reporter: Reporter) -> ModelFiles:
    """The files of a local directory, else of a Hub repository. Raises CheckpointError if it is neither."""
    try:
        directory = Path(model).expanduser()
        if model and directory.is_dir():
            return LocalFiles(directory)
        is_file = bool(model) and directory.exists()
    except (OSError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{model[:200]} cannot be read as a directory ({error}); check its name and rights."
        ) from error
    if is_file:
        raise CheckpointError(f"{model} is a file; give the directory that holds config.json and the safetensors.")
    if _REPO_ID.fullmatch(model) is None:
        raise CheckpointError(
            f"there is no directory {model[:200]!r}, and it cannot be a name on the Hugging Face Hub; check the name."
        )
    return HubFiles.locate(model, revision=revision, reporter=reporter)


class LocalFiles:
    """A directory; one inside the Hub's cache keeps the name and the commit that the cache knows."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.names = frozenset(path.name for path in directory.iterdir())
        resolved = directory.absolute()
        self.short_name = resolved.resolve().name or "model"
        self.revision: str | None = None
        if resolved.parent.name == "snapshots" and resolved.parents[1].name.startswith("models--"):
            self.short_name = resolved.parents[1].name.rpartition("--")[2]
            self.revision = resolved.name if re.fullmatch(r"[0-9a-f]{40}", resolved.name) else None

    def present(self, name: str) -> Path | None:
        path = self._directory / name
        return path if path.is_file() else None

    def fetch(self, name: str) -> Path:
        path = self.present(name)
        if path is None:
            raise CheckpointError(
                f"{self._directory} lacks the file {name}; copy it there or download the model again."
            )
        return path


class HubFiles:
    """A repository on the Hub at one commit; files are downloaded into the Hub's cache when they are asked for."""

    def __init__(
        self, repo: str, *, revision: str, names: frozenset[str], reporter: Reporter, licence: str | None = None
    ) -> None:
        self._repo = repo
        self._reporter = reporter
        self._licence = licence
        self.short_name = repo.rpartition("/")[2]
        self.revision: str | None = revision
        self._commit = revision
        self.names = names

    @classmethod
    def locate(cls, repo: str, *, revision: str | None, reporter: Reporter) -> "HubFiles":
        """Ask the Hub for the commit and its files; without a network, take what the cache has."""
        try:
            with _quiet_hub():
                info = HfApi().model_info(repo, revision=revision, timeout=_LOOKUP_TIMEOUT_S)
        except _NETWORK_ERRORS as error:
            cached = None if _is_refusal(error) else try_to_load_from_cache(repo, "config.json", revision=revision)
            if isinstance(cached, str):
                snapshot = Path(cached).parent
                found = frozenset(path.name for path in snapshot.iterdir())
                return cls(repo, revision=snapshot.name, names=found, reporter=reporter)
            raise CheckpointError(_unreachable(repo, revision, error)) from error
        names = frozenset(sibling.rfilename for sibling in info.siblings or [])
        if info.sha is None:
            raise CheckpointError(f"the Hugging Face Hub names no commit for {repo}; give --revision or a directory.")
        files = cls(repo, revision=info.sha, names=names, reporter=reporter, licence=stated_licence(info))
        if "config.json" in names and revision != info.sha:
            files._download(
                "config.json", revision or "main"
            )  # by name, or the cache will not know it without a network
        return files

    def present(self, name: str) -> Path | None:
        cached = try_to_load_from_cache(self._repo, name, revision=self._commit)
        return Path(cached) if isinstance(cached, str) else None

    def fetch(self, name: str) -> Path:
        return self._download(name, self._commit)

    def _terms(self, name: str) -> str:
        """Who fetches weights is told under which licence they are."""
        if not name.endswith(".safetensors"):
            return ""
        return f" of {self._repo} (licence: {self._licence or 'not stated'})"

    def _download(self, name: str, revision: str) -> Path:
        bar = _bar_for(self._reporter, f"downloading {name}{self._terms(name)}")
        try:
            with _quiet_hub():
                return Path(hf_hub_download(self._repo, name, revision=revision, tqdm_class=bar))
        except EntryNotFoundError as error:
            if not isinstance(error, LocalEntryNotFoundError):
                raise CheckpointError(f"{self._repo} on the Hugging Face Hub lacks the file {name}.") from error
            raise CheckpointError(_broken(self._repo, name, error)) from error
        except _NETWORK_ERRORS as error:
            if is_full(error):
                raise CheckpointError(
                    f"the disk is full: {name} needs space; free some, or set HF_HOME elsewhere."
                ) from error
            raise CheckpointError(_broken(self._repo, name, error)) from error


@contextlib.contextmanager
def _quiet_hub() -> Iterator[None]:
    """The library logs every retry; what comes of them is said once, by the error."""
    verbosity = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        hub_logging.set_verbosity(verbosity)


def _is_refusal(error: Exception) -> bool:
    """The Hub answered, and its answer was no: what the cache holds does not count."""
    return isinstance(error, GatedRepoError | RepositoryNotFoundError | RevisionNotFoundError | HFValidationError)


def is_full(error: Exception) -> bool:
    """The disk is, or the user's share of it."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or "No space left" in str(error)


def _unreachable(repo: str, revision: str | None, error: Exception) -> str:
    if isinstance(error, GatedRepoError):
        return f"{repo} is gated: accept its terms on the Hugging Face Hub, then log in with hf auth login."
    if isinstance(error, RevisionNotFoundError):
        return f"{repo} on the Hugging Face Hub has no revision {revision}; check --revision."
    if isinstance(error, RepositoryNotFoundError | HFValidationError):
        return (
            f"there is no directory {repo}, and no public model of that name on the Hugging Face Hub; check the name."
        )
    return (
        f"there is no directory {repo}, and the Hugging Face Hub cannot be reached ({type(error).__name__}); "
        "check the name or the network."
    )


def _broken(repo: str, name: str, error: Exception) -> str:
    reason = str(error).partition("\n")[0][:120] or type(error).__name__
    if isinstance(error, HfHubHTTPError) and error.response is not None:
        reason = f"HTTP {error.response.status_code}"
    return f"{name} of {repo} could not be downloaded ({reason}); run the command again to continue."


def _bar_for(reporter: Reporter, text: str) -> type[Any]:
    """A tqdm class, as hf_hub_download wants one, that reports to `reporter`."""

    class Bar(tqdm):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            self._stack = contextlib.ExitStack()
            self._advance: Advance | Callable[[int], None] = lambda done: None
            super().__init__(*args, **(kwargs | {"disable": True}))
            total = kwargs.get("total")
            if total:
                self._advance = self._stack.enter_context(reporter.task(text, total=int(total)))
                self._advance(int(kwargs.get("initial") or 0))

        def update(self, n: float | None = 1) -> bool | None:
            self._advance(int(n or 0))
            return super().update(n)

        def close(self) -> None:
            self._stack.close()
            super().close()

    return Bar
