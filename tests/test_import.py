"""`import ramp_moe` is light: no GPU library, and quick enough for a command line."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


HEAVY = "{'torch', 'triton', 'cutlass', 'cuda', 'flashinfer', 'deep_gemm', 'matplotlib', 'rich', 'click'}"


def test_imports_no_gpu_library() -> None:
    code = f"import sys, ramp_moe; ramp_moe.get_registry(); print(sorted({HEAVY} & set(sys.modules)))"
    assert _run(code) == "[]"


def test_a_plugin_s_import_is_as_light() -> None:
    assert _run(f"import sys, ramp_moe.plugin; print(sorted({HEAVY} & set(sys.modules)))") == "[]"


def test_a_plugin_s_names_are_the_library_s() -> None:
    """Under both names the same object, so that a plugin's error is caught as ours."""
    import ramp_moe
    from ramp_moe import plugin

    assert all(getattr(plugin, name) is getattr(ramp_moe, name) for name in {*plugin.__all__} & {*ramp_moe.__all__})
    imported = {alias.asname or alias.name for node in _imports(plugin.__file__) for alias in node.names}
    assert sorted(imported) == sorted(plugin.__all__)


def _imports(file: str | None) -> list[ast.ImportFrom]:
    tree = ast.parse(Path(file or "").read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level == 1]


def test_public_names_exist() -> None:
    import ramp_moe

    assert all(hasattr(ramp_moe, name) for name in ramp_moe.__all__)
    assert {*ramp_moe.__all__} <= {*dir(ramp_moe)}


@pytest.mark.slow
def test_every_public_name_can_be_the_first_to_be_imported() -> None:
    """Modules that need each other are told apart by none of them."""
    code = """
import sys, ramp_moe
names = {}
for name, home in ramp_moe._HOME.items():
    names.setdefault(home, []).append(name)
# A name imports its module, and then is looked up there. So once a module is enough.
for home in names:
    for module in [m for m in sys.modules if m.partition(".")[0] == "ramp_moe"]:
        del sys.modules[module]
    import ramp_moe
    assert not any(m.startswith("ramp_moe.") for m in sys.modules)
    for name in names[home]:
        assert getattr(ramp_moe, name) is getattr(sys.modules["ramp_moe." + home], name)
print(sum(map(len, names.values())))
"""
    import ramp_moe

    assert int(_run(code)) == len(ramp_moe.__all__)


def test_type_checkers_see_the_same_names() -> None:
    import ramp_moe

    imports = _imports(ramp_moe.__file__)
    assert {alias.name: node.module for node in imports for alias in node.names} == ramp_moe._HOME
    assert sorted(ramp_moe._HOME) == sorted(ramp_moe.__all__)


def test_submodules_are_found_and_other_names_are_not() -> None:
    assert _run("import ramp_moe; print(ramp_moe.errors.__name__, hasattr(ramp_moe, 'nothing'))") == (
        "ramp_moe.errors False"
    )


def test_the_command_line_needs_the_declared_dependencies_alone() -> None:
    """No module of it asks for what only tests or extras install, or has Triton interpret what it would compile."""
    extras = "('pytest', 'hypothesis', 'matplotlib', 'torch', 'triton', 'transformers', 'cutlass', 'cuda')"
    code = f"""
import os, pkgutil, sys
os.environ.pop("TRITON_INTERPRET", None)
for name in {extras}:
    sys.modules[name] = None
import ramp_moe.cli
for module in pkgutil.iter_modules(ramp_moe.cli.__path__, "ramp_moe.cli."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
assert "TRITON_INTERPRET" not in os.environ
try:
    ramp_moe.cli.main(["models", "--json"])
except SystemExit as e:
    assert not e.code
"""
    assert '"olmoe-1b-7b"' in _run(code)
