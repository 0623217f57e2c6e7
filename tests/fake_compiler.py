"""A build site without kernels, and fake compilers that make a library in milliseconds, or fail as a test chooses."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from mcl_kernels.backends import library as _library
from mcl_kernels.backends import native

STRANGER = 12345 if sys.platform == "win32" else os.geteuid() + 1
SCRIPT = """#!/bin/sh
case "$*" in *--version*) echo "{version}"; exit 0;; esac
echo "$0 $*" >> {calls}
for output; do :; done  # the last argument
{command}
case "$*" in
    *" -c "*) echo object > "$output" ;;
    *) cp {library} "$output" ;;
esac
"""


class BuildSite:
    """A cache directory, the sources of a library without operators, and their compiler."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.cache = root / "cache" / "mcl_kernels"
        self.calls = root / "calls"
        self.sources = root / "sources"
        self.sources.mkdir()
        (self.sources / "operators.cpp").write_text("extern const int answer = 42;\n")
        self.library = root / "library.so"

    def compiler(self, name: str = "fake", command: str = "", version: str = "g++ (fake) 1.0") -> Path:
        """Returns a compiler that copies a library made before, after it has run `command`."""
        if not self.library.exists():
            source = str(self.sources / "operators.cpp")
            subprocess.run(["g++", "-shared", "-fPIC", source, "-o", str(self.library)], check=True)
        path = self.root / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(SCRIPT.format(version=version, calls=self.calls, command=command, library=self.library))
        path.chmod(0o755)
        return path

    def times_called(self) -> int:
        return len(self.calls.read_text().splitlines()) if self.calls.exists() else 0

    def stem(self) -> str:
        return native.library_stem(self.sources)

    def libraries(self) -> list[Path]:
        return _library.find_libraries(self.cache, self.stem())

    def failures(self) -> list[Path]:
        return list(self.cache.glob("*.failed"))


def make_site(root: Path, monkeypatch: pytest.MonkeyPatch) -> BuildSite:
    """Makes a build site with a fake compiler. Its libraries are not tried in another process, which takes seconds."""
    if shutil.which("g++") is None:
        pytest.skip("no g++ is on the PATH")
    site = BuildSite(root)
    monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
    monkeypatch.setenv("CXX", str(site.compiler()))
    monkeypatch.setattr(native, "PACKAGE", root / "package")
    monkeypatch.setattr(native, "source_directory", lambda: site.sources)
    monkeypatch.setattr(_library, "check_loads", lambda library: None)
    return site


def give_away(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a file or directory another user's: as root in truth, else for `os.geteuid`."""
    if os.geteuid() == 0:
        os.chown(path, STRANGER, STRANGER)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: STRANGER)
