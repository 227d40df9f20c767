"""Which members are of which modality, without the seconds that importing the modalities takes."""

import ast
from importlib.util import find_spec
from pathlib import Path

from mmfuse.config import plugin_names
from mmfuse.data.recipe import MemberRule

_PACKAGE = "mmfuse.modalities"


def default_rules() -> dict[str, MemberRule]:
    """By modality, the extensions that its file reads when no recipe says otherwise."""
    return {name: MemberRule(extensions=_read_extensions(name)) for name in plugin_names(_PACKAGE)}


def _read_extensions(name: str) -> tuple[str, ...]:
    """The file's `EXTENSIONS`, read from its text: it must be written out, as `modalities/base.py` asks."""
    spec = find_spec(f"{_PACKAGE}.{name}")
    assert spec is not None and spec.origin is not None
    for node in ast.parse(Path(spec.origin).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "EXTENSIONS":
            return ast.literal_eval(node.value)
    raise AssertionError(f"{spec.origin} has no EXTENSIONS")
