"""Extension of griffe, which parses docstrings of Google's style, for what ours have besides:

* one line for several arguments, `query, key: as in ...`: each gets the line;
* one `Example:`;
* names of the package in backticks: they become links.

A function with the name of its module, such as `nt_xent`, is found as the function.
"""

import re

import griffe

SECTION = re.compile(r"^(?:Args|Attributes):\n(?: .*\n|\n(?= ))*", re.MULTILINE)
SHARED = re.compile(r"^( {4})(\w+(?:, \w+)+)(: .*\n(?: {5,}.*\n)*)", re.MULTILINE)


def _split(match: re.Match[str]) -> str:
    indent, names, text = match.groups()
    return "".join(f"{indent}{name}{text}" for name in names.split(", "))


class Docstrings(griffe.Extension):
    def on_package(self, *, pkg: griffe.Module, **_: object) -> None:
        names = "|".join(str(name) for name in pkg.exports or ())
        self._link = re.compile(rf"`({names})`")
        self._mend(pkg)
        for name in map(str, pkg.exports or ()):
            target = pkg[name].target_path if pkg[name].is_alias else pkg[name].path
            found = pkg[target.removeprefix("mcl_kernels.")]
            if isinstance(found, griffe.Module) and name in found.members:
                pkg.set_member(name, griffe.Alias(name, f"{target}.{name}", parent=pkg))

    def _mend(self, parent: griffe.Object) -> None:
        for member in parent.members.values():
            if member.is_alias:
                continue
            if member.docstring:
                text = SECTION.sub(lambda section: SHARED.sub(_split, section[0]), member.docstring.value + "\n")
                text = re.sub(r"^Example:\n", "Examples:\n", text, flags=re.MULTILINE)
                member.docstring.value = self._link.sub(r"[`\1`][mcl_kernels.\1]", text.rstrip())
            self._mend(member)
