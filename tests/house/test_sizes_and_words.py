"""The house: files and functions that fit on a screen, public names that say what they are, no traces of a machine."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import REPOSITORY

FOLDERS = ("mmfuse", "tests", "data_shards", "launch", "cluster", "benchmarks")
SOURCES = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.py"))]
SCRIPTS = [path for folder in FOLDERS for path in sorted((REPOSITORY / folder).rglob("*.sh"))]
PACKAGE = [path for path in SOURCES if path.is_relative_to(REPOSITORY / "mmfuse")]
MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 60

Function = ast.FunctionDef | ast.AsyncFunctionDef


def place(path: Path, node: ast.AST | None = None) -> str:
    return str(path.relative_to(REPOSITORY)) + (f":{node.lineno}" if isinstance(node, ast.stmt | ast.expr) else "")


def test_files_stop_at_300_lines() -> None:
    lengths = {place(path): len(path.read_text().splitlines()) for path in SOURCES + SCRIPTS}
    assert not {name: length for name, length in lengths.items() if length > MAX_FILE_LINES}


def test_functions_stop_at_60_lines() -> None:
    long = {}
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, Function) and node.end_lineno:
                lines = node.end_lineno - node.lineno + 1
                long |= {place(path, node): lines} if lines > MAX_FUNCTION_LINES else {}
    assert not long


def test_only_the_command_line_prints() -> None:
    printing = [
        place(path, node)
        for path in PACKAGE
        if not path.name.startswith("cli")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"
    ]
    assert not printing


def is_obvious(node: Function) -> bool:
    """Fewer than three statements whose name says it all, such as `backward` or `rank`."""
    return len(node.body) < 3


def public_members(tree: ast.Module) -> Iterator[tuple[ast.ClassDef | None, ast.ClassDef | Function]]:
    """Public classes and functions of a module, and the public methods of its public classes with their class."""
    for node in tree.body:
        if isinstance(node, ast.ClassDef | Function) and not node.name.startswith("_"):
            yield None, node
            if isinstance(node, ast.ClassDef):
                methods = (n for n in node.body if isinstance(n, Function) and not n.name.startswith("_"))
                yield from ((node, method) for method in methods)


def test_public_names_have_docstrings() -> None:
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE}
    # A method of a class with a base says what it does where the base, or torch, declares it.
    missing = [
        f"{place(path, node)} {node.name}"
        for path, tree in trees.items()
        for owner, node in public_members(tree)
        if not ast.get_docstring(node)
        and not (isinstance(node, Function) and (is_obvious(node) or (owner is not None and owner.bases)))
    ]
    assert not missing
    assert not [place(path) for path, tree in trees.items() if not ast.get_docstring(tree)]


def test_no_file_names_a_developer_s_machine() -> None:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    found = subprocess.run(listed, cwd=REPOSITORY, capture_output=True, check=False)
    if found.returncode:
        pytest.skip("not a git checkout")
    here = re.compile(rb"(?<![\w./-])" + re.escape(str(REPOSITORY).encode()) + rb"(?![\w-])")
    files = [REPOSITORY / name for name in found.stdout.decode().split("\0") if name]
    assert not [place(path) for path in files if path.is_file() and here.search(path.read_bytes())]
