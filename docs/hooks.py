"""Links from pages to files of the repository, for the site that MkDocs builds.

In a page, ``[entrypoint](../../docker/entrypoint)`` works where the repository is read.
The site gets a copy of each such file below ``repository/``, Markdown as a page, and
the link leads there. A link to something that does not exist ends the build.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_ROOT = Path(__file__).parents[1]
_DOCS = _ROOT / "docs"
_PREFIX = "repository/"
_LINK = re.compile(r"(?<=\]\()([^()#\s:]+)")


def _uri(target: Path) -> str:
    """Where a file of the repository is on the site."""
    if target.is_relative_to(_DOCS):
        return target.relative_to(_DOCS).as_posix()
    return _PREFIX + target.relative_to(_ROOT).as_posix()


def _target(page: Path, link: str) -> Path:
    return Path(os.path.normpath(page.parent / link))


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files that pages link to, and what these link to in turn."""
    waiting = [Path(str(file.abs_src_path)) for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for link in _LINK.findall(page.read_text()):
            target = _target(page, link)
            if not target.is_file() or not target.is_relative_to(_ROOT):
                continue  # MkDocs says that it is missing.
            if files.get_file_from_path(_uri(target)) is None:
                files.append(File.generated(config, _uri(target), abs_src_path=str(target)))
                if target.suffix == ".md":
                    waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to these copies."""
    source = Path(str(page.file.abs_src_path))
    here = os.path.dirname(page.file.src_uri)

    def rewritten(match: re.Match[str]) -> str:
        target = _target(source, match[1])
        known = target.is_relative_to(_ROOT) and files.get_file_from_path(_uri(target)) is not None
        return os.path.relpath(_uri(target), here or ".") if known else match[1]

    return _LINK.sub(rewritten, markdown)
