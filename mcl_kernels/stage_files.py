"""A finished stage as a directory: it is there whole or not at all, and damage is named, never used.

    stage-0/centers.npy  labels.npy  tuples.npy  state.safetensors or state.pt  stage.json

Every file is written into a hidden directory beside, synced, and the directory renamed once. stage.json holds the
SHA-256 of each file, and its own. Nothing is unpickled: arrays load with `allow_pickle=False`, states that
safetensors cannot hold with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mcl_kernels._durable import sync_directory, write_synced

DESCRIPTION = "stage.json"


def stage_directory(run: Path, index: int) -> Path:
    return run / f"stage-{index}"


def write_stage(
    run: Path, index: int, arrays: Mapping[str, Tensor], state: Mapping[str, Any] | None, description: dict[str, Any]
) -> None:
    """Writes a stage; when this returns it is on disk, and if it raises the run is as it was."""
    final = stage_directory(run, index)
    if final.exists():
        raise FileExistsError(f"{final} exists already: another process finished this stage")
    contents = {f"{name}.npy": _array_bytes(array) for name, array in arrays.items()}
    if state is not None:
        name, content = _state_bytes(state)
        contents[name] = content
    partial = run / f".stage-{index}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        for name, content in contents.items():
            write_synced(partial / name, content)
        files = {name: _sha256(content) for name, content in contents.items()}
        write_synced(partial / DESCRIPTION, _description_bytes({**description, "files": files}))
        sync_directory(partial)
        partial.rename(final)
        sync_directory(run)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(
            error.errno,
            f"stage {index} could not be saved ({error.strerror}); earlier stages are intact, and finish() can be "
            "called again",
            str(final),
        ) from error


def read_stage(run: Path, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The arrays and the description of a stage, after every file of it was checked."""
    directory = stage_directory(run, index)
    description = _read_description(directory / DESCRIPTION)
    arrays = {}
    for name, digest in description["files"].items():
        content = _read(directory / name)
        if _sha256(content) != digest:
            raise _damaged(directory / name, f"its SHA-256 is not the one in {DESCRIPTION}")
        if name.endswith(".npy"):
            arrays[name.removesuffix(".npy")] = torch.from_numpy(np.load(io.BytesIO(content), allow_pickle=False))
    return arrays, description


def read_state(run: Path, index: int) -> dict[str, Any] | None:
    """The state given to `finish`, on the CPU; None if there was none."""
    directory = stage_directory(run, index)
    if (directory / "state.safetensors").exists():
        from safetensors.torch import load_file

        return load_file(directory / "state.safetensors")
    if (directory / "state.pt").exists():
        state: dict[str, Any] = torch.load(directory / "state.pt", map_location="cpu", weights_only=True)
        return state
    return None


def _array_bytes(array: Tensor) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array.cpu().numpy(), allow_pickle=False)
    return buffer.getvalue()


def _state_bytes(state: Mapping[str, Any]) -> tuple[str, bytes]:
    """File name and content: safetensors for tensors that share no memory, PyTorch's format for anything else."""
    tensors = {name: value.detach().cpu().contiguous() for name, value in state.items() if isinstance(value, Tensor)}
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors.values() if tensor.numel()}
    if len(tensors) == len(state) and len(storages) == sum(tensor.numel() > 0 for tensor in tensors.values()):
        from safetensors.torch import save

        return "state.safetensors", save(tensors)
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    buffer.seek(0)
    try:
        torch.load(buffer, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise TypeError(
            f"state must hold tensors, numbers, strings and containers of them, which load without unpickling: {error}"
        ) from error
    return "state.pt", buffer.getvalue()


def _description_bytes(description: dict[str, Any]) -> bytes:
    """Readable JSON that ends in the checksum of everything before it."""
    digest = _sha256(json.dumps(description, sort_keys=True).encode())
    return json.dumps({**description, "sha256": digest}, indent=2).encode()


def _read_description(path: Path) -> dict[str, Any]:
    content = _read(path)
    try:
        description: dict[str, Any] = json.loads(content)
        del description["sha256"]
        intact = _description_bytes(description) == content
    except (ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise _damaged(path, "its content is not what its own SHA-256 says")
    return description


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise _damaged(path, "the file is missing") from None


def _damaged(path: Path, why: str) -> RuntimeError:
    return RuntimeError(f"{path} is damaged: {why}; delete {path.parent} to run that stage and those after it again")


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
