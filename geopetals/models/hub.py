"""The `config.json` of a model on the Hugging Face Hub, or in its cache on this machine."""

from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, errors, hf_hub_download, try_to_load_from_cache

from geopetals.errors import CheckpointError

_LOOKUP_TIMEOUT_S = 10.0
# HfHubHTTPError derives from the error of the HTTP library that this release of huggingface_hub uses.
_BASES: Any = errors.HfHubHTTPError.__bases__
_UNREACHABLE: tuple[type[Exception], ...] = (*_BASES, OSError, ValueError, RuntimeError)


def fetch_config(repository: str, revision: str | None) -> Path:
    """From the cache if it is there, else downloaded. Raises CheckpointError."""
    try:
        cached = try_to_load_from_cache(repository, "config.json", revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        # Downloading by itself would try for half a minute where there is no network.
        commit = HfApi().model_info(repository, revision=revision, timeout=_LOOKUP_TIMEOUT_S).sha
        return Path(hf_hub_download(repository, "config.json", revision=commit))
    except (errors.GatedRepoError, errors.HFValidationError, errors.RepositoryNotFoundError) as error:
        raise CheckpointError(
            f"the Hugging Face Hub shows no {repository}: check the name, or run `hf auth login` if it is private."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise CheckpointError(f"{repository} has no revision {revision}: check --revision.") from error
    except _UNREACHABLE as error:
        if isinstance(error, errors.EntryNotFoundError) and not isinstance(error, errors.LocalEntryNotFoundError):
            raise CheckpointError(f"{repository} has no config.json: choose a repository with a model.") from error
        raise CheckpointError(
            f"there is no directory {repository}, and the Hugging Face Hub cannot be reached ({type(error).__name__}): "
            "give the path of a config.json, or check the name and the network."
        ) from error
