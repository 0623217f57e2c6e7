"""The directory of built libraries: nothing damaged is loaded, and nothing that somebody else may have written."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from mcl_kernels.backends import library as _library
from mcl_kernels.backends import native
from mcl_kernels.backends import native_cache as _native_cache
from mcl_kernels.backends.native_build import Compiler, NativeUnavailableError, find_compiler
from mcl_kernels.backends.native_cache import opened
from tests.fake_compiler import STRANGER, Place, give_away, make_place

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is built on Windows")
# Each leaves a part that the loader needs: the header of the file, its program headers, its code, its last page.
DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "0 bytes": lambda content: b"",
    "1 byte": lambda content: content[:1],
    "1,000 bytes": lambda content: content[:1000],
    "4,096 bytes": lambda content: content[:4096],
    "100,000 bytes": lambda content: content[:100_000],
    "one byte less": lambda content: content[:-1],
    "one byte more": lambda content: content + b"\0",
    "a bit in the header": lambda content: content[:40] + bytes([content[40] ^ 1]) + content[41:],
    "a bit in the middle": lambda content: (
        content[: len(content) // 2] + bytes([content[len(content) // 2] ^ 8]) + content[len(content) // 2 + 1 :]
    ),
}


try_loading = _library.check_loads


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return make_place(tmp_path, monkeypatch)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_removed_and_built_again(place: Place, damage: Callable[[bytes], bytes]) -> None:
    native._find_or_build()
    (library,) = place.libraries()
    content = library.read_bytes().ljust(200_000, b"\0")  # trailing zeros change nothing for the loader
    library.unlink()
    place.library.write_bytes(content)
    native._find_or_build()
    (library,) = place.libraries()
    damaged = damage(content)
    assert damaged != content
    library.unlink()  # and not written over: this process has loaded it
    library.write_bytes(damaged)
    before = place.times_called()
    native._find_or_build()
    (library,) = place.libraries()
    assert library.read_bytes() == content
    assert place.times_called() > before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_in_the_package_is_left_for_the_cache(place: Place, damage: Callable[[bytes], bytes]) -> None:
    content = place.library.read_bytes().ljust(200_000, b"\0")
    built = place.root / "built.so"
    built.write_bytes(content)
    installed = place.root / "package" / "lib"
    installed.mkdir(parents=True)
    kept = _library.keep(built, installed, place.stem())
    native._find_or_build()
    assert place.times_called() == 0
    kept.unlink()
    kept.write_bytes(damage(content))
    native._find_or_build()
    assert len(place.libraries()) == 1
    assert kept.read_bytes() == damage(content)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_installed_library_that_was_changed_serves_where_nothing_can_be_built(
    place: Place, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packagers strip libraries; another process tries it first."""
    installed = place.root / "package" / "lib"
    installed.mkdir(parents=True)
    changed = installed / f"{place.stem()}-{'0' * 32}.so"
    content = place.library.read_bytes()
    changed.write_bytes(content[:4096] if damaged else content)
    monkeypatch.setattr(_library, "check_loads", try_loading)
    monkeypatch.setenv("CXX", "nothing-of-this-name")
    if damaged:
        with pytest.raises(NativeUnavailableError, match=r"CXX.*; .* was changed after it was built"):
            native._find_or_build()
    else:
        native._find_or_build()
    assert not place.libraries()


def test_a_library_that_cannot_be_read_for_a_while_is_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    native._find_or_build()
    (library,) = place.libraries()

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch, opened(place.cache) as cache:
        patch.setattr(_library, "_digest", fails)
        assert list(cache.libraries(place.stem())) == []
    assert place.libraries() == [library]


