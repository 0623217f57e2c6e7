"""The directory of built libraries: no file that is damaged, or that others may have written, is loaded."""

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
from tests.fake_compiler import STRANGER, BuildSite, give_away, make_site

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is built on Windows")
# Damages to each part that the loader needs: the header of the file, its program headers, its code, its last page.
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
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildSite:
    return make_site(tmp_path, monkeypatch)


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_is_removed_and_built_again(site: BuildSite, damage: Callable[[bytes], bytes]) -> None:
    native._find_or_build()
    (library,) = site.libraries()
    content = library.read_bytes().ljust(200_000, b"\0")  # trailing zeros change nothing for the loader
    library.unlink()
    site.library.write_bytes(content)
    native._find_or_build()
    (library,) = site.libraries()
    damaged = damage(content)
    assert damaged != content
    library.unlink()  # not overwritten, since this process has loaded it
    library.write_bytes(damaged)
    before = site.times_called()
    native._find_or_build()
    (library,) = site.libraries()
    assert library.read_bytes() == content
    assert site.times_called() > before


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_library_in_the_package_is_replaced_by_one_in_the_cache(
    site: BuildSite, damage: Callable[[bytes], bytes]
) -> None:
    content = site.library.read_bytes().ljust(200_000, b"\0")
    built = site.root / "built.so"
    built.write_bytes(content)
    installed = site.root / "package" / "lib"
    installed.mkdir(parents=True)
    kept = _library.keep(built, installed, site.stem())
    native._find_or_build()
    assert site.times_called() == 0
    kept.unlink()
    kept.write_bytes(damage(content))
    native._find_or_build()
    assert len(site.libraries()) == 1
    assert kept.read_bytes() == damage(content)


