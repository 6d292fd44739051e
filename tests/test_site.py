"""The site builds from the repository, and every link inside it leads somewhere."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import ramp_moe
from ramp_moe import plugin

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "core" / "docs"
REFERENCE = [page.read_text() for page in DOCS.glob("reference/*.md")]
DESCRIBED = {name for page in REFERENCE for name in re.findall(r"^::: (\S+)$", page, re.MULTILINE)}
PLAIN = {"FORMS", "__version__"}
"""Public names that have no docstring of their own."""


def test_the_reference_has_every_public_name() -> None:
    assert {name.removeprefix("ramp_moe.").split(".")[0] for name in DESCRIBED} >= {*ramp_moe.__all__} - PLAIN


def test_the_reference_has_every_class_that_a_kernel_plugin_imports() -> None:
    classes = {name for name in plugin.__all__ if isinstance(getattr(plugin, name), type)}
    assert {name.rsplit(".", 1)[1] for name in DESCRIBED} >= classes


class _Page(HTMLParser):
    """The addresses that a page names, and the anchors that it has."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" and value:
                self.anchors.add(value)


def dead_links(site: Path) -> list[str]:
    """The links of a built site that lead to no file of it, or to no anchor."""
    pages = {path: _Page(path.read_text()) for path in site.rglob("*.html")}
    dead = []
    for path, page in pages.items():
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc or path.name == "404.html":
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            target = target / "index.html" if target.is_dir() else target
            there = target.exists() and (
                not parts.fragment or target not in pages or unquote(parts.fragment) in pages[target].anchors
            )
            if not there:
                dead.append(f"{path.relative_to(site)}: {link}")
    return dead


@pytest.mark.slow
def test_the_site_builds_and_its_links_lead_somewhere(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings_handlers.python")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stdout + built.stderr
    assert dead_links(tmp_path) == []
    built_pages = {str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob("index.html")}
    assert {str(page.relative_to(DOCS).with_suffix("")) for page in DOCS.rglob("*.md")} <= built_pages
    reference = "".join(page.read_text() for page in (tmp_path / "reference").rglob("*.html"))
    assert [name for name in DESCRIBED if f'id="{name}"' not in reference] == []
    measured = tmp_path / "measured" / "benchmarks" / "serving"
    assert (measured / "decode.png").exists()
    assert "measured/benchmarks/serving/" in (tmp_path / "index.html").read_text(), "the README's link leads there"
