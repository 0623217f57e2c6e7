"""Failed builds of the native kernels: only errors of the compiler about the sources are remembered, for a day."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from mcl_kernels.backends import library, native
from mcl_kernels.backends import native_cache as _native_cache
from mcl_kernels.backends.native_build import Compiler, NativeUnavailableError, RefusedError
from mcl_kernels.backends.native_cache import opened
from tests.fake_compiler import BuildSite, give_away, make_site

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is built on Windows")
try_loading = library.check_loads


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildSite:
    return make_site(tmp_path, monkeypatch)


LASTING = [
    "operators.cpp:3:7: error: this is not my day",
    "operators.cpp:3: fatal error: it never is",
    "/tmp/x.s:12: Error: no such instruction: `tdpbf16ps'",
    "g++: error: unrecognized command-line option '-mamx-tile'",
    "cc1plus: error: bad value 'x' for '-march=' switch",
    "clang: error: unknown argument: '-mamx'",
]
PASSING = [
    "operators.cpp:512: fatal error: error writing to /tmp/x.s: No space left on device",
    "/tmp/x.s: Fatal error: can't write 8 bytes to section .text of x.o: 'No space left on device'",
    "/usr/bin/ld: final link failed: No space left on device",
    "operators.cpp:5: fatal error: error writing to x.o: Disk quota exceeded",
    "operators.cpp:5: fatal error: error writing to x.o: Input/output error",
    "operators.cpp:5:10: fatal error: omp.h: No such file or directory",  # its package is not installed yet
    "cc1plus: out of memory allocating 65536 bytes after a total of 3000 bytes",
    "virtual memory exhausted: Cannot allocate memory",
    "g++: fatal error: Killed signal terminated program cc1plus",
    "operators.cpp:7:1: internal compiler error: Segmentation fault",
    "",
]


@pytest.mark.parametrize("line", LASTING)
def test_errors_about_the_sources_are_remembered(site: BuildSite, line: str) -> None:
    compiler = site.compiler(command=f'echo "In file included from x:" >&2; echo "{line}" >&2; exit 1'.replace("`", ""))
    message = re.escape(line.replace("`", ""))
    with pytest.raises(RefusedError, match=message):
        native._find_or_build()
    with pytest.raises(NativeUnavailableError, match=rf"{message} \(delete .*\.failed to try again\)"):
        native._find_or_build()
    assert site.times_called() == 1
    assert [path.suffix for path in site.cache.iterdir() if path not in site.failures()] == [".lock"]

    site.compiler(version="g++ (fake) 2.0")  # a newer compiler at the same path
    native._find_or_build()
    assert len(site.libraries()) == 1
    assert str(compiler) in site.calls.read_text()


@pytest.mark.parametrize("line", PASSING)
def test_passing_errors_are_not_remembered(site: BuildSite, line: str) -> None:
    site.compiler(command=f'echo "{line}" >&2; exit 1')
    for calls in (1, 2):
        with pytest.raises(NativeUnavailableError, match=re.escape(line) or "exit code 1"):
            native._find_or_build()
        assert site.times_called() == calls
    assert not site.failures()
    site.compiler()
    native._find_or_build()


def test_a_killed_compiler_is_not_remembered(site: BuildSite) -> None:
    site.compiler(command="echo 'operators.cpp:3:7: error: half a sentence' >&2; kill -9 $$")
    with pytest.raises(NativeUnavailableError):
        native._find_or_build()
    assert not site.failures()


def test_a_compiler_without_memory_is_not_remembered(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver of the real compiler fits in the limit, and the programs that it starts do not."""
    (site.sources / "operators.cpp").write_text('#include <algorithm>\n#include <regex>\nstd::regex x{"a"};\n')
    compiler = site.compiler(command='ulimit -v 40000; exec g++ "$@"')
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(NativeUnavailableError):
        native._find_or_build()
    assert not site.failures()


def test_the_first_failure_ends_the_other_compilers(site: BuildSite) -> None:
    (site.sources / "second.cpp").write_text("")
    number = site.root / "number"
    site.compiler(
        command=f'case "$*" in *second.cpp*) echo $$ > {number}; sleep 100;; esac\n'
        f"while ! test -s {number}; do sleep 0.02; done; echo 'x.cpp:1:1: error: no' >&2; exit 1"
    )
    if (os.cpu_count() or 1) < 2:
        pytest.skip("needs two compilers at a time")
    started = time.monotonic()
    with pytest.raises(RefusedError, match=r"x\.cpp:1:1: error: no"):
        native._find_or_build()
    assert time.monotonic() - started < 60  # the other compiler would take 100 s
    with pytest.raises(ProcessLookupError):
        os.kill(int(number.read_text()), 0)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("mkdir", "os.mkdir"),
        ("sync", "os.fsync"),
        ("rename", "os.rename"),
        ("lock", "fcntl.flock"),
        ("mode", "os.chmod"),
    ],
)
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT])
def test_an_error_of_the_system_is_reported_and_not_remembered(
    site: BuildSite, name: str, function: str, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object, **options: object) -> None:
        path = arguments[0] if isinstance(arguments[0], str | Path) else None
        raise OSError(number, os.strerror(number), path)

    with monkeypatch.context() as patched:
        for each in (function, *(["os.replace"] if name == "rename" else [])):
            patched.setattr(each, fail)
        with pytest.raises(NativeUnavailableError, match=os.strerror(number)) as error:
            native._find_or_build()
    assert str(site.root / "cache") in str(error.value)
    assert "/proc/" not in str(error.value)
    assert "set XDG_CACHE_HOME" in str(error.value)
    assert not site.failures()
    native._find_or_build()
    assert len(site.libraries()) == 1


