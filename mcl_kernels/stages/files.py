"""The files of a finished stage. A stage is complete or absent; a damaged file is named in an error and never used.

    stage-0/centers.npy  labels.npy  tuples.npy  state.safetensors or state.pt  stage.json

All files are written into a hidden directory next to the final one and synced; then that directory is renamed.
stage.json holds the SHA-256 of each file, and of its own content. They are checked whenever a file is read, and for the
labels when they are mapped. Arrays are parsed without pickle, and must have the dtypes and shapes of a stage.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import json
import shutil
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor

from mcl_kernels._durable import open_regular, sha256_of, sync_directory, sync_renames, synced_file, write_array
from mcl_kernels._validate import FLOAT_DTYPES
from mcl_kernels.stages.saved_state import PYTORCH, SAFETENSORS, State, load_state
from mcl_kernels.stages.stored_labels import StoredLabels, map_labels

DESCRIPTION, LABELS = "stage.json", "labels.npy"
ARRAYS, STATES = {"centers.npy", LABELS, "tuples.npy"}, {SAFETENSORS, PYTORCH}
CONFIGURATION = {"n_samples", "n_clusters", "metric", "seed", "keys"}
STATISTICS = {"inertia", "iterations", "cluster_sizes", "label_sizes", "clustering_seconds"}
MISSING, WRONG_DIGEST = "the file is missing", f"its SHA-256 is not the one in {DESCRIPTION}"


def stage_directory(run: Path, index: int) -> Path:
    """Directory of a finished stage."""
    return run / f"stage-{index}"


def write_stage(
    run: Path, index: int, arrays: Mapping[str, Tensor], state: State | None, description: dict[str, Any]
) -> None:
    """Writes a stage. When this returns the stage is on disk; if it raises the run is unchanged.

    Raises:
        FileExistsError: another process finished this stage.
        OSError: a file cannot be written; the error names the stage.
    """
    hidden, final = _hidden_directory(run, index), stage_directory(run, index)
    if index == 0:
        run.mkdir(parents=True, exist_ok=True)
    elif not run.exists():
        raise FileNotFoundError(f"{run} is gone, and with it the stages before stage {index}")
    try:
        _write_files(hidden, arrays, state, description)
        hidden.rename(final)
    except BaseException as error:
        shutil.rmtree(hidden, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        if final.exists():  # that process may also have removed our hidden directory, as a stale one
            raise FileExistsError(f"{final} exists already: another process finished this stage") from None
        raise OSError(
            error.errno,
            f"stage {index} could not be saved ({error.strerror}); earlier stages are intact, and finish() can be "
            "called again",
            str(final),
        ) from error
    sync_renames(run)
    with contextlib.suppress(OSError):
        for stale in run.glob(f".stage-{index}.*"):  # left by processes that were killed while they wrote this stage
            shutil.rmtree(stale, ignore_errors=True)


def _write_files(
    directory: Path, arrays: Mapping[str, Tensor], state: State | None, description: dict[str, Any]
) -> None:
    directory.mkdir()
    for name, array in arrays.items():
        with synced_file(directory / f"{name}.npy") as file:
            write_array(file, array.contiguous().numpy())
    if state is not None:
        with synced_file(directory / state.name) as file:
            file.write(state.content)
    files = {path.name: sha256_of(path) for path in sorted(directory.iterdir())}
    with synced_file(directory / DESCRIPTION) as file:
        file.write(_description_bytes({**description, "files": files}))
    sync_directory(directory)


def withdraw_stage(run: Path, index: int) -> None:
    """Removes a stage in one step: a process that is killed meanwhile leaves no damaged stage."""
    hidden = _hidden_directory(run, index)
    stage_directory(run, index).rename(hidden)
    shutil.rmtree(hidden, ignore_errors=True)


def _hidden_directory(run: Path, index: int) -> Path:
    return run / f".stage-{index}.{uuid.uuid4().hex}"


def read_stage(run: Path, index: int) -> tuple[dict[str, Tensor], StoredLabels, dict[str, Any]]:
    """Reads and checks every file of a stage; returns centres and tuples, the mapped labels, and the description.

    Raises:
        RuntimeError: a file that is missing, or that `write_stage` would not write; the message names it.
    """
    directory = stage_directory(run, index)
    description = _read_description(directory / DESCRIPTION)
    files, n_samples = description["files"], description["configuration"]["n_samples"]
    centers = _parse_array(directory / "centers.npy", files)
    tuples = _parse_array(directory / "tuples.npy", files)
    if centers.dtype not in FLOAT_DTYPES or centers.ndim != 2 or len(centers) == 0:
        _refuse(directory / "centers.npy", f"it holds {_dtype_and_shape(centers)}, not float [clusters, features]")
    if tuples.dtype != torch.int64 or tuples.ndim != 2 or tuples.shape[1] != index + 1 or len(tuples) == 0:
        _refuse(directory / "tuples.npy", f"it holds {_dtype_and_shape(tuples)}, not int64 [labels, {index + 1}]")
    if int(tuples.min()) < 0 or int(tuples[:, -1].max()) >= len(centers):
        _refuse(directory / "tuples.npy", f"its clusters are not all from 0 to {len(centers) - 1}")
    for name in STATES & files.keys():
        _check(directory / name, files[name])
    labels = _map_checked(directory / LABELS, files[LABELS])
    if labels.stored.dtype not in (torch.int32, torch.int64) or labels.shape != (n_samples,):
        _refuse(directory / LABELS, f"it holds {_dtype_and_shape(labels.stored)}, not int32 or int64 [{n_samples}]")
    smallest, largest = map(int, torch.aminmax(labels.stored))
    if smallest < 0 or largest >= len(tuples):
        _refuse(directory / LABELS, f"its labels are from {smallest} to {largest}, not from 0 to {len(tuples) - 1}")
    return {"centers": centers, "tuples": tuples}, labels, description


def map_written_labels(run: Path, index: int, labels: Tensor) -> StoredLabels:
    """Maps the labels of a stage that was just written from its file; keeps them in memory if that is impossible."""
    try:
        return map_labels(stage_directory(run, index) / LABELS)
    except (OSError, MemoryError):  # for example too many mapped files
        return StoredLabels(labels)


def read_state(run: Path, index: int) -> dict[str, Any] | None:
    """Checks and returns the state given to `finish`, on the CPU; None if there was none."""
    directory = stage_directory(run, index)
    files = _read_description(directory / DESCRIPTION)["files"]
    for name in STATES & files.keys():
        content = _read_checked(directory / name, files[name])
        try:
            return load_state(State(name, content))
        except MemoryError:
            raise
        except Exception as error:
            _refuse(directory / name, f"it cannot be loaded ({type(error).__name__})")
    return None


def _description_bytes(description: dict[str, Any]) -> bytes:
    """Returns readable JSON that ends in the checksum of everything before it."""
    digest = _sha256(json.dumps(description, sort_keys=True).encode())
    return json.dumps({**description, "sha256": digest}, indent=2).encode()


def _read_description(path: Path) -> dict[str, Any]:
    content = _read(path)
    try:
        description: dict[str, Any] = json.loads(content)
        del description["sha256"]
        intact = _description_bytes(description) == content
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        _refuse(path, "its content does not match its own SHA-256")
    for part, names in (("files", ARRAYS), ("configuration", CONFIGURATION), ("statistics", STATISTICS)):
        entries = description.get(part)
        if not isinstance(entries, dict) or not names <= entries.keys():
            _refuse(path, f"{part!r} must hold {', '.join(sorted(names))}")
    files = description["files"]
    states = files.keys() - ARRAYS
    if not states <= STATES or len(states) > 1 or not all(isinstance(digest, str) for digest in files.values()):
        _refuse(path, f"'files' must hold SHA-256s of {', '.join(sorted(ARRAYS))} and one state: got {list(files)}")
    return description


def _parse_array(path: Path, files: Mapping[str, str]) -> Tensor:
    """Returns the array of a .npy file in the format of `write_array`; allocates no more than the file holds."""
    content = _read_checked(path, files[path.name])
    try:
        file = io.BytesIO(content)
        np.lib.format.read_magic(file)
        shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
        array = np.frombuffer(content, dtype, offset=file.tell()).reshape(shape, order="F" if fortran else "C")
        return torch.from_numpy(array.copy())
    except Exception as error:  # damaged bytes make the parsers of Python and numpy raise anything
        _refuse(path, f"it is not a plain array ({error})")


def _map_checked(path: Path, digest: str) -> StoredLabels:
    _check(path, digest)
    try:
        return map_labels(path)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # damaged bytes make the parsers of Python and numpy raise anything
        _refuse(path, f"it is not a plain array ({error})")


def _dtype_and_shape(x: Tensor) -> str:
    return f"{str(x.dtype).removeprefix('torch.')} {list(x.shape)}"


def _read_checked(path: Path, digest: str) -> bytes:
    content = _read(path)
    if _sha256(content) != digest:
        _refuse(path, WRONG_DIGEST)
    return content


def _check(path: Path, digest: str) -> None:
    with _naming_damage(path):
        different = sha256_of(path) != digest
    if different:
        _refuse(path, WRONG_DIGEST)


def _read(path: Path) -> bytes:
    with _naming_damage(path), open_regular(path) as file:
        return file.read()


@contextlib.contextmanager
def _naming_damage(path: Path) -> Iterator[None]:
    """Turns errors that mean a missing file, or another kind of file, into one that names the damaged stage."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError):
        _refuse(path, MISSING)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
        _refuse(path, "it is not a regular file")


def _refuse(path: Path, reason: str) -> NoReturn:
    raise RuntimeError(
        f"{path} is damaged: {reason}; delete {path.parent} to run that stage and those after it again"
    ) from None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
