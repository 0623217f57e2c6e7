"""Unusable files of features and labels: the error is one line that names the file, and no file is changed."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mcl_kernels.cli.input_files import open_features, open_labels
from mcl_kernels.cli.main import main
from tests.command_files import N, cluster, features, save_features


@pytest.fixture(autouse=True)
def _change_to_directory_of_features(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_features()


def truncate(path: str, left: int) -> None:
    Path(path).write_bytes(Path(path).read_bytes()[:left])


def save_bad(path: str) -> None:
    """Writes the unusable file that the name describes; does nothing for other names."""
    x, labels = features(), torch.arange(N)
    if path == "nan.npy":
        x[17, 2] = torch.nan
    files: dict[str, Callable[[], Any]] = {
        "nan.npy": lambda: np.save(path, x.numpy()),
        "cut.npy": lambda: (np.save(path, x.numpy()), truncate(path, 1000)),
        "cut.pt": lambda: (torch.save(x, path), truncate(path, 1000)),
        "cut.safetensors": lambda: (save_file({"a": x}, path), truncate(path, 1000)),
        "empty.npy": lambda: Path(path).touch(),
        "integers.npy": lambda: np.save(path, labels.view(-1, 1).numpy()),
        "integers.safetensors": lambda: save_file({"a": labels}, path),
        "vector.npy": lambda: np.save(path, x[:, 0].numpy()),
        "vector.safetensors": lambda: save_file({"a": x[:, 0].contiguous()}, path),
        "fortran.npy": lambda: np.save(path, np.asfortranarray(x.numpy())),
        "none.npy": lambda: np.save(path, np.zeros((0, 4), np.float32)),
        "several.pt": lambda: torch.save({"image": x, "text": x}, path),
        "list.pt": lambda: torch.save([x], path),
        "pickle.pt": lambda: torch.save(Path(path), path),
        "pickle.npy": lambda: np.save(path, np.array([{}]), allow_pickle=True),
        "floats.npy": lambda: np.save(path, labels.float().numpy()),
        "short.npy": lambda: np.save(path, labels[1:].numpy()),
        "matrix.npy": lambda: np.save(path, labels.view(-1, 2).numpy()),
        "x.csv": lambda: Path(path).write_text("1,2"),
    }
    if path in files:
        files[path]()


FEATURES_ERRORS = [
    ("missing.npy", "No such file or directory: 'missing.npy'"),
    ("missing.pt", "No such file or directory: 'missing.pt'"),
    ("missing.safetensors", "No such file or directory: 'missing.safetensors'"),
    ("x.csv", "FEATURES must be a .npy, .pt or .safetensors file: got x.csv"),
    ("cut.npy", "cut.npy is truncated: shape [300, 6] of float32 takes 7,200 bytes, and it holds 872"),
    ("cut.pt", "cut.pt cannot be read: "),
    ("cut.safetensors", "cut.safetensors cannot be read: "),
    ("empty.npy", "empty.npy cannot be read: it is not a .npy file, since it begins with b''"),
    ("pickle.npy", "pickle.npy holds Python objects, and nothing is unpickled: save an array of numbers"),
    ("pickle.pt", "pickle.pt holds pathlib.PosixPath, and nothing but tensors is unpickled: save a tensor"),
    ("nan.npy", "nan.npy must be finite: got NaN or infinity in row 17"),
    ("integers.npy", "integers.npy must be float16, bfloat16, float32 or float64: got torch.int64"),
    ("integers.safetensors", "a of integers.safetensors must be one of F16, BF16, F32, F64: got I64"),
    ("vector.npy", "vector.npy must have shape [rows, features]: got [300]"),
    ("vector.safetensors", "a of vector.safetensors must have shape [rows, features]: got [300]"),
    ("fortran.npy", "save the array in C order: np.save(path, np.ascontiguousarray(x))"),
    ("none.npy", "none.npy must not be empty: got shape [0, 4]"),
    ("several.pt", "--tensor must be one of image, text in several.pt: got None"),
    ("list.pt", "list.pt must hold a tensor or an array: got list"),
]
OPTIONS_ERRORS = [
    (["--previous", "missing.npy"], "No such file or directory: 'missing.npy'"),
    (["--previous", "x.csv"], "--previous must be .npy or .pt files: got x.csv"),
    (
        ["--previous", "good.npy", "short.npy"],
        "short.npy must have one label per row of FEATURES: got 299 labels for 300",
    ),
    (["--previous", "floats.npy"], "floats.npy must be an integer tensor: got torch.float32"),
    (["--previous", "matrix.npy"], "matrix.npy must be a vector: got shape [150, 2]"),
    (["--previous", "list.pt"], "list.pt must be an integer tensor: got list"),
    (["--previous", "cut.npy"], "cut.npy is truncated"),
    (["--tensor", "image"], "--tensor is for files of several tensors: f0.npy holds one"),
    (["--clusters", "301"], "--clusters must be at most the number of rows: got 301 for 300 rows"),
    (["--clusters", "0"], "n_clusters must be at least 1: got 0"),
    (["--batch-size", "0"], "batch_size must be at least 1: got 0"),
    (["--out", "y.csv"], "--out must be a .npy or .pt file: got y.csv"),
    (["--out", "directory.npy"], "--out must be a file: directory.npy is a directory"),
    (["--out", "f0.npy"], "--out must not be one of the files that are read: got f0.npy"),
    (["--previous", "good.npy", "--out", "good.npy"], "--out must not be one of the files that are read: got good.npy"),
    (["--out", "x.csv/y.npy"], "--out cannot be written (Not a directory)"),
    (["--out", "summary.npy"], "the summary of --out must be a file: summary.npy.json is a directory"),
]
ERRORS = [([path], message) for path, message in FEATURES_ERRORS]
ERRORS += [(["f0.npy", *options], message) for options, message in OPTIONS_ERRORS]


@pytest.mark.parametrize(("arguments", "message"), ERRORS, ids=[" ".join(arguments) for arguments, _ in ERRORS])
def test_errors_are_one_line_and_change_no_file(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for argument in arguments:
        save_bad(argument.split("/")[0])
    Path("directory.npy").mkdir()
    Path("summary.npy.json").mkdir()
    np.save("good.npy", np.zeros(N, np.int32))
    Path("y.npy").write_bytes(b"old content")
    before = {path: path.read_bytes() for path in Path().iterdir() if path.is_file()}
    assert cluster(arguments[0], "--clusters", 3, "--out", "y.npy", *arguments[1:]) == 1
    error = capsys.readouterr().err
    assert error.startswith("mcl-kernels: ")
    assert message in error
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in Path().iterdir() if path.is_file()} == before


def npy(path: str, shape: tuple[int, ...], dtype: str = "<f4") -> None:
    """Writes a .npy file with 64 bytes of data, and a header of any shape."""
    header = repr({"descr": dtype, "fortran_order": False, "shape": shape}).encode() + b"\n"
    Path(path).write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", len(header)) + header + bytes(64))


def safetensors(path: str, header: str, length: int | None = None) -> None:
    """Writes a .safetensors file with 64 bytes of data, and any header."""
    content = header.encode()
    Path(path).write_bytes(struct.pack("<Q", len(content) if length is None else length) + content + bytes(64))


def entry(shape: str, offsets: str = "[0,64]") -> str:
    return f'{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}'


HOSTILE: dict[str, tuple[Callable[[str], object], str]] = {
    "expanded.pt": (
        lambda path: torch.save(torch.zeros(1, 1).expand(2**40, 4), path),
        "must hold a tensor whose rows are contiguous: got shape [1099511627776, 4] with strides (0, 0); save a copy",
    ),
    "same row.pt": (lambda path: torch.save(torch.zeros(1, 4).expand(2**40, 4), path), "whose rows are contiguous"),
    "overlapping.pt": (
        lambda path: torch.save(torch.zeros(100).as_strided((90, 8), (1, 1)), path),
        "whose rows are contiguous",
    ),
    "transposed.pt": (lambda path: torch.save(torch.zeros(6, N).T, path), "whose rows are contiguous"),
    "meta.pt": (
        lambda path: torch.save(torch.zeros(N, 6, device="meta"), path),
        "with data: got one on the device meta",
    ),
    "sparse.pt": (lambda path: torch.save(torch.eye(6).to_sparse(), path), "must hold a dense tensor"),
    "none.pt": (lambda path: torch.save(torch.zeros(0, 2**40), path), "must not be empty"),
    "array.pt": (
        lambda path: torch.save(np.zeros((3, 3)), path),
        "and nothing but tensors is unpickled: save a tensor",
    ),
    "text.pt": (lambda path: Path(path).write_text("1,2\n"), "is not an archive of torch.save"),
    "no rows.npy": (lambda path: npy(path, (0, 2**40)), "must not be empty: got shape [0, 1099511627776]"),
    "no features.npy": (lambda path: npy(path, (2**40, 0)), "must not be empty"),
    "overflow.npy": (lambda path: npy(path, (2**62, 2**62)), "is truncated: shape"),
    "huge.npy": (lambda path: npy(path, (2**40, 4)), "is truncated: shape [1099511627776, 4]"),
    "negative.npy": (lambda path: npy(path, (-4, -4)), "is damaged: its header gives shape [-4, -4]"),
    "objects.npy": (lambda path: npy(path, (1, 1), "|O"), "holds Python objects, and nothing is unpickled"),
    "dimensions.npy": (lambda path: npy(path, (1,) * 100), "cannot be read: maximum supported dimension"),
    "strings.npy": (lambda path: np.save(path, np.array([["a"]])), "must hold integers or floating point numbers"),
    "records.npy": (lambda path: np.save(path, np.zeros(3, "f4,f4")), "must hold integers or floating point numbers"),
    "longdouble.npy": (lambda path: np.save(path, np.zeros((3, 3), np.longdouble)), "must hold integers or floating"),
    "swapped.npy": (lambda path: np.save(path, np.zeros((3, 3), ">f4")), "must have the byte order of this machine"),
    "text.npy": (lambda path: Path(path).write_text("1,2\n"), "is not a .npy file, since it begins with b'1,2"),
    "archive.npy": (
        lambda path: Path(path).write_bytes(b"PK\3\4abcdef"),
        "is not a .npy file, since it begins with b'PK",
    ),
    "version.npy": (lambda path: Path(path).write_bytes(b"\x93NUMPY\7\0abcdef"), "version [7, 0] of the format"),
    "nested.npy": (
        lambda path: Path(path).write_bytes(b"\x93NUMPY\1\0" + struct.pack("<H", 9000) + b"(" * 9000),
        "cannot be read",
    ),
    "header.npy": (lambda path: Path(path).write_bytes(b"\x93NUMPY\2\0" + b"\xff" * 100), "cannot be read"),
    "offsets.safetensors": (lambda path: safetensors(path, entry("[4,4]", "[0,640]")), "cannot be read"),
    "gap.safetensors": (lambda path: safetensors(path, entry("[2,4]", "[32,64]")), "cannot be read"),
    "negative.safetensors": (lambda path: safetensors(path, entry("[-4,-4]")), "cannot be read"),
    "overflow.safetensors": (lambda path: safetensors(path, entry(f"[{2**62},{2**62}]")), "cannot be read"),
    "no tensor.safetensors": (lambda path: save_file({}, path), "must hold a tensor: got none"),
    "no rows.safetensors": (
        lambda path: save_file({"a": torch.zeros(0, 9)}, path),
        "must not be empty: got shape [0, 9]",
    ),
    "header.safetensors": (lambda path: safetensors(path, "{}", 2**60), "cannot be read"),
    "nested.safetensors": (lambda path: safetensors(path, "[" * 100_000), "cannot be read"),
    "pipe.npy": (os.mkfifo, "not a regular file: 'pipe.npy'"),
    "pipe.pt": (os.mkfifo, "not a regular file: 'pipe.pt'"),
    "pipe.safetensors": (os.mkfifo, "not a regular file: 'pipe.safetensors'"),
    "directory.npy": (os.mkdir, "not a regular file: 'directory.npy'"),
    "device.npy": (lambda path: os.symlink("/dev/zero", path), "not a regular file: 'device.npy'"),
}


@pytest.mark.parametrize("path", HOSTILE)
def test_hostile_files_are_refused_by_name(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    make, message = HOSTILE[path]
    make(path)
    assert cluster(path, "--clusters", 3, "--out", "y.npy") == 1
    assert main(["assign", "f0.npy", "--centers", path, "--out", "y.npy"]) == 1
    if not path.endswith(".safetensors"):
        assert cluster("f0.npy", "--previous", path, "--clusters", 3, "--out", "y.npy") == 1
    printed = capsys.readouterr()
    errors = printed.err.splitlines()
    assert message in errors[0]
    assert path in errors[0]
    assert len(errors) == 3 - path.endswith(".safetensors")
    for error in errors:
        assert error.startswith("mcl-kernels: ")
        assert "\x1b" not in error
        assert "allow_pickle" not in error
        assert "weights_only" not in error
    assert not Path("y.npy").exists()


def test_a_damaged_file_of_any_kind_is_named() -> None:
    """Bytes are replaced and files truncated at random: either an error names the file, or it can be read."""
    torch.save(features(), "x.pt")
    save_file({"a": features()}, "x.safetensors")
    generator = np.random.default_rng(0)
    for path in (Path("f0.npy"), Path("x.pt"), Path("x.safetensors")):
        content, refused = np.frombuffer(path.read_bytes(), np.uint8), 0
        for _ in range(200):
            damaged = content.copy()
            damaged[generator.integers(0, 400, 3)] = generator.integers(0, 256, 3)
            bad = path.with_stem("damaged")
            bad.write_bytes(damaged[: generator.integers(len(damaged) // 2, 2 * len(damaged))].tobytes())
            try:
                open_features(bad, None).load()
            except (TypeError, ValueError) as error:
                refused += 1
                assert "damaged" in str(error)  # noqa: PT017
        assert refused > 20, path


@pytest.mark.parametrize("suffix", ["npy", "pt"])
def test_labels_next_to_another_summary_are_refused(suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A run that is killed between the two renames leaves such files."""
    old, new, out = f"old.{suffix}", f"new.{suffix}", f"y.{suffix}"
    assert cluster("f0.npy", "--clusters", 3, "--out", old) == 0
    assert cluster("f1.npy", "--clusters", 3, "--out", new) == 0
    Path(f"{old}.json").replace(f"{new}.json")
    command = ("f2.npy", "--clusters", 3, "--previous", new, "--out", out)
    capsys.readouterr()
    assert cluster(*command) == 1
    error = capsys.readouterr().err
    assert f"{new} is not the file that {new}.json describes: their SHA-256 differ" in error
    assert f"run that stage again, or delete {new}.json" in error
    Path(f"{new}.json").unlink()
    assert cluster(*command) == 0


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sha256": 3}', "not JSON", "[" * 100_000])
def test_labels_need_no_summary(content: str) -> None:
    """A file with the name of a summary may have another purpose."""
    np.save("labels.npy", np.zeros(N, np.int32))
    Path("labels.npy.json").write_text(content)
    assert torch.equal(open_labels(Path("labels.npy"), N), torch.zeros(N, dtype=torch.int64))


def test_errors_about_names_with_line_breaks_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cluster("a\nb\x1b[1m.csv", "--clusters", 3, "--out", "y.npy") == 1
    assert capsys.readouterr().err == (
        "mcl-kernels: FEATURES must be a .npy, .pt or .safetensors file: got a\\nb\\x1b[1m.csv\n"
    )
