"""SmolLM2-135M-Instruct from the Hugging Face Hub; gives up within seconds where there is no Internet."""

import queue
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from geopetals.progress import Advance, Reporter

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

REPOSITORY = "HuggingFaceTB/SmolLM2-135M-Instruct"
DEADLINE_S = 5.0

_OPTIONAL = ("generation_config.json", "special_tokens_map.json", "vocab.json", "merges.txt", "chat_template.jinja")


class HubUnavailable(Exception):
    """The Hub does not deliver the model; the text says why in a few words."""


def link_into(model: Path, *, needed: Sequence[str], reporter: Reporter) -> str:
    """Download the files into the Hub's own cache (no transfer if they are there) and link them into `model`.

    Returns where they come from. Raises HubUnavailable, and OSError for what the disk refuses.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    # Of httpx or httpx2, whichever this huggingface_hub is built on: broken downloads raise it unwrapped.
    http_error = cast(type[Exception], HfHubHTTPError.__bases__[0])
    try:
        files = _cached(needed)
        if not files:
            _download(needed, reporter)
            files = _cached(needed)
    except (http_error, HfHubHTTPError, LocalEntryNotFoundError, ConnectionError, TimeoutError) as error:
        raise HubUnavailable(_brief(error)) from error
    except OSError as error:
        if error.errno is not None:  # the disk's, not the client's own complaint about what it received
            raise
        raise HubUnavailable(_brief(error)) from error
    if not files:
        raise HubUnavailable(f"{REPOSITORY} changed during the download")
    for file in files:
        (model / file.name).symlink_to(file.resolve())
    return f"{REPOSITORY}@{files[0].parent.name[:12]}"


def _brief(error: Exception) -> str:
    return " ".join(str(error).split())[:120] or type(error).__name__


def _cached(needed: Sequence[str]) -> list[Path]:
    """The files of one commit in the Hub's cache; none if any that is needed is not there."""
    from huggingface_hub import try_to_load_from_cache

    found = {name: try_to_load_from_cache(REPOSITORY, name) for name in (*needed, *_OPTIONAL)}
    files = {name: Path(path) for name, path in found.items() if isinstance(path, str)}
    if not set(needed) <= set(files) or len({file.parent for file in files.values()}) > 1:
        return []
    return list(files.values())


def _download(needed: Sequence[str], reporter: Reporter) -> None:
    from huggingface_hub import hf_hub_download

    sizes = {file.rfilename: file.size or 0 for file in _model_info().siblings or ()}
    absent = [name for name in needed if name not in sizes]
    if absent:
        raise HubUnavailable(f"{REPOSITORY} has no {', '.join(absent)}")
    wanted = [name for name in (*needed, *_OPTIONAL) if name in sizes]
    total = sum(sizes[name] for name in wanted)
    with reporter.task(f"downloading {REPOSITORY}, {total / 1e6:.0f} MB", total=total) as advance:
        bar = _bar(advance)
        for name in wanted:
            hf_hub_download(REPOSITORY, name, etag_timeout=DEADLINE_S, tqdm_class=bar)


def _model_info() -> "ModelInfo":
    """Ask the Hub in a thread: the client's own timeout counts per address, of which a name has up to eight."""
    from huggingface_hub import HfApi

    answers: queue.SimpleQueue[ModelInfo | Exception] = queue.SimpleQueue()

    def ask() -> None:
        try:
            answers.put(HfApi().model_info(REPOSITORY, timeout=DEADLINE_S, files_metadata=True))
        except Exception as error:  # noqa: BLE001 - raised again in the caller's thread, which tells them apart
            answers.put(error)

    threading.Thread(target=ask, name="hub-probe", daemon=True).start()
    try:
        answer = answers.get(timeout=DEADLINE_S)
    except queue.Empty:
        raise TimeoutError(f"no answer within {DEADLINE_S:.0f} s") from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _bar(advance: Advance) -> type[Any]:
    """A tqdm class, which is what the Hub's client reports to, that only passes the numbers on."""
    from tqdm.auto import tqdm

    class Forward(tqdm):  # type: ignore[type-arg, misc, unused-ignore]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            kwargs.pop("name", None)
            super().__init__(*args, **kwargs | {"disable": True})

        def update(self, n: float | None = 1) -> bool | None:
            advance(int(n or 0))
            return None

    return Forward
