"""The documentation: its code runs, its commands exist, its links resolve, and no public name is left out."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import numpy as np
import pytest

import mcl_kernels
from mcl_kernels import objectives
from mcl_kernels.cli import main as command_line
from tests.pages import BLOCK, PAGES, ROOT, all_blocks, blocks, run_python_blocks, text_of

TAGS = {"a", "br", "details", "https", "img", "summary"}
LANGUAGES = {"bash", "diff", "powershell", "python", "text"}
README = text_of("README.md")
API = "".join(text_of(page) for page in PAGES if page.startswith("docs/api/"))
MAKEFILE, METADATA = ((ROOT / name).read_text(encoding="utf-8") for name in ("Makefile", "pyproject.toml"))
REPOSITORY = re.search(r'^Homepage = "(.+)"$', METADATA, re.MULTILINE)[1]
OF_A_SHELL = ("cd", "export", "source")


def commands(page: str) -> list[list[str]]:
    """The commands of a page as lists of words, without the variables before them."""
    found = []
    for block in blocks(page, "bash", "powershell"):
        for line in re.split(r"\n|; | && ", block.replace("\\\n", " ")):
            words = shlex.split(line, comments=True)
            while words and re.match(r"\w+=|\$env:", words[0]):
                del words[0]
            if words:
                found.append(words)
    return found


ALL_COMMANDS = sorted({shlex.join(words) for page in PAGES for words in commands(page)})


def test_the_readme_is_one_page() -> None:
    lines = README.splitlines()
    assert len(lines) <= 150
    assert len(README.split()) <= 1200
    assert any("pip install" in line for line in lines[:60])


@pytest.mark.parametrize("page", PAGES)
def test_no_other_kind_of_block(page: str) -> None:
    assert text_of(page).count("```") == 2 * len(all_blocks(page))
    assert {block.language for block in all_blocks(page)} <= LANGUAGES


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_code(page: str) -> None:
    """Outside of code `<q, k>` is taken for a tag, and not shown."""
    text = re.sub(r"`[^`\n]*`|^ {4}.*$", "", BLOCK.sub("", text_of(page)), flags=re.MULTILINE)
    assert set(re.findall(r"<(\w+)", text)) <= TAGS


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")])
def test_python_blocks_run_in_order(page: str, tmp_path: Path) -> None:
    run_python_blocks(page, tmp_path)


@pytest.mark.parametrize("page", [page for page in PAGES if any("mcl-kernels" in words for words in commands(page))])
def test_commands_on_files(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands run in order, on features as a reader has them; of `demo`, which trains, the options are checked."""
    monkeypatch.chdir(tmp_path)
    for program, *arguments in commands(page):
        if program != "mcl-kernels" or arguments == ["--version"]:
            continue
        options = command_line._parser().parse_args(arguments)
        if options.command in ("assign", "cluster"):
            assert options.features.suffix == ".npy"
            if not options.features.exists():
                seed = len(list(tmp_path.iterdir()))
                np.save(options.features, np.random.default_rng(seed).random((1000, 8), dtype=np.float32))
            assert command_line.main(arguments) == 0
            assert options.out.exists()
        elif options.command == "info":
            assert command_line.main(arguments) == 0


@pytest.mark.parametrize("command", ALL_COMMANDS)
def test_commands_exist(command: str) -> None:
    program, *arguments = shlex.split(command)
    if program == "python" and arguments[:2] == ["-m", "pip"]:
        program, arguments = "pip", arguments[2:]
    if program == "make":
        targets = re.search(r"^\.PHONY: (.*)$", MAKEFILE, re.MULTILINE)[1].split()
        for argument in arguments:
            name, is_variable, _ = argument.partition("=")
            assert f"\n{name} ?=" in MAKEFILE if is_variable else name in targets, argument
    elif program == "pip":
        assert arguments[0] == "install"
        for extras in re.findall(r"(?:\.|mcl-kernels)\[([\w,-]+)\]", command):
            assert all(f"\n{extra} = [\n" in METADATA for extra in extras.split(",")), extras
        for address in re.findall(r"git\+(https://\S+)", command):
            assert address.startswith(REPOSITORY)
    elif program == "python":
        assert arguments[0] == "-m" or arguments[0].endswith(".py")
        if arguments[0] == "-m":
            check_module(*arguments[1:])
    elif program == "torchrun":
        check_module("torch.distributed.run", *(argument for argument in arguments if argument.startswith("--")))
    elif program == "git":
        assert arguments[:2] == ["clone", REPOSITORY]
    else:
        assert program in ("mcl-kernels", *OF_A_SHELL), f"no check of {program}"


