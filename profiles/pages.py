"""Generates the README files of benchmarks and studies, whose tables are computed from recorded measurements.

    python profiles/pages.py --check [NAME ...]   regenerate, and say what differs; exit code 1 if anything does
    python profiles/pages.py --write [NAME ...]   regenerate, and write pages, sheets and plots

A name is the name of a page's folder, for example `families`. Without names, every page is taken. No GPU is needed.
The plots need matplotlib (`pip install '.[plots]'`).

A page's tables come from the `*tables.py` beside it, which defines these names:

TABLES   maker of each table's text, by the name in the page's markers
HEAVY    names of tables that take a minute or more; tests leave them out
FRONT    the same as TABLES, for the repository's README
FILES    maker of each text file beside the page, by file name
draw     draws the plots beside the page

Two texts are the same if their words are equal and their computed numbers differ by at most one unit of the last
printed digit. The last bits of a float depend on the processor.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import TypeVar

HERE = Path(__file__).parent
README = "README.md"
UNMEASURED = "Nothing is measured yet."

T = TypeVar("T")
Tables = Mapping[str, Callable[[], str]]

FIGURE = r"-?\d[\d,]*(?:\.\d+)?(?:e[-+]?\d+)?%?"
NUMBER = re.compile(rf"(?<![\w.+-]){FIGURE}(?=x?(?:[^\w.]|\.(?!\w)|$))")
"""Matches counts, decimals, percents, and ratios such as 1.05x, but no part of a date, a version or a name."""
SLACK = 1.001
"""One unit of the last digit, and a little for the rounding of a difference of floats."""


def near(found: str, expected: str) -> bool:
    """Whether two printed numbers differ by at most one unit of the last digit. Counts must be equal."""
    if found == expected:
        return True
    (a, digits), (b, other) = _number(found), _number(expected)
    return None not in (digits, other) and digits == other and abs(a - b) <= SLACK * 10.0 ** -(digits or 0)


def _number(text: str) -> tuple[float, int | None]:
    """A number, and how many digits it has after the point; None for a count."""
    plain = text.rstrip("%").replace(",", "")
    mantissa, _, exponent = plain.partition("e")
    _, point, decimals = mantissa.partition(".")
    if not point and not exponent and not text.endswith("%"):
        return float(plain), None
    return float(plain), len(decimals) - int(exponent or 0)


def same_line(found: str, expected: str) -> bool:
    """Whether two lines have the same words, and numbers that are `near` each other."""
    if NUMBER.sub("#", found) != NUMBER.sub("#", expected):
        return False
    return all(map(near, NUMBER.findall(found), NUMBER.findall(expected)))


def differences(found: str, expected: str) -> list[str]:
    """The lines that differ. Two neighbouring rows of a table may be swapped, since rounding can change their order."""
    ours, theirs = found.splitlines(), expected.splitlines()
    if len(ours) != len(theirs):
        return [f"{len(ours)} lines, not {len(theirs)}"]
    at, wrong = 0, []
    while at < len(ours):
        if same_line(ours[at], theirs[at]):
            at += 1
        elif ours[at].startswith("|") and _swapped(ours[at : at + 2], theirs[at : at + 2]):
            at += 2
        else:
            wrong.append(f"line {at + 1}\n  found    {ours[at]}\n  expected {theirs[at]}")
            at += 1
    return wrong


def _swapped(ours: list[str], theirs: list[str]) -> bool:
    return len(ours) == 2 and same_line(ours[0], theirs[1]) and same_line(ours[1], theirs[0])


def assert_same(found: str, expected: str) -> None:
    """Raise AssertionError with the lines that differ."""
    wrong = differences(found, expected)
    assert not wrong, "\n".join(wrong)


def assert_says(page: str, text: str) -> None:
    """Raise AssertionError unless a page contains a text with numbers that are `near`. Line breaks count as spaces."""
    page, text = " ".join(page.split()), " ".join(text.split())
    words = [re.escape(part) for part in NUMBER.split(text)]
    there = [m.group() for m in re.finditer(FIGURE.join(words), page)]
    assert any(same_line(t, text) for t in there), f"{text!r} is not said; near it: {there}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]], empty: str = UNMEASURED) -> str:
    """A table in Markdown, or `empty` if there are no rows."""
    lines = [" | ".join(map(str, line)) for line in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines) if len(lines) > 2 else empty


def over(read: Callable[[], T], makers: Mapping[str, Callable[[T], str]]) -> Tables:
    """Makers of tables over one source, which is read when the first of them is called."""
    source = cache(read)

    def made(make: Callable[[T], str]) -> Callable[[], str]:
        return lambda: make(source())

    return {name: made(make) for name, make in makers.items()}


def filled(page: str, tables: Tables) -> str:
    """The page with every table between its markers computed again. Raises ValueError if a marker is missing."""
    for name, make in tables.items():
        start, end = f"<!-- table: {name} -->\n", f"\n<!-- end: {name} -->"
        if page.count(start) != 1 or end not in page.split(start)[1]:
            raise ValueError(f"the page needs the lines {start.strip()} and {end.strip()}, once each")
        before, rest = page.split(start)
        page = before + start + make() + end + rest.split(end, 1)[1]
    return page


def scripts() -> dict[str, list[Path]]:
    """The scripts of each page, by the name of its folder."""
    found: dict[str, list[Path]] = {}
    for script in sorted(HERE.glob("*/**/*tables.py")):
        found.setdefault(script.parent.name, []).append(script)
    return found


def load(script: Path | str) -> ModuleType:
    """The module of a script below this folder, loaded once per process. A relative path is relative to this folder."""
    script = HERE / script
    name = ".".join(script.relative_to(HERE).with_suffix("").parts)
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, script)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses look their module up
        sys.path[:0] = [str(script.parent)]  # as if it were run
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[name]
            raise
        finally:
            sys.path.remove(str(script.parent))
    return sys.modules[name]


def regenerated(name: str, heavy: bool = True) -> Iterator[tuple[Path, str]]:
    """Each generated file of a page, and its text. Without `heavy`, the tables in HEAVY are not recomputed."""
    for script in scripts()[name]:
        module = load(script)
        left_out = () if heavy else getattr(module, "HEAVY", ())
        tables = {table: make for table, make in module.TABLES.items() if table not in left_out}
        for path, of_page in ((script.parent / README, tables), (HERE.parent / README, getattr(module, "FRONT", {}))):
            if of_page:
                yield path, filled(path.read_text(), of_page)
        for file, make in getattr(module, "FILES", {}).items():
            yield script.parent / file, make()


def stale(name: str, heavy: bool = True) -> list[str]:
    """Differences between a page's files and their regenerated text: one or more lines per file that differs."""
    found = []
    for path, text in regenerated(name, heavy):
        texts = text, path.read_text()
        if path.suffix == ".csv":  # whose commas would join numbers
            texts = texts[0].replace(",", " | "), texts[1].replace(",", " | ")
        found += [f"{path.relative_to(HERE.parent)}, {difference}" for difference in differences(*texts)]
    return found


def write(name: str) -> None:
    """Write a page's files and plots again."""
    for path, text in regenerated(name):
        path.write_text(text)
    for script in scripts()[name]:
        if draw := getattr(load(script), "draw", None):
            draw()


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"pages: {', '.join(scripts())}; all if none is named")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--check", action="store_true", help="say which pages differ")
    what.add_argument("--write", action="store_true", help="write pages, sheets and plots")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.names if name not in scripts()]:
        parser.error(f"no page is called {', '.join(unknown)}; there are {', '.join(scripts())}")
    differ = 0
    for name in options.names or scripts():
        if options.write:
            write(name)
            print(f"{name}: written", flush=True)
        else:
            wrong = stale(name)
            differ += bool(wrong)
            print(f"{name}: {'differs; write it with --write' if wrong else 'the same'}", *wrong, sep="\n", flush=True)
    return int(differ > 0)


if __name__ == "__main__":
    sys.modules["pages"] = sys.modules[__name__]  # which the pages' scripts import
    sys.exit(main(sys.argv[1:]))
