"""Files: where data and caches lie, and writing that loses nothing."""

import contextlib
import os
from pathlib import Path

from common.cli import UserError


def data_folder(name: str) -> Path:
    """Where a data set known by name lies: $PARACLIP_DATA/name, by default shards/name."""
    return Path(os.environ.get("PARACLIP_DATA") or "shards") / name


def cache_folder() -> Path:
    """$PARACLIP_CACHE, by default ~/.cache/paraclip. It is made if there is none."""
    folder = Path(os.environ.get("PARACLIP_CACHE") or os.path.expanduser("~/.cache/paraclip"))
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextlib.contextmanager
def atomic_write(path: Path | str):
    """Opens a file for writing bytes, which takes the place of `path` once all is on disk.

    An error or a kill on the way leaves the former file as it was. A kill also leaves the
    unfinished file, .NAME.paraclip-tmp, which the next write to `path` overwrites. A link is
    written through. Raises UserError if `path` is a folder, device or pipe, OSError with `path`.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise UserError(f"{path} cannot be written: it is not a regular file")
    unfinished = target.with_name(f".{target.name}.paraclip-tmp")
    try:
        with open(unfinished, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, target)
    except OSError as error:
        if error.errno is None:
            raise
        # The error of a full disk does not say which file.
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        unfinished.unlink(missing_ok=True)
