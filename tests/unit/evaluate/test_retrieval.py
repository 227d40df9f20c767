"""Retrieval scores against brute force, with ties, NaN and several right answers."""

import pytest
import torch
import torch.nn.functional as F
from batches import make_batch, tiny_task
from unit.objectives.ranks import WORLD_SIZES, result_alone, results_on_ranks

from mmfuse.evaluate.retrieval import (
    EmbeddedSet,
    EvaluationConfig,
    chance_recall,
    evaluate_retrieval,
    rank_of_right_answer,
)

EYE = torch.eye(40, dtype=torch.bool)


def unit_rows(count: int, *, seed: int, width: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(count, width, generator=generator), dim=-1)


def test_ranks_equal_a_count_by_hand_with_several_right_answers():
    queries, gallery = unit_rows(40, seed=0), unit_rows(90, seed=1)
    right = torch.rand(40, 90, generator=torch.Generator().manual_seed(2)) < 0.05
    right[:, 7] = True
    ranks = rank_of_right_answer(queries, gallery, right)
    for query in range(40):
        order = sorted(range(90), key=lambda item: -float(queries[query] @ gallery[item]))
        assert int(ranks[query]) == next(place for place, item in enumerate(order) if right[query, item])


def test_collapsed_embeddings_find_nothing():
    same = torch.ones(40, 6) / 6**0.5
    assert (rank_of_right_answer(same, same, EYE) == 39).all()


def test_a_nan_is_never_a_good_answer():
    queries, gallery = unit_rows(40, seed=0), unit_rows(40, seed=0)
    assert (rank_of_right_answer(queries, gallery, EYE) == 0).all()
    gallery[3] = torch.nan  # right for one, wrong for the others: ahead of all their answers
    ranks = rank_of_right_answer(queries, gallery, EYE)
    assert (ranks[torch.arange(40) != 3] == 1).all()
    assert ranks[3] == 39
    queries[5] = torch.nan
    assert rank_of_right_answer(queries, gallery, EYE)[5] == 39


@pytest.mark.parametrize("positives", [1, 3])
def test_chance_is_what_random_orders_score(positives):
    right = torch.zeros(200, 50, dtype=torch.bool)
    right[:, :positives] = True
    generator = torch.Generator().manual_seed(0)
    hits = [(torch.randperm(50, generator=generator)[:10] < positives).any().item() for _ in range(20_000)]
    assert chance_recall(right, 10) == pytest.approx(sum(hits) / len(hits), abs=0.01)
    if positives == 1:
        assert chance_recall(right, 10) == pytest.approx(10 / 50)


@pytest.mark.parametrize("size", [1, *WORLD_SIZES])
def test_every_rank_gets_the_whole_set_without_its_padding(size):
    everything = tiny_task().model.embed(make_batch("tia ti t ta ia tia i a tia"))
    recipe = "embed_evaluation_set"
    for result in (
        [result_alone(recipe)] if size == 1 else [ranks[recipe] for ranks in results_on_ranks("evaluation")[size]]
    ):
        for name in ("text", "image", "audio"):
            torch.testing.assert_close(result[name], everything[name], rtol=0, atol=1e-12)
            assert torch.equal(result[f"present {name}"], everything[name].any(1))
        assert result["group"].tolist() == list(range(100, 109))
        # A complete sample without its picture is what the same sample without a picture becomes.
        without_picture = tiny_task().model.embed(make_batch("ta ti t ta ia tia i a ta"))["fused"]
        for row in (0, 8):
            torch.testing.assert_close(result["without image"][row], without_picture[row], rtol=0, atol=1e-12)
        assert result["without image"].any(1).tolist() == [True, *[False] * 4, True, False, False, True]


def test_the_fusion_of_a_sample_s_others_looks_for_the_one_left_out():
    names, rows = ("text", "image", "audio"), unit_rows(4, seed=3)
    there = {
        "text": torch.ones(4).bool(),
        "image": torch.tensor([True, True, True, False]),
        "audio": torch.ones(4).bool(),
    }
    wrong = {name: unit_rows(4, seed=number) for number, name in enumerate(names)}
    without = {**wrong, "image": rows}
    embedded = EmbeddedSet({**wrong, "image": rows}, there, torch.arange(4), without)
    scores = evaluate_retrieval(embedded, EvaluationConfig(recall_at=(1,)))
    assert len(scores) == 6 + 3
    assert scores["text+audio->image"]["R@1"] == 1.0 > scores["text->image"]["R@1"]
    assert (scores["text+audio->image"]["queries"], scores["image+audio->text"]["gallery"]) == (3, 4)


def test_a_direction_counts_only_samples_that_have_both_ends():
    present = {"text": torch.tensor([True, True, False, True]), "image": torch.tensor([True, False, True, True])}
    rows = unit_rows(4, seed=3)
    embedded = EmbeddedSet({"text": rows, "image": rows}, present, torch.tensor([10, 11, 12, 10]))
    scores = evaluate_retrieval(embedded, EvaluationConfig(recall_at=(1,), num_examples=2))
    there, back = scores["text->image"], scores["image->text"]
    assert (there["queries"], there["gallery"]) == (2, 3)  # row 1 has no picture to find
    assert (back["queries"], back["gallery"]) == (2, 3)  # row 2 has no text to find
    assert there["R@1"] == back["R@1"] == 1.0
    assert there["chance R@1"] == pytest.approx(2 / 3)  # rows 0 and 3 are one group
    assert [example["query"] for example in there["examples"]] == [0, 3]
    assert there["examples"][0]["answers"][0] == 0