@contextlib.contextmanager
def small_disk(directory: Path, options: str) -> Iterator[None]:
    directory.mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(directory)]
    if os.geteuid() or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small file system, if the system allows it")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(directory)], check=True)


@pytest.mark.parametrize("size", [1 << 20, 36 << 10], ids=["objects", "linking"])
def test_a_temporarily_full_disk_is_not_remembered(site: BuildSite, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real compiler builds. The disk holds the smaller object, but not the library as well."""
    (site.sources / "operators.cpp").write_text(f"extern const char data[{size}] = {{1}};\n")
    monkeypatch.setenv("CXX", "g++")
    with small_disk(site.cache, "size=64k"):
        with pytest.raises(NativeUnavailableError, match="No space left on device"):
            native._find_or_build()
        assert not site.failures()
        subprocess.run(["mount", "-o", "remount,size=20m", str(site.cache)], check=True)
        native._find_or_build()


def test_a_directory_that_is_mounted_noexec_is_an_error(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "check_loads", try_loading)
    message = r"does not load: failed to map segment.*; set XDG_CACHE_HOME to a directory that is not mounted noexec"
    with small_disk(site.cache, "size=20m,noexec"):
        with pytest.raises(RefusedError, match=message):
            native._find_or_build()
        assert not site.libraries()


def test_a_full_disk_leaves_no_incomplete_remembered_failure(site: BuildSite) -> None:
    compiler = Compiler(["c"], "1")
    with small_disk(site.cache, "size=16k"):
        (site.cache / "other").write_bytes(bytes(8192))
        with contextlib.suppress(OSError), (site.cache / "more").open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        with opened(site.cache) as cache:
            cache.remember_failure(site.stem(), compiler, "reason")
            assert cache.remembered_failure(site.stem(), compiler) is None
        assert not site.failures()


DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "content",
    ["", "\n", "c++\nreason", "{}", "[]", "null", "\0\xff", DEEP, '{"time": "x", "compiler": 1}'],
    ids=range(9),
)
def test_a_damaged_remembered_failure_is_ignored(site: BuildSite, content: str) -> None:
    site.cache.mkdir(parents=True)
    (site.cache / f"{site.stem()}.failed").write_text(content, encoding="latin-1")
    native._find_or_build()
    assert len(site.libraries()) == 1


@pytest.mark.parametrize("kind", ["directory", "pipe", "link to itself", "of another user"])
def test_a_remembered_failure_is_a_file_of_this_user(
    site: BuildSite, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.cache.mkdir(parents=True)
    path = site.cache / f"{site.stem()}.failed"
    if kind == "directory":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to itself":
        path.symlink_to(path)
    elif os.geteuid():
        pytest.skip("only root gives a file away")
    else:
        compiler = native.find_compiler()
        content = {"compiler": list(compiler), "time": time.time(), "reason": "planted"}
        path.write_text(json.dumps(content))
        give_away(path, monkeypatch)
    native._find_or_build()
    assert len(site.libraries()) == 1


@pytest.mark.parametrize("age", [-3600, _native_cache.REMEMBERED_SECONDS + 1])
def test_a_failure_is_remembered_for_a_day(site: BuildSite, age: int, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = Compiler(["c"], "1")
    with opened(site.cache) as cache:
        cache.remember_failure("x", compiler, "reason")
        assert str(cache.remembered_failure("x", compiler)).startswith("reason (delete ")
        assert cache.remembered_failure("y", compiler) is None
        assert cache.remembered_failure("x", Compiler(["c"], "2")) is None
        assert cache.remembered_failure("x", Compiler(["c", "-m32"], "1")) is None
        now = time.time()
        monkeypatch.setattr(time, "time", lambda: now + age)
        assert cache.remembered_failure("x", compiler) is None
        cache.remember_failure("x", compiler, "again")  # replaces the failure
        assert str(cache.remembered_failure("x", compiler)).startswith("again")
