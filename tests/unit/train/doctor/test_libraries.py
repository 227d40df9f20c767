"""Libraries that are missing, too old, or of another torch: each is named with what to install."""

from collections.abc import Iterable

import pytest

from mmfuse.train.doctor.finding import Finding
from mmfuse.train.doctor.libraries import (
    check_imports,
    check_python,
    check_ranges,
    check_trio,
    examine_modalities,
    examine_versions,
)

REQUIREMENTS = ("torch>=2.11", "accelerate<2,>=1.15", 's3fs>=2025.3; extra == "s3"', 'peft>=0.20; extra == "lora"')


def bad(findings: Iterable[Finding]) -> list[Finding]:
    return [finding for finding in findings if finding.status != "ok"]


def test_another_python_is_a_problem() -> None:
    assert check_python("3.10.4", required=">=3.11").status == "problem"
    assert check_python("3.12.0rc1", required=">=3.11").status == "ok"


def test_a_library_that_is_missing_or_out_of_range_is_a_problem_and_an_extra_only_a_warning() -> None:
    here = {"torch": "2.12.0.dev20261001+cpu", "accelerate": "2.0.1", "peft": "0.9"}
    accelerate, peft, others = check_ranges(REQUIREMENTS, find_version=here.get)
    assert accelerate[:3] == ("problem", "accelerate", "2.0.1, but <2,>=1.15 is needed")
    assert "pip install 'accelerate<2,>=1.15'" in accelerate.remedy
    assert peft[:2] == ("warning", "peft") and others == ("ok", "libraries", "1 within their ranges", "")
    torch, *_ = check_ranges(REQUIREMENTS, find_version={}.get)
    assert torch[:3] == ("problem", "torch", "not installed, but >=2.11 is needed")


@pytest.mark.parametrize(
    ("torch", "torchvision", "torchaudio", "wrong"),
    [
        ("2.11.0", "0.26.0", "2.11.0", []),
        ("2.12.1+cu130", "0.27.1+cu130", "2.12.0", []),
        ("2.11.0", "0.25.0", "2.11.0", ["torchvision"]),
        ("2.11.0", "0.26.0", "2.10.0", ["torchaudio"]),
        ("2.12.0", "0.26.0", "2.11.0", ["torchvision", "torchaudio"]),
        ("2.11.0+cu130", "0.26.0+cpu", "2.11.0+cu130", ["torchvision"]),
        ("2.11.0", None, None, []),
    ],
)
def test_torchvision_and_torchaudio_must_be_those_of_this_torch(
    torch: str, torchvision: str | None, torchaudio: str | None, wrong: list[str]
) -> None:
    found = bad(check_trio(torch, torchvision, torchaudio))
    assert [finding.subject for finding in found] == wrong
    assert all(finding.status == "problem" and f"'torch=={torch[:6]}'" in finding.remedy for finding in found)


def test_what_cannot_be_imported_is_told_with_its_reason() -> None:
    def fail() -> None:
        raise RuntimeError("operator torchvision::nms does not exist")

    broken, good = check_imports({"image": fail, "text": lambda: None})
    assert broken[:2] == ("problem", "image") and "RuntimeError: operator torchvision::nms" in broken.found
    assert good.status == "ok"


def test_the_environment_of_the_tests_is_right() -> None:
    assert not bad(examine_versions())
    modalities = list(examine_modalities())
    assert not bad(modalities) and [finding.subject for finding in modalities] == ["audio", "image", "text"]
