"""What mkdocs.yml needs of code: pages of the repository that lie outside `core/docs`, and links between all pages.

Links in the repository are relative paths, so that they work where it is browsed. On the site they lead to the page of
that file. A link to a file that is no page, such as a script, becomes its text. The strict build ends with an error if
a link leads nowhere.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
DOCS = Path(__file__).parent
INDEX = "index.md"
NAMED = {
    "README.md": INDEX,
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "examples/README.md": f"examples/{INDEX}",
    "examples/kernel_plugin/README.md": f"examples/kernel_plugin/{INDEX}",
    "examples/kernel_plugin/adapter_guide.md": "examples/kernel_plugin/adapter_guide.md",
}
"""Addresses in the site's sources, by path in the repository."""
SECTIONS = {"benchmarks": "Benchmarks", "studies": "Studies"}
LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#\s]+)(#[^)\s]*)?\)")
ITEM = re.compile(r"^(?=[a-z_][\w, ]*: )", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def addresses() -> dict[str, str]:
    """The address in the site's sources of every page and picture outside `core/docs`, by path in the repository."""
    found = dict(NAMED)
    for section in SECTIONS:
        for path in sorted((ROOT / "profiles" / section).rglob("*")):
            if path.name == "README.md" or path.suffix == ".png":
                inside = path.relative_to(ROOT / "profiles").with_name(path.name.replace("README.md", INDEX))
                found[path.relative_to(ROOT).as_posix()] = f"measured/{inside.as_posix()}"
    return found


OUTSIDE = addresses()
IN_REPOSITORY = {address: path for path, address in OUTSIDE.items()}


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Add the measured pages to the navigation."""
    assert config.nav is not None
    pages = [address for address in OUTSIDE.values() if address.startswith("measured/") and address.endswith(".md")]
    of = {title: [p for p in pages if p.startswith(f"measured/{section}/")] for section, title in SECTIONS.items()}
    config.nav += [{title: found} for title, found in of.items()]
    config.nav.append({"Examples": [a for a in OUTSIDE.values() if a.startswith("examples/")]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures from outside `core/docs`."""
    for path, address in OUTSIDE.items():
        files.append(File.generated(config, address, abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn the repository's paths in links into addresses of the site."""
    address = page.file.src_uri
    here = PurePosixPath(IN_REPOSITORY.get(address, f"core/docs/{address}")).parent

    def led(match: re.Match[str]) -> str:
        picture, text, target, anchor = match.groups()
        if ":" in target:
            return match[0]
        path = os.path.normpath(here / target)
        found = path.removeprefix("core/docs/") if path.startswith("core/docs/") else OUTSIDE.get(path)
        if found:
            relative = os.path.relpath(found, PurePosixPath(address).parent)
            return f"{picture}[{text}]({relative}{anchor or ''})"
        return text if (ROOT / path).exists() else match[0]

    parts, at = [], 0
    for code in FENCED.finditer(markdown):
        parts += [LINK.sub(led, markdown[at : code.start()]), code[0]]
        at = code.end()
    return "".join([*parts, LINK.sub(led, markdown[at:])])


class Lists(griffe.Extension):  # type: ignore[misc]
    """Makes the lines `name: meaning` of docstrings into lists."""

    def on_instance(self, *, obj: griffe.Object, **others: object) -> None:
        if obj.docstring is not None:
            paragraphs = obj.docstring.value.split("\n\n")
            obj.docstring.value = "\n\n".join(ITEM.sub("- ", p) if ITEM.match(p) else p for p in paragraphs)
