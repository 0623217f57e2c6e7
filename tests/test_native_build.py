"""The compiler of the native kernels, the libraries that it builds, and the messages if it cannot."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mcl_kernels.backends import cuda as _cuda
from mcl_kernels.backends import library as _library
from mcl_kernels.backends import native, native_cache
from mcl_kernels.backends import native_build as _native_build
from mcl_kernels.backends.native_build import NativeUnavailableError, find_compiler
from tests.fake_compiler import BuildSite, make_site
from tests.new_process import run_python

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="nothing is built on Windows")
CLANG = "Debian clang version 14.0.6"
try_loading = _library.check_loads
USE = "import torch, mcl_kernels; print(mcl_kernels.masked_logsumexp(torch.eye(4)).sum().item())"


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> BuildSite:
    return make_site(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("g++-99", r"g\+\+-99 is not on the PATH"),
        ("ccache-99 g++", "ccache-99 is not on the PATH"),
        ("/nowhere/g++ -m64", r"/nowhere/g\+\+ is not on the PATH"),
        ("{bin}/launcher g++-99", "--version failed: launcher: error: no g"),
        ('"g++', "No closing quotation"),
    ],
)
def test_a_named_compiler_is_never_replaced(
    site: BuildSite, value: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher = site.compiler("launcher")
    launcher.write_text('#!/bin/sh\necho "launcher: error: no $1" >&2; exit 1\n')
    value = value.format(bin=launcher.parent)
    monkeypatch.setenv("CXX", value)
    with pytest.raises(NativeUnavailableError, match=rf"CXX='{re.escape(value)}' cannot be used: .*{reason}.*unset it"):
        native._find_or_build()
    assert not site.times_called()


def test_launchers_and_options_of_the_compiler_are_used(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher = site.compiler("ccache")
    launcher.write_text(f'#!/bin/sh\necho launched "$@" >> {site.calls}\nexec "$@"\n')
    compiler = site.compiler("my g++")  # a path with a space
    monkeypatch.setenv("CXX", f"{launcher} '{compiler}' -m64")
    native._find_or_build()
    launched = [line for line in site.calls.read_text().splitlines() if line.startswith("launched")]
    assert {line.split(" -m64 ")[0] for line in launched} == {f"launched {compiler}"}
    assert [sum(step in line for line in launched) for step in (" -c ", " -shared ")] == [1, 1]
    assert len(site.libraries()) == 1
    monkeypatch.setenv("CXX", str(compiler))
    assert find_compiler().command == [str(compiler)]


@pytest.mark.parametrize("value", ["", "  "])
def test_an_empty_cxx_names_no_compiler(site: BuildSite, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(site.root / "bin"))
    compiler = site.compiler("c++")
    monkeypatch.setenv("CXX", value)
    assert find_compiler().command == [str(compiler)]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere torch's OpenMP runtime is that of LLVM")
@pytest.mark.parametrize("version", [CLANG, "Intel(R) oneAPI DPC++/C++ Compiler 2025.0"])
def test_clang_needs_the_openmp_runtime_of_llvm(site: BuildSite, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(site.root / "bin"))
    monkeypatch.setattr(_native_build, "_has_openmp_of_llvm", lambda: False)
    for name in ("c++", "clang++"):
        site.compiler(name, version=version)
    with pytest.raises(NativeUnavailableError, match=r"needs the OpenMP runtime of LLVM.*install g\+\+ \(apt"):
        native._find_or_build()
    monkeypatch.setenv("CXX", "clang++")
    with pytest.raises(NativeUnavailableError, match=r"CXX='clang\+\+' cannot be used: .*OpenMP runtime of LLVM"):
        native._find_or_build()
    assert not site.times_called()
    assert not site.failures()

    monkeypatch.setattr(_native_build, "_has_openmp_of_llvm", lambda: True)
    assert find_compiler().version == version
    monkeypatch.delenv("CXX")
    assert find_compiler().command == [str(site.root / "bin" / "c++")]
    compiler = site.compiler("g++")
    assert find_compiler().command == [str(compiler)]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="finds the OpenMP runtime as Linux shows it")
def test_the_openmp_runtime_is_the_one_that_torch_has_loaded() -> None:
    lines = Path("/proc/self/maps").read_text().splitlines()
    mapped = {Path(line.split()[-1]) for line in lines if "/torch" in line and "omp" in line}
    assert len(mapped) == 1, mapped
    content = mapped.pop().read_bytes()
    assert _native_build._has_openmp_of_llvm() == (b"__kmpc_fork_call" in content)


@pytest.mark.parametrize(
    ("source", "reason", "remembered"),
    [
        ("void missing(); void present() { missing(); }", "undefined symbol: _Z7missingv", True),
        ("__attribute__((constructor)) static void end() { __builtin_trap(); }", "ended with signal", False),
    ],
)
def test_a_library_that_does_not_load_is_never_kept(
    site: BuildSite, source: str, reason: str, remembered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_library, "check_loads", try_loading)
    monkeypatch.setenv("CXX", "g++")
    (site.sources / "operators.cpp").write_text(source)
    with pytest.raises(
        NativeUnavailableError, match=rf"the library that .*g\+\+ built does not load: .*{reason}"
    ) as error:
        native._find_or_build()
    assert "/proc/" not in str(error.value)
    assert not site.libraries()
    assert bool(site.failures()) == remembered


def test_the_trial_imports_the_torch_of_this_process(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """A path may have been added at run time."""
    package = site.root / "elsewhere" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"open({str(site.root / 'imported')!r}, 'w')")
    monkeypatch.setattr(sys, "path", [str(package.parent), *sys.path])
    try_loading(site.library)
    assert (site.root / "imported").exists()


# Programs that replace Python: none, one that fails, that waits, that prints something else, that ends early.
PROGRAMS = {
    "none": "",
    "fails": "exit 1",
    "waits": "sleep 60",
    "prints": "echo hello",
    "ends early": "echo tried; exit 3",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_program_that_embeds_python_loads_the_library_it_built(
    site: BuildSite, program: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In such a program `sys.executable` is empty, or starts something else."""
    path = site.root / "program"
    path.write_text(f"#!/bin/sh\n{PROGRAMS[program]}\n")
    path.chmod(0o755)
    monkeypatch.setattr(_library, "check_loads", try_loading)
    monkeypatch.setattr(_library, "TRIAL_SECONDS", 1.0)
    monkeypatch.setattr(sys, "executable", "" if program == "none" else str(path))
    native._find_or_build()
    assert len(site.libraries()) == 1


