"""Imports go downwards, and each heavy library has one place: read from the source, not from what happens to load."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "trainer"
# What a part may import of ours besides its own modules, `errors`, `ending` and `layout`.
ALLOWED = {
    "data": {"arguments"},
    "model": {"arguments"},
    "memory": {"arguments", "data", "model"},
    # convert reads a checkpoint by parameter, for other ranks
    "run": {"arguments", "data", "model", "memory", "convert"},
    "convert": set(),
    "arguments": set(),
    "ending": set(),
    "errors": set(),
    "layout": set(),
    "doctor": {"arguments", "run"},
    "plan": {"arguments", "memory", "model", "run"},
}
HOME = {
    "accelerate": {"run/engine.py"},
    "deepspeed": {"run/engine.py", "run/extensions.py"},
    "soundfile": {"data"},
    "soxr": {"data"},
    "wandb": {"run/trackers.py"},
}


def _imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module is not None, f"{path}: relative import"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names} if node.module == "trainer" else {node.module}
            )
    return names


MODULES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    part = module.removesuffix(".py").split("/")[0]
    if part not in ALLOWED:
        assert module in ("__init__.py", "__main__.py", "cli.py", "launch.py")  # the top; cli imports lazily
        return
    ours = {name.split(".")[1] for name in _imports(PACKAGE / module) if name.startswith("trainer.")}
    assert ours <= ALLOWED[part] | {part, "ending", "errors", "layout"}


@pytest.mark.parametrize("library", HOME)
def test_a_library_has_one_place(library: str) -> None:
    users = {module for module in MODULES if any(name.split(".")[0] == library for name in _imports(PACKAGE / module))}
    assert users
    assert {module for module in users if not any(module.startswith(home) for home in HOME[library])} == set()
