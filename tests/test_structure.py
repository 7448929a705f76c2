"""The shape of the code: sizes, folders, import cycles, and names that describe what a variable
holds."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_SOURCES = (_ROOT / "operator", _ROOT / "trainer_image")
_MODULES = {path.relative_to(_ROOT).as_posix(): path for root in _SOURCES for path in sorted(root.rglob("*.py"))}
_FOLDERS = sorted({path.parent for path in _MODULES.values()})

_MAX_FILE_LINES = 300
_MAX_FUNCTION_LINES = 60
_MAX_MODULES_PER_FOLDER = 16
# Words that describe how a value was obtained, not what it is.
_BANNED = frozenset(
    [
        "found",
        "told",
        "said",
        "seen",
        "aside",
        "given",
        "wanted",
        "kept",
        "held",
        "learnt",
        "alike",
        "asked",
        "words",
        "tell",
        "told_by",
        "say",
        "says",
    ]
)


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def _identifiers(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """Yields every name that a module itself defines, with its line."""
    for node in ast.walk(tree):
        match node:
            case ast.Name(id=name, ctx=ast.Store()) | ast.arg(arg=name) | ast.ClassDef(name=name):
                yield name, node.lineno
            case ast.FunctionDef(name=name) | ast.AsyncFunctionDef(name=name):
                yield name, node.lineno
            case ast.Attribute(attr=name, ctx=ast.Store()):
                yield name, node.lineno


def _api_fields(tree: ast.Module) -> set[tuple[str, int]]:
    """Returns the fields of the API's models: their names are JSON that other versions read."""
    return {
        (node.target.id, node.lineno)
        for model in ast.walk(tree)
        if isinstance(model, ast.ClassDef) and model.bases
        for node in model.body
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
    }


@pytest.mark.parametrize("name", _MODULES)
def test_a_module_is_short_and_so_are_its_functions(name: str) -> None:
    text = _MODULES[name].read_text()
    assert len(text.splitlines()) <= _MAX_FILE_LINES
    long = {
        function.name: length
        for function in _functions(ast.parse(text))
        if (length := (function.end_lineno or 0) - function.lineno + 1) > _MAX_FUNCTION_LINES
    }
    assert not long


@pytest.mark.parametrize("folder", _FOLDERS, ids=lambda folder: str(folder.relative_to(_ROOT)))
def test_a_folder_shows_few_modules(folder: Path) -> None:
    assert len([path for path in folder.glob("*.py") if path.name != "__init__.py"]) <= _MAX_MODULES_PER_FOLDER


@pytest.mark.parametrize("name", _MODULES)
def test_a_name_describes_what_it_holds(name: str) -> None:
    tree = ast.parse(_MODULES[name].read_text())
    fields = _api_fields(tree) if name.startswith("operator/finetune_api/") else set()
    banned = {f"{word} (line {line})" for word, line in _identifiers(tree) if word.strip("_") in _BANNED}
    assert not banned - {f"{word} (line {line})" for word, line in fields}


def test_names_of_tests_and_tools_describe_what_they_hold() -> None:
    banned = {
        f"{path.relative_to(_ROOT)}:{line} {word}"
        for folder in ("tests", "hack", "benchmarks")
        for path in (_ROOT / folder).rglob("*.py")
        for word, line in _identifiers(ast.parse(path.read_text()))
        if word.strip("_") in _BANNED
    }
    assert not banned


def _imports() -> dict[str, set[str]]:
    """Returns, by module, the project's own modules that it imports, at its top, in functions or
    only for types."""
    modules = {
        ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): path
        for root in _SOURCES
        for path in root.rglob("*.py")
    }
    graph: dict[str, set[str]] = {}
    for name, path in modules.items():
        graph[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module:
                for alias in node.names:
                    full_name = f"{node.module}.{alias.name}"
                    graph[name] |= {full_name if full_name in modules else node.module} & modules.keys()
            elif isinstance(node, ast.Import):
                graph[name] |= {alias.name for alias in node.names} & modules.keys()
    return graph


def _circle(graph: dict[str, set[str]]) -> list[str]:
    """Returns a cycle of imports, or nothing. Modules that import no remaining module are removed
    until only cycles remain."""
    remaining = dict(graph)
    while free := [name for name, imported in remaining.items() if not imported & remaining.keys()]:
        for name in free:
            del remaining[name]
    if not remaining:
        return []
    path = [min(remaining)]
    while (following := min(remaining[path[-1]] & remaining.keys())) not in path:
        path.append(following)
    return path[path.index(following) :]


def test_no_imports_form_a_circle_not_even_lazy_ones() -> None:
    graph = _imports()
    assert len(graph) > 150
    assert _circle(graph) == []


def test_a_circle_would_be_detected() -> None:
    assert _circle({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["b", "c"]
    assert _circle({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def test_the_map_of_the_code_names_files_that_exist() -> None:
    text = (_ROOT / "CONTRIBUTING.md").read_text()
    names = set(re.findall(r"`([a-z_]+/(?:[a-z_]+/)*[a-z_]+\.py)`", text))
    assert len(names) > 20
    assert [name for name in sorted(names) if not any(path.endswith(f"/{name}") for path in _MODULES)] == []
