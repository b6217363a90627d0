"""Folders for the sockets and keys of p2pd daemons: private to the user, and swept when their process was killed."""

import os
import re
import shutil
import tempfile
from pathlib import Path

_PREFIX = "geopetals-p2pd-"


def make_private_folder() -> Path:
    """A new folder that only this user can enter: whoever opens p2pd's control socket can speak in our name."""
    return Path(tempfile.mkdtemp(prefix=f"{_PREFIX}{os.getpid()}-"))


def sweep_stale_folders() -> None:
    """Remove what processes left that were killed before they could."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        match = re.match(rf"{_PREFIX}(\d+)-", folder.name)
        if match and not _is_running(int(match.group(1))):
            shutil.rmtree(folder, ignore_errors=True)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
