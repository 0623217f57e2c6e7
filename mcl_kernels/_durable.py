"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_synced(path: Path, content: bytes) -> None:
    """Writes and syncs a file that nobody reads yet."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def replace_file(path: Path, content: bytes) -> None:
    """Writes a file beside `path`, syncs it and renames it: readers see the old content or the new one."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        write_synced(partial, content)
        partial.replace(path)
        sync_directory(path.parent)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


def sync_directory(path: Path) -> None:
    """Makes renames within a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
