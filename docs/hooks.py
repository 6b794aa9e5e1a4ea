"""MkDocs hooks: what lies outside docs/ becomes part of the site.

Documents link to files of the repository as they would on GitHub, ``../csrc/cpu/tiles.h``. Each
file that is linked to, and those of a folder that is, gets a page ``source/...`` with its text;
CHANGELOG.md and CONTRIBUTING.md become pages like any other.
"""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md"}
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)\s#]+)(?=[)#])")
LANGUAGES = {".py": "python", ".h": "cpp", ".cpp": "cpp", ".yaml": "yaml"}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the documents at the root and a page for each file that some document links to."""
    for name, uri in PAGES.items():
        files.append(File.generated(config, uri, abs_src_path=str(ROOT / name)))
    documents = [*(ROOT / name for name in PAGES), *DOCS.rglob("*.md")]
    linked = {path for document in documents for path in _outside(document)}
    folders = {path for path in linked if path.is_dir()}
    linked |= {path for folder in folders for path in _files_of(folder)}
    for path in sorted(linked):
        uri = _uri_of(path)
        if path.suffix == ".json":
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        else:
            files.append(File.generated(config, uri, content=_page_of(path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Have links lead to the pages that the site has for them."""
    uri = page.file.src_uri
    if uri.startswith("source/"):
        return markdown
    names = {page_uri: name for name, page_uri in PAGES.items()}
    document = ROOT / names[uri] if uri in names else DOCS / uri

    def replace(match: re.Match[str]) -> str:
        target = _resolve(document, match[1])
        if not target.exists():
            return match[0]
        return posixpath.relpath(_uri_of(target), posixpath.dirname(uri) or ".")

    return LINK.sub(replace, markdown)


def _resolve(document: Path, link: str) -> Path:
    return Path(os.path.normpath(document.parent / link))


def _outside(document: Path) -> set[Path]:
    """What a document links to that has no page of its own."""
    targets = {_resolve(document, link) for link in LINK.findall(document.read_text("utf-8"))}
    return {path for path in targets if path.exists() and _uri_of(path).startswith("source/")}


def _files_of(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix in LANGUAGES]


def _uri_of(path: Path) -> str:
    """Where the site has a file of the repository."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if name in PAGES:
        return PAGES[name]
    if DOCS in path.parents:
        return path.relative_to(DOCS).as_posix()
    return f"source/{name}" if path.suffix == ".json" else f"source/{name}.md"


def _page_of(path: Path) -> str:
    name = path.relative_to(ROOT).as_posix()
    head = f"---\ntitle: {name}\nsearch:\n  exclude: true\n---\n\n# `{name}`\n\n"
    if path.is_dir():
        return head + "\n".join(
            f"- [`{file.name}`]({path.name}/{file.name}.md)" for file in sorted(_files_of(path))
        )
    fence = "~" * 8
    language = LANGUAGES.get(path.suffix, "text")
    return f"{head}{fence}{language}\n{path.read_text('utf-8')}\n{fence}\n"
