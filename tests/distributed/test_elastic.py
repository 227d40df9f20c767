"""Twenty steps, a checkpoint, and twenty more under another strategy on another number of ranks: forty of one process.

`elastic.py` does all 90 pairs.
"""

import pytest
from distributed.elastic import PLACES, Elastic, Place
from distributed.launches import TOLERANCE, needs_compiler

ddp1, ddp2, ddp3, zero1, zero2_1, zero2, zero2_3, zero3_1, zero3, fsdp2 = PLACES
FEW = {ddp1: [ddp3, fsdp2], ddp3: [ddp1, fsdp2], fsdp2: [ddp1, ddp3]}
MANY = {
    zero2: [zero3, ddp3, fsdp2, zero1, zero2_3],
    zero3: [ddp2, zero2, fsdp2, zero3_1, zero2_1],
    fsdp2: [zero3, zero2_3, zero1, ddp2, zero3_1],
    zero2_3: [zero3, ddp1, fsdp2, zero2, zero1],
}
"""Origins by the place that goes on."""


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Elastic:
    return Elastic(tmp_path_factory.mktemp("elastic"))


@pytest.mark.parametrize("target", FEW, ids=str)
def test_a_checkpoint_goes_on_elsewhere_without_a_compiler(elastic: Elastic, target: Place) -> None:
    assert max(elastic.move(FEW[target], target).values()) <= TOLERANCE


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("target", MANY, ids=str)
def test_a_checkpoint_goes_on_under_any_other_strategy(elastic: Elastic, target: Place) -> None:
    assert max(elastic.move(MANY[target], target).values()) <= TOLERANCE