def test_a_frozen_program_is_not_started_again(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its `sys.executable` is the program itself, which would build in turn."""
    started = site.root / "started"
    path = site.root / "program"
    path.write_text(f"#!/bin/sh\ntouch {started}\n")
    path.chmod(0o755)
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    monkeypatch.setattr(sys, "executable", str(path))
    assert not try_loading(site.library)
    assert not started.exists()


def test_another_source_is_another_library(tmp_path: Path) -> None:
    (tmp_path / "operators.cpp").write_text("one")
    first = _native_build.library_stem(tmp_path)
    assert first == _native_build.library_stem(tmp_path)
    (tmp_path / "operators.cpp").write_text("two")
    assert first != _native_build.library_stem(tmp_path)


def test_another_common_header_is_another_library(tmp_path: Path) -> None:
    (tmp_path / "cpu").mkdir()
    stems = set()
    for content in ("one", "two"):
        (tmp_path / "common.h").write_text(content)
        stems |= {_native_build.library_stem(tmp_path / "cpu"), _cuda.library_stem(tmp_path / "cpu")}
    assert len(stems) == 4


def test_another_c_library_is_another_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Homes are shared between machines."""
    (tmp_path / "operators.cpp").write_text("one")
    here = _native_build.library_stem(tmp_path)
    monkeypatch.setattr(os, "confstr", lambda name: "glibc 2.17", raising=False)
    there = _native_build.library_stem(tmp_path)
    assert there != here

    def unknown(name: str) -> str:
        raise ValueError("unrecognized configuration name")

    monkeypatch.setattr(os, "confstr", unknown, raising=False)
    assert _native_build.library_stem(tmp_path) not in (here, there)


def test_a_relative_cache_home_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The XDG specification requires it: such a path would depend on the working directory."""
    monkeypatch.setenv("HOME", str(tmp_path))
    for value in ("relative", "./relative", "~/relative", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert native_cache.cache_directory() == tmp_path / ".cache" / "mcl_kernels"


def test_without_a_home_auto_warns_once() -> None:
    code = (
        "import pwd\ndef nobody(uid): raise KeyError(uid)\npwd.getpwuid = nobody\n"
        "from mcl_kernels import KMeans, capabilities\nfrom mcl_kernels.backends import native\n"
        "native.PACKAGE = native.PACKAGE / 'nothing'\n"
        f"{USE}\n{USE}\nKMeans(2).fit(torch.eye(4))\nprint(capabilities()['native'])\n"
        "mcl_kernels.masked_logsumexp(torch.eye(4), impl='native')"
    )
    result = run_python(code, HOME="", XDG_CACHE_HOME="")
    message = "there is no directory for the built library: HOME is not set and the user has no entry"
    assert result.stderr.count(f"several times slower: impl='native': {message}") == 1, result.stderr
    assert f"NativeUnavailableError: {message}" in result.stderr
    assert "set XDG_CACHE_HOME" in result.stderr
    assert "'available': False" in result.stdout


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    code = f"from mcl_kernels.backends import native; native.PACKAGE = native.PACKAGE / 'nothing'\n{USE}"
    result = run_python(code, XDG_CACHE_HOME=str(tmp_path / "file"))
    assert result.returncode == 0
    assert f"{tmp_path}/file/mcl_kernels: Not a directory; set XDG_CACHE_HOME" in result.stderr


def test_without_a_compiler_auto_warns_once(tmp_path: Path) -> None:
    code = f"from mcl_kernels.backends import native; native.PACKAGE = native.PACKAGE / 'nothing'\n{USE}\n{USE}"
    nowhere = {"PATH": str(tmp_path), "CXX": "", "XDG_CACHE_HOME": str(tmp_path)}
    result = run_python(code, **nowhere)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("no C++ compiler is on the PATH; install one") == 1
    assert "PyTorch operations compute, several times slower" in result.stderr
    refused = run_python(code.replace("eye(4)", "eye(4), impl='native'"), **nowhere)
    assert refused.returncode == 1
    assert "NativeUnavailableError: no C++ compiler is on the PATH" in refused.stderr


def test_describe_builds_as_a_loss_does(site: BuildSite, monkeypatch: pytest.MonkeyPatch) -> None:
    native._loaded.cache_clear()
    try:
        site.compiler(command="echo 'x.cpp:1:1: error: no' >&2; exit 1")
        available, reason = native.describe()
        assert not available
        assert "x.cpp:1:1: error: no" in reason
        with pytest.raises(NativeUnavailableError, match=r"x\.cpp:1:1: error: no"):
            native.ops()
    finally:
        native._loaded.cache_clear()


def test_the_description_has_the_instruction_set(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.describe()[0]:
        pytest.skip(native.describe()[1])
    monkeypatch.setenv("MCL_KERNELS_CPU", "portable")
    assert native.describe() == (["cpu"], "C++ kernels by tiles in sorted order (csrc/cpu), instruction set portable")
    monkeypatch.setenv("MCL_KERNELS_CPU", "mmx")
    available, reason = native.describe()
    assert not available
    assert reason.startswith("MCL_KERNELS_CPU must be amx, avx512, avx2 or portable")
    monkeypatch.delenv("MCL_KERNELS_CPU")
    assert torch.ops.mcl_kernels_native.instruction_set() in native.describe()[1]


def test_two_processes_build_it_once(site: BuildSite) -> None:
    started, may_go_on = site.root / "started", site.root / "may_go_on"
    site.compiler(command=f"touch {started}; while [ ! -e {may_go_on} ]; do sleep 0.05; done")
    code = (
        "import sys; from pathlib import Path; from mcl_kernels.backends import native\n"
        "native.source_directory = lambda: Path(sys.argv[1]); native._find_or_build()"
    )

    def start() -> subprocess.Popen[str]:
        return subprocess.Popen([sys.executable, "-c", code, str(site.sources)], stderr=subprocess.PIPE, text=True)

    first = start()
    while not started.exists():
        assert first.poll() is None
        time.sleep(0.05)
    second = start()
    notices = second.stderr.readline()
    assert "waiting for another process" in notices
    may_go_on.touch()
    notices += "".join(process.communicate(timeout=120)[1] for process in (first, second))
    assert [first.returncode, second.returncode] == [0, 0], notices
    for notice in ("building the native CPU kernels", "built in", "waiting for another process"):
        assert notices.count(notice) == 1
    calls = site.times_called()
    with start() as third:
        assert third.communicate(timeout=120)[1] == ""
    assert site.times_called() == calls == 2
    assert sorted(path.suffix for path in site.cache.iterdir()) == [".lock", ".so"]
