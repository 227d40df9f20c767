"""Whether Python and the libraries are those that mmfuse asks for, belong together, and can be imported.

Imports nothing that may itself be broken.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import metadata

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mmfuse.config import find_plugin, plugin_names
from mmfuse.train.doctor.finding import Finding

_INSTALL = "pip install -c constraints.txt -e . in the repository of mmfuse"


def find_version(name: str) -> str | None:
    """Of an installed package."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def check_python(version: str, *, required: str) -> Finding:
    """`required` as in pyproject.toml."""
    if SpecifierSet(required).contains(version, prereleases=True):
        return Finding("ok", "python", version)
    return Finding("problem", "python", f"{version}, but {required} is needed", "make an environment with that Python")


def check_ranges(
    requirements: Iterable[str], *, find_version: Callable[[str], str | None] = find_version
) -> Iterator[Finding]:
    """One finding for each library that is missing or out of its range, and one for all others.

    Args:
        requirements: as packages state them; those of extras count where they are installed, and only warn.
    """
    good = 0
    for requirement in map(Requirement, requirements):
        version = find_version(requirement.name)
        is_extra = requirement.marker is not None and not requirement.marker.evaluate({"extra": ""})
        if version is None and is_extra:
            continue
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            good += 1
            continue
        found = f"{version or 'not installed'}, but {requirement.specifier} is needed"
        wanted = f"{requirement.name}{requirement.specifier}"
        remedy = f"pip install '{wanted}', or {_INSTALL}"
        yield Finding("warning" if is_extra else "problem", requirement.name, found, remedy)
    yield Finding("ok", "libraries", f"{good} within their ranges")


def check_trio(torch: str, torchvision: str | None, torchaudio: str | None) -> Iterator[Finding]:
    """Whether torchvision and torchaudio were built for this torch.

    To torch 2.N belong torchvision 0.(N + 15) and torchaudio 2.N: their compiled parts call each other's, and those of
    another one fail at import, or later.
    """
    ours = Version(torch)
    expected = {"torchvision": f"0.{ours.minor + 15}", "torchaudio": f"{ours.major}.{ours.minor}"}
    for name, version in (("torchvision", torchvision), ("torchaudio", torchaudio)):
        if version is None:
            continue  # said among the ranges
        theirs = Version(version)
        remedy = f"install all three at once: pip install 'torch=={ours.public}' '{name}=={expected[name]}.*'"
        if f"{theirs.major}.{theirs.minor}" != expected[name]:
            found = f"{version} does not belong to torch {torch}, which needs {name} {expected[name]}"
            yield Finding("problem", name, found, remedy)
        elif ours.local and theirs.local and ours.local != theirs.local:
            found = f"{version} was built for other hardware than torch {torch}"
            yield Finding("problem", name, found, f"{remedy}, from one index")
        else:
            yield Finding("ok", name, f"{version} belongs to torch {torch}")


def check_imports(imports: Mapping[str, Callable[[], object]]) -> Iterator[Finding]:
    """Whether these functions, which import what a run needs, do."""
    for subject, load in imports.items():
        try:
            load()
        except Exception as error:  # broken libraries raise what they like
            found = f"cannot be imported: {type(error).__name__}: {error}"
            yield Finding("problem", subject, found, f"its libraries do not fit each other or this machine: {_INSTALL}")
        else:
            yield Finding("ok", subject, "can be imported")


def examine_versions() -> Iterator[Finding]:
    """Findings about what is installed here."""
    import platform

    try:
        requirements, required = metadata.requires("mmfuse") or [], metadata.metadata("mmfuse")["Requires-Python"]
    except metadata.PackageNotFoundError:
        yield Finding("warning", "libraries", "mmfuse was not installed by pip: its ranges are not known", _INSTALL)
        return
    yield check_python(platform.python_version(), required=required)
    yield from check_ranges(requirements)
    if torch := find_version("torch"):
        yield from check_trio(torch, find_version("torchvision"), find_version("torchaudio"))


def examine_modalities() -> Iterator[Finding]:
    """Whether every modality can be imported here, as a run will."""
    package = "mmfuse.modalities"
    yield from check_imports({name: lambda name=name: find_plugin(package, name) for name in plugin_names(package)})