def test_a_process_survives_a_truncated_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library itself is loaded, for a loss: a signal of the loader is not caught in the process that it ends."""
    if not native.describe()[0]:
        pytest.skip(native.describe()[1])
    place = Place(tmp_path)
    with opened(_native_cache.cache_directory()) as cache:
        kept = [
            *_library.find_libraries(native.PACKAGE / "lib", stem := native.library_stem(native.source_directory()))
        ]
        kept += cache.libraries(stem)
        shutil.copy(kept[0], place.library)
        name = kept[0].name
    place.cache.mkdir(parents=True)
    (place.cache / name).write_bytes(place.library.read_bytes()[:4096])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(place.compiler()))
    code = "import torch, mcl_kernels; print(mcl_kernels.masked_logsumexp(torch.eye(4), impl='native').sum().item())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (place.cache / name).read_bytes() == place.library.read_bytes()


def test_a_library_of_another_system_is_kept_and_built_anew_once(place: Place) -> None:
    """Machines share homes: another one may load what this one cannot."""
    place.cache.mkdir(parents=True)
    foreign = place.root / "foreign.so"
    foreign.write_bytes(b"\x7fELF of another machine")
    kept = _library.keep(foreign, place.cache, place.stem())
    native._find_or_build()
    calls = place.times_called()
    assert calls == 2
    assert kept in place.libraries()
    assert len(place.libraries()) == 2
    native._find_or_build()
    assert place.times_called() == calls


def test_a_new_library_that_does_not_load_is_remembered(place: Place) -> None:
    place.library.write_bytes(b"\x7fELF no more")
    with pytest.raises(NativeUnavailableError, match="does not load in this process"):
        native._find_or_build()
    calls = place.times_called()
    with pytest.raises(NativeUnavailableError, match=r"does not load.*\(delete .*\.failed to try again\)"):
        native._find_or_build()
    assert place.times_called() == calls


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(place: Place, mask: int) -> None:
    before = os.umask(mask)
    try:
        native._find_or_build()
        with opened(place.cache) as cache:
            cache.remember_failure("x", Compiler(["c"], "1"), "reason")
            assert cache.remembered_failure("x", Compiler(["c"], "1"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(place.cache.stat().st_mode) == 0o700
    for path in place.cache.iterdir():
        assert not path.stat().st_mode & 0o022, path
    calls = place.times_called()
    native._find_or_build()
    assert place.times_called() == calls


def test_a_directory_of_another_user_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    native._find_or_build()
    give_away(place.cache, monkeypatch)
    with pytest.raises(NativeUnavailableError) as error:
        native._find_or_build()
    for part in (str(place.cache), "it belongs to user", "set XDG_CACHE_HOME"):
        assert part in str(error.value)


@pytest.mark.parametrize("mode", [0o775, 0o702, 0o777])
def test_ones_own_directory_is_closed_to_others(place: Place, mode: int) -> None:
    """Earlier versions made it with the modes of the umask."""
    place.cache.mkdir(parents=True)
    place.cache.chmod(mode)
    native._find_or_build()
    assert stat.S_IMODE(place.cache.stat().st_mode) == mode & ~0o022


def test_a_directory_that_stays_open_to_others_is_refused(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have no modes."""
    place.cache.mkdir(parents=True)
    place.cache.chmod(0o777)

    def refuse(descriptor: int, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(NativeUnavailableError, match=rf"its mode is 777; chmod go-w {place.cache}, or set XDG"):
        native._find_or_build()
    assert place.times_called() == 0


def test_a_directory_of_root_is_trusted_while_only_root_writes(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """An administrator may build for everybody."""
    if os.geteuid():
        pytest.skip("only root makes a directory of root")
    native._find_or_build()
    calls = place.times_called()
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    native._find_or_build()
    assert place.times_called() == calls
    place.cache.chmod(0o775)
    with pytest.raises(NativeUnavailableError, match="its mode is 775; chmod go-w"):
        native._find_or_build()


@pytest.mark.parametrize("kind", ["of another user", "writable for the group", "a link"])
def test_a_library_that_others_may_have_written_is_built_again(
    place: Place, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native._find_or_build()
    (library,) = place.libraries()
    if kind == "a link":
        elsewhere = place.root / "elsewhere.so"
        library.rename(elsewhere)
        library.symlink_to(elsewhere)
    elif kind == "of another user":
        if os.geteuid():
            pytest.skip("only root gives a file away")
        give_away(library, monkeypatch)
    else:
        library.chmod(0o775)
    calls = place.times_called()
    native._find_or_build()
    assert place.times_called() > calls
    (library,) = place.libraries()
    assert not library.is_symlink()
    assert library.stat().st_uid == os.geteuid()
    assert not library.stat().st_mode & 0o022


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="a descriptor has no path here")
def test_a_directory_that_is_replaced_after_the_check_is_not_used(place: Place) -> None:
    """A user who may write to the directory above it can rename it, and put another one there."""
    native._find_or_build()
    (library,) = place.libraries()
    with opened(place.cache) as cache:
        place.cache.rename(place.root / "renamed")
        place.cache.mkdir()
        (place.cache / library.name).write_bytes(b"planted")
        (found,) = cache.libraries(place.stem())
        assert found.read_bytes() == place.library.read_bytes()
        with cache.only_builder():
            assert (place.root / "renamed" / "build.lock").exists()
    assert (place.cache / library.name).read_bytes() == b"planted"


def test_a_lock_that_is_a_link_is_refused(place: Place) -> None:
    victim = place.root / "victim"
    victim.write_text("content")
    place.cache.mkdir(parents=True)
    (place.cache / "build.lock").symlink_to(victim)
    with pytest.raises(NativeUnavailableError, match=rf"{place.cache}/build.lock is a symbolic link; delete it"):
        native._find_or_build()
    assert victim.read_text() == "content"
    (place.cache / "build.lock").unlink()
    (place.cache / "build.lock").write_text("kept")
    native._find_or_build()
    assert (place.cache / "build.lock").read_text() == "kept"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(place: Place, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    (place.cache / ".build-of-another").mkdir(parents=True)
    native._find_or_build()
    assert len(place.libraries()) == 1
    assert (place.cache / ".build-of-another").exists()  # it may be alive


def test_waiting_for_another_build_is_said_once_and_before(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    waits = threading.Event()

    def note(text: str) -> None:
        said.append(text)
        waits.set()

    monkeypatch.setattr(_native_cache, "say", note)
    other = threading.Thread(target=native._find_or_build)
    with opened(place.cache) as cache, cache.only_builder():
        other.start()
        assert waits.wait(20)
        assert place.times_called() == 0
    other.join(120)
    assert not other.is_alive()
    assert said == [f"waiting for another process, which builds in {place.cache}"]
    assert len(place.libraries()) == 1


def test_who_waited_for_a_build_that_failed_does_not_build_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    only_builder = _native_cache.Cache.only_builder

    @contextlib.contextmanager
    def after_another(cache: _native_cache.Cache) -> Iterator[None]:
        with only_builder(cache):
            cache.remember_failure(place.stem(), find_compiler(), "of another process")
            yield

    monkeypatch.setattr(_native_cache.Cache, "only_builder", after_another)
    with pytest.raises(NativeUnavailableError, match="of another process"):
        native._find_or_build()
    assert place.times_called() == 0


def test_a_build_goes_on_where_nothing_can_be_printed(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        native._find_or_build()
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert len(list((place.root / "cache" / "mcl_kernels").glob("*.so"))) == 1


def test_a_process_that_is_forked_in_a_build_does_not_hold_its_lock(place: Place) -> None:
    with opened(place.cache) as cache, cache.only_builder():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        started = time.monotonic()
        with opened(place.cache) as cache, cache.only_builder():
            assert time.monotonic() - started < 30
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_what_a_killed_build_left_is_removed_by_the_next(place: Place) -> None:
    started = place.root / "started"
    slow = place.compiler(command=f"touch {started}; sleep 60")
    code = (
        "import sys; from pathlib import Path; from mcl_kernels import _native\n"
        "_native.source_directory = lambda: Path(sys.argv[1]); native._find_or_build()"
    )
    environment = {**os.environ, "CXX": str(slow)}
    process = subprocess.Popen([sys.executable, "-c", code, str(place.sources)], env=environment)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = place.cache.glob(".build-*")
    place.compiler()
    with opened(place.cache) as cache, cache.only_builder():
        assert left.exists()  # where locks are those of one machine, another may be building
    os.utime(left, (0, place.cache.stat().st_mtime - 2 * _native_cache.ABANDONED_AFTER))
    native._find_or_build()
    assert sorted(path.suffix for path in place.cache.iterdir()) == [".lock", ".so"]