@pytest.mark.parametrize("damaged", [False, True])
def test_an_installed_library_that_was_changed_is_loaded_if_none_can_be_built(
    site: BuildSite, damaged: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packagers strip libraries; such a library is first loaded in another process."""
    installed = site.root / "package" / "lib"
    installed.mkdir(parents=True)
    changed = installed / f"{site.stem()}-{'0' * 32}.so"
    content = site.library.read_bytes()
    changed.write_bytes(content[:4096] if damaged else content)
    monkeypatch.setattr(_library, "check_loads", try_loading)
    monkeypatch.setenv("CXX", "nothing-of-this-name")
    if damaged:
        with pytest.raises(NativeUnavailableError, match=r"CXX.*; .* was changed after it was built"):
            native._find_or_build()
    else:
        native._find_or_build()
    assert not site.libraries()


def test_a_library_that_temporarily_cannot_be_read_is_kept(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    native._find_or_build()
    (library,) = site.libraries()

    def fails(path: Path) -> str:
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))

    with monkeypatch.context() as patch, opened(site.cache) as cache:
        patch.setattr(_library, "_digest", fails)
        assert list(cache.libraries(site.stem())) == []
    assert site.libraries() == [library]


def test_a_process_survives_a_truncated_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loads the real library, in a process of its own, which a signal of the loader would end."""
    if not native.describe()[0]:
        pytest.skip(native.describe()[1])
    site = BuildSite(tmp_path)
    with opened(_native_cache.cache_directory()) as cache:
        kept = [
            *_library.find_libraries(native.PACKAGE / "lib", stem := native.library_stem(native.source_directory()))
        ]
        kept += cache.libraries(stem)
        shutil.copy(kept[0], site.library)
        name = kept[0].name
    site.cache.mkdir(parents=True)
    (site.cache / name).write_bytes(site.library.read_bytes()[:4096])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("CXX", str(site.compiler()))
    code = "import torch, mcl_kernels; print(mcl_kernels.masked_logsumexp(torch.eye(4), impl='native').sum().item())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert (site.cache / name).read_bytes() == site.library.read_bytes()


def test_a_library_of_another_system_is_kept_and_another_is_built_once(site: BuildSite) -> None:
    """Machines share home directories: another one may load a library that this one cannot."""
    site.cache.mkdir(parents=True)
    foreign = site.root / "foreign.so"
    foreign.write_bytes(b"\x7fELF of another machine")
    kept = _library.keep(foreign, site.cache, site.stem())
    native._find_or_build()
    calls = site.times_called()
    assert calls == 2
    assert kept in site.libraries()
    assert len(site.libraries()) == 2
    native._find_or_build()
    assert site.times_called() == calls


def test_a_new_library_that_does_not_load_is_remembered(site: BuildSite) -> None:
    site.library.write_bytes(b"\x7fELF no more")
    with pytest.raises(NativeUnavailableError, match="does not load in this process"):
        native._find_or_build()
    calls = site.times_called()
    with pytest.raises(NativeUnavailableError, match=r"does not load.*\(delete .*\.failed to try again\)"):
        native._find_or_build()
    assert site.times_called() == calls


@pytest.mark.parametrize("mask", [0o000, 0o002, 0o022, 0o077])
def test_modes_do_not_depend_on_the_umask(site: BuildSite, mask: int) -> None:
    before = os.umask(mask)
    try:
        native._find_or_build()
        with opened(site.cache) as cache:
            cache.remember_failure("x", Compiler(["c"], "1"), "reason")
            assert cache.remembered_failure("x", Compiler(["c"], "1"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(site.cache.stat().st_mode) == 0o700
    for path in site.cache.iterdir():
        assert not path.stat().st_mode & 0o022, path
    calls = site.times_called()
    native._find_or_build()
    assert site.times_called() == calls


def test_a_directory_of_another_user_is_refused(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    native._find_or_build()
    give_away(site.cache, monkeypatch)
    with pytest.raises(NativeUnavailableError) as error:
        native._find_or_build()
    for part in (str(site.cache), "it belongs to user", "set XDG_CACHE_HOME"):
        assert part in str(error.value)


@pytest.mark.parametrize("mode", [0o775, 0o702, 0o777])
def test_the_users_own_directory_is_closed_to_others(site: BuildSite, mode: int) -> None:
    """Earlier versions created it with the mode of the umask."""
    site.cache.mkdir(parents=True)
    site.cache.chmod(mode)
    native._find_or_build()
    assert stat.S_IMODE(site.cache.stat().st_mode) == mode & ~0o022


def test_a_directory_that_stays_open_to_others_is_refused(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems have no modes."""
    site.cache.mkdir(parents=True)
    site.cache.chmod(0o777)

    def refuse(descriptor: int, mode: int) -> None:
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "fchmod", refuse)
    with pytest.raises(NativeUnavailableError, match=rf"its mode is 777; chmod go-w {site.cache}, or set XDG"):
        native._find_or_build()
    assert site.times_called() == 0


def test_a_directory_of_root_is_trusted_while_only_root_writes(
    site: BuildSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An administrator may build for everybody."""
    if os.geteuid():
        pytest.skip("only root makes a directory of root")
    native._find_or_build()
    calls = site.times_called()
    monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
    native._find_or_build()
    assert site.times_called() == calls
    site.cache.chmod(0o775)
    with pytest.raises(NativeUnavailableError, match="its mode is 775; chmod go-w"):
        native._find_or_build()


@pytest.mark.parametrize("kind", ["of another user", "writable for the group", "a link"])
def test_a_library_that_others_may_have_written_is_built_again(
    site: BuildSite, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    native._find_or_build()
    (library,) = site.libraries()
    if kind == "a link":
        elsewhere = site.root / "elsewhere.so"
        library.rename(elsewhere)
        library.symlink_to(elsewhere)
    elif kind == "of another user":
        if os.geteuid():
            pytest.skip("only root gives a file away")
        give_away(library, monkeypatch)
    else:
        library.chmod(0o775)
    calls = site.times_called()
    native._find_or_build()
    assert site.times_called() > calls
    (library,) = site.libraries()
    assert not library.is_symlink()
    assert library.stat().st_uid == os.geteuid()
    assert not library.stat().st_mode & 0o022


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="a descriptor has no path here")
def test_a_directory_that_is_replaced_after_the_check_is_not_used(site: BuildSite) -> None:
    """A user who may write to the directory above it can rename it, and put another one there."""
    native._find_or_build()
    (library,) = site.libraries()
    with opened(site.cache) as cache:
        site.cache.rename(site.root / "renamed")
        site.cache.mkdir()
        (site.cache / library.name).write_bytes(b"planted")
        (found,) = cache.libraries(site.stem())
        assert found.read_bytes() == site.library.read_bytes()
        with cache.only_builder():
            assert (site.root / "renamed" / "build.lock").exists()
    assert (site.cache / library.name).read_bytes() == b"planted"


def test_a_lock_that_is_a_link_is_refused(site: BuildSite) -> None:
    victim = site.root / "victim"
    victim.write_text("content")
    site.cache.mkdir(parents=True)
    (site.cache / "build.lock").symlink_to(victim)
    with pytest.raises(NativeUnavailableError, match=rf"{site.cache}/build.lock is a symbolic link; delete it"):
        native._find_or_build()
    assert victim.read_text() == "content"
    (site.cache / "build.lock").unlink()
    (site.cache / "build.lock").write_text("kept")
    native._find_or_build()
    assert (site.cache / "build.lock").read_text() == "kept"


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(site: BuildSite, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    (site.cache / ".build-of-another").mkdir(parents=True)
    native._find_or_build()
    assert len(site.libraries()) == 1
    assert (site.cache / ".build-of-another").exists()  # it may be alive


def test_waiting_for_another_build_is_printed_once_and_before(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    printed: list[str] = []
    waits = threading.Event()

    def note(text: str) -> None:
        printed.append(text)
        waits.set()

    monkeypatch.setattr(_native_cache, "say", note)
    other = threading.Thread(target=native._find_or_build)
    with opened(site.cache) as cache, cache.only_builder():
        other.start()
        assert waits.wait(20)
        assert site.times_called() == 0
    other.join(120)
    assert not other.is_alive()
    assert printed == [f"waiting for another process, which builds in {site.cache}"]
    assert len(site.libraries()) == 1


def test_a_process_that_waited_for_a_failed_build_does_not_build_again(
    site: BuildSite, monkeypatch: pytest.MonkeyPatch
) -> None:
    only_builder = _native_cache.Cache.only_builder

    @contextlib.contextmanager
    def after_another(cache: _native_cache.Cache) -> Iterator[None]:
        with only_builder(cache):
            cache.remember_failure(site.stem(), find_compiler(), "of another process")
            yield

    monkeypatch.setattr(_native_cache.Cache, "only_builder", after_another)
    with pytest.raises(NativeUnavailableError, match="of another process"):
        native._find_or_build()
    assert site.times_called() == 0


def test_a_build_continues_if_nothing_can_be_printed(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w", buffering=1) as full:
        monkeypatch.setattr(sys, "stderr", full)
        native._find_or_build()
        monkeypatch.undo()
        with contextlib.suppress(OSError):
            full.close()
    assert len(list((site.root / "cache" / "mcl_kernels").glob("*.so"))) == 1


def test_a_process_that_is_forked_in_a_build_does_not_hold_its_lock(site: BuildSite) -> None:
    with opened(site.cache) as cache, cache.only_builder():
        child = os.fork()
        if child == 0:
            time.sleep(60)
            os._exit(0)
    try:
        started = time.monotonic()
        with opened(site.cache) as cache, cache.only_builder():
            assert time.monotonic() - started < 30
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_files_of_a_killed_build_are_removed_by_the_next(site: BuildSite) -> None:
    started = site.root / "started"
    slow = site.compiler(command=f"touch {started}; sleep 60")
    code = (
        "import sys; from pathlib import Path; from mcl_kernels.backends import native\n"
        "native.source_directory = lambda: Path(sys.argv[1]); native._find_or_build()"
    )
    environment = {**os.environ, "CXX": str(slow)}
    process = subprocess.Popen([sys.executable, "-c", code, str(site.sources)], env=environment)
    while not started.exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (left,) = site.cache.glob(".build-*")
    site.compiler()
    with opened(site.cache) as cache, cache.only_builder():
        assert left.exists()  # locks may hold on one machine only, and another one may be building
    os.utime(left, (0, site.cache.stat().st_mtime - 2 * _native_cache.ABANDONED_AFTER))
    native._find_or_build()
    assert sorted(path.suffix for path in site.cache.iterdir()) == [".lock", ".so"]
