"""Hook of mkdocs: links to files of the repository outside docs/ become links to the host of its code.

In the pages they are relative paths (`../CONTRIBUTING.md`), which a code host follows. Pictures have to be in docs/.
"""

import posixpath
import re
from pathlib import Path

from mkdocs.exceptions import PluginError

LINK = re.compile(r"(!?\[[^\]]*\]\()(\.\./[^)#\s]+)")


def on_page_markdown(markdown, page, config, **_):
    docs = Path(config.docs_dir)
    folder = (docs / page.file.src_uri).parent

    def on_host(match):
        opening, link = match.groups()
        target = Path(posixpath.normpath(folder / link))
        if target.is_relative_to(docs):
            return match[0]
        if opening.startswith("!") or not target.exists():
            raise PluginError(f"{page.file.src_uri}: no such file, or a picture outside docs/: {link}")
        kind = "tree" if target.is_dir() else "blob"
        return f"{opening}{config.repo_url}/{kind}/main/{target.relative_to(docs.parent).as_posix()}"

    return LINK.sub(on_host, markdown)
