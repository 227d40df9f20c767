"""Which of several captions a sample goes by."""

import json
from collections import Counter

import pytest

from mmfuse.config import validate
from mmfuse.data.captions import choose_caption, order_by_weight
from mmfuse.data.recipe import MemberRule
from mmfuse.errors import ConfigError, SampleError
from mmfuse.modalities.media.sentences import BETWEEN_SENTENCES

LINES = MemberRule(extensions=("txt",), captions="lines")


def json_rule(keys: object) -> MemberRule:
    return validate(MemberRule, {"extensions": ["json"], "captions": {"keys": keys}}, source="test")


def test_training_draws_lines_and_evaluation_takes_the_first() -> None:
    data = b"one\r\n\n  \ntwo\nthree"
    drawn = [choose_caption(data, LINES, seed=seed) for seed in range(60)]
    assert set(drawn) == {b"one", b"two", b"three"}
    assert [choose_caption(data, LINES, seed=seed) for seed in range(60)] == drawn
    assert choose_caption(data, LINES, seed=None) == b"one"
    assert choose_caption(data, MemberRule(extensions=("txt",)), seed=3) == data


def test_a_text_is_two_sentences_that_follow_each_other_or_the_only_one() -> None:
    rule = MemberRule(extensions=("txt",), captions="sentences")
    drawn = {choose_caption(b"one\n\ntwo\nthree\n", rule, seed=seed) for seed in range(60)}
    assert drawn == {b"one" + BETWEEN_SENTENCES + b"two", b"two" + BETWEEN_SENTENCES + b"three"}
    assert choose_caption(b"one\n\ntwo\nthree\n", rule, seed=None) == b"one" + BETWEEN_SENTENCES + b"two"
    assert choose_caption(b"\none \n", rule, seed=4) == b"one "


def test_fields_of_json_are_drawn_by_their_weights_among_those_that_are_there() -> None:
    rule = json_rule({"alt": 1, "caption": 3, "meta.title": 4, "missing": 100})
    data = json.dumps({"alt": "a", "caption": ["c", "d", ""], "meta": {"title": "t"}, "other": "o"}).encode()
    drawn = Counter(choose_caption(data, rule, seed=seed) for seed in range(8000))
    assert {text: round(count / 1000, 1) for text, count in drawn.items()} == pytest.approx(
        {b"a": 1.0, b"c": 1.5, b"d": 1.5, b"t": 4.0}, abs=0.15
    )
    assert choose_caption(data, rule, seed=None) == b"a"


def test_a_list_of_fields_weighs_them_equally() -> None:
    drawn = Counter(choose_caption(b'{"a": "x", "b": "y"}', json_rule(["a", "b"]), seed=s) for s in range(2000))
    assert drawn[b"x"] == pytest.approx(1000, abs=100)


def test_members_are_ordered_by_weighted_draws() -> None:
    first = Counter(order_by_weight({"txt": 1.0, "long.txt": 3.0}, seed=seed)[0] for seed in range(2000))
    assert first["long.txt"] == pytest.approx(1500, abs=80)


@pytest.mark.parametrize(
    ("data", "rule", "message"),
    [
        (b" \n\n", LINES, "no caption in any line"),
        (b"{", json_rule(["a"]), "not JSON"),
        (b"[" * 10**6, json_rule(["a"]), "not JSON"),
        (b'{"a": 3, "b": " "}', json_rule(["a", "b.c"]), "no caption in any of the fields a, b.c"),
        (b"[1]", json_rule(["a"]), "no caption in any of the fields a"),
    ],
)
@pytest.mark.parametrize("seed", [None, 0])
def test_a_member_without_a_caption_is_bad(data: bytes, rule: MemberRule, message: str, seed: int | None) -> None:
    with pytest.raises(SampleError, match=message):
        choose_caption(data, rule, seed=seed)


def test_a_weight_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"keys.a = 0: Input should be greater than 0"):
        json_rule({"a": 0})
