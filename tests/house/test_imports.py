"""The house: imports point downwards only, and heavy libraries stay on one floor."""

import ast
import graphlib
from pathlib import Path

import pytest
from helpers import REPOSITORY

FLOORS = (
    {"types", "config", "errors", "log", "distributed", "hashing", "randomness", "files", "pages", "version", "launch"},
    {"modalities"},
    {"data"},
    {"model", "objectives", "shards"},
    {"task"},
    {"evaluate"},
    {"train"},
    {"embed"},
    {"cli_build"},
    {"cli_shards", "cli_checkpoint", "cli_doctor"},
    {"cli"},
)
SIDEWAYS = {("objectives", "model")}
"""The one arrow between two folders of one floor."""
ONLY_IN = {
    "timm": "mmfuse/modalities",
    "transformers": "mmfuse/modalities",
    "torchaudio": "mmfuse/modalities",
    "peft": "mmfuse/modalities",
    "webdataset": "mmfuse/data",
    "accelerate": "mmfuse/train/engines",
    "deepspeed": "mmfuse/train/engines",
}


def imported_modules(path: Path) -> set[str]:
    """Dotted names of all that a file imports, also inside functions; `from a import b` gives both a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{path}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


MODULES = {
    ".".join(path.relative_to(REPOSITORY).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((REPOSITORY / "mmfuse").rglob("*.py"))
}
ARROWS = {name: (imported_modules(path) & MODULES.keys()) - {name} for name, path in MODULES.items()}


def folder_of(module: str) -> str:
    """`mmfuse.train.run` -> `train`; the package itself and `python -m mmfuse` -> ``."""
    return [*module.split("."), ""][1].removeprefix("__main__")


def floor_of(folder: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if folder in floor)


def may_import(importer: str, imported: str) -> bool:
    """Whether the arrow between two folders points down, stays inside, or is the one that may go sideways."""
    above, below = floor_of(importer), floor_of(imported)
    inside = importer == imported or above == below == 0  # the files of the ground floor lie side by side
    return inside or above > below or (importer, imported) in SIDEWAYS


def test_every_module_has_a_floor() -> None:
    folders = {folder_of(module) for module in MODULES} - {""}
    assert folders == set().union(*FLOORS)


def test_imports_point_downwards() -> None:
    wrong = []
    for module, imported in ARROWS.items():
        importer = folder_of(module) or "cli"  # `python -m mmfuse` is the command line
        wrong += [
            f"{module} -> {name}" for name in imported if folder_of(name) and not may_import(importer, folder_of(name))
        ]
    assert not wrong


def test_data_and_model_meet_only_in_the_batch() -> None:
    model_side = {"model", "objectives", "task"}
    for module, imported in ARROWS.items():
        folders = {folder_of(name) for name in imported}
        assert folder_of(module) != "data" or not folders & model_side, module
        assert folder_of(module) not in model_side or "data" not in folders, module


def test_no_import_cycles() -> None:
    graph = graphlib.TopologicalSorter()
    for module, imported in ARROWS.items():
        graph.add(module, *imported)
    graph.prepare()  # raises with the cycle


@pytest.mark.parametrize(("library", "home"), ONLY_IN.items())
def test_a_heavy_library_stays_on_one_floor(library: str, home: str) -> None:
    users = {path for path in MODULES.values() if library in {name.split(".")[0] for name in imported_modules(path)}}
    strangers = [str(path) for path in users if not path.is_relative_to(REPOSITORY / home)]
    assert not strangers


def test_what_starts_mmfuse_imports_nothing_of_it() -> None:
    outside = [path for folder in ("launch", "cluster") for path in (REPOSITORY / folder).rglob("*.py")]
    assert not [str(path) for path in outside if any(name.startswith("mmfuse") for name in imported_modules(path))]