def check_module(name: str, *arguments: str) -> None:
    """The module exists, and its source has the options; some have no `--help` and would begin to measure."""
    spec = importlib.util.find_spec(name)
    assert spec, name
    if spec.submodule_search_locations:
        spec = importlib.util.find_spec(f"{name}.__main__")
    source = Path(spec.origin).read_text(encoding="utf-8")
    for option in (argument.split("=")[0] for argument in arguments if argument.startswith("--")):
        assert f'"{option}"' in source, option


def test_one_address_of_the_repository() -> None:
    for name in ("CHANGELOG.md", "CITATION.cff", "SECURITY.md", "mkdocs.yml", "pyproject.toml"):
        addresses = re.findall(r"https://github\.com/[\w-]+/[\w-]+", (ROOT / name).read_text(encoding="utf-8"))
        assert set(addresses) == {REPOSITORY}, name


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page: str) -> None:
    """Files and anchors; `make docs` checks those within docs/ as the site has them."""
    text = re.sub(r"`[^`\n]*`", "", BLOCK.sub("", text_of(page)))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", target):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), target


def anchors(text: str) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE)
    slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}
    return slugs | set(re.findall(r"^::: (\S+)$", text, re.MULTILINE))


def test_every_public_name_is_on_an_api_page() -> None:
    shown = set(re.findall(r"^::: (\S+)$", API, re.MULTILINE))
    assert {f"mcl_kernels.{name}" for name in mcl_kernels.__all__} <= shown
    assert {"mcl_kernels.stages.stage.Stage", "mcl_kernels.stages.finished_stage.FinishedStage"} <= shown
    members = re.search(r"mcl_kernels\.objectives\n.*?members: \[([\w, ]+)\]", API, re.DOTALL)[1].split(", ")
    classes = {name for name, value in vars(objectives).items() if isinstance(value, type) and value.__doc__}
    assert {name for name in classes if issubclass(vars(objectives)[name], objectives.Objective)} <= set(members)
    assert {"info_nce", "decoupled"} <= set(members)
    for path in (ROOT / "mcl_kernels" / "integrations").glob("[a-z]*.py"):
        nodes = ast.parse(path.read_text(encoding="utf-8")).body
        names = {node.name for node in nodes if isinstance(node, ast.ClassDef) and not node.name.startswith("_")}
        assert {f"mcl_kernels.integrations.{path.stem}.{name}" for name in names} <= shown


@pytest.mark.parametrize("name", [name for name in mcl_kernels.__all__ if name != "objectives"])
def test_public_docstrings_have_their_sections(name: str) -> None:
    docstring = getattr(mcl_kernels, name).__doc__
    assert "Example:" in docstring
    assert "Raises:" in docstring or name in ("ExchangePlan", "capabilities")  # without arguments


@pytest.mark.parametrize("command", ["", "info", "demo", "cluster", "assign"])
def test_the_page_of_the_command_line_shows_its_help(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compared without line breaks, which differ between versions of Python."""
    monkeypatch.setenv("COLUMNS", "80")
    assert command_line.main([*command.split(), "--help"]) == 0
    shown = [block.split() for block in blocks("docs/api/command-line.md", "text")]
    assert capsys.readouterr().out.split() in shown, f"mcl-kernels {command} --help has changed: paste it into the page"
