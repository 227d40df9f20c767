"""What a mixture refuses."""

import pytest

from mmfuse.config import validate
from mmfuse.data.mixture import DataConfig
from mmfuse.errors import ConfigError


@pytest.mark.parametrize(
    ("train", "message"),
    [
        ([{"recipe": "a", "weight": 1}, {"recipe": "b"}], "every source of data.train a weight, or none"),
        ([{"recipe": "a"}, {"recipe": "a", "split": "train"}], "names one source twice"),
        ([{"recipe": "a", "weight": 0}], r"train.0.weight = 0: Input should be greater than 0"),
        ([], r"train = \[\]"),
    ],
)
def test_a_mixture_that_is_not_one_is_refused(train, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate(DataConfig, {"train": train}, source="test")
