"""Every rank goes forwards and back through the same modules, or ZeRO-3, which gathers each where it is used, stops."""

import itertools
from pathlib import Path

import pytest
from batches import ALL_OBJECTIVES, make_batch, tiny_task
from distributed.launches import (
    TOLERANCE,
    ZERO3,
    finish,
    read_losses,
    read_modalities,
    read_samples,
    start,
    write_run,
    write_sparse_shards,
)

PATTERNS = ("tia ti t ta ia i a -", "ia i a", "ta t a", "ti t i", "t t", "i -", "a", "- -")
"""What a rank may hold."""
SETS_OF_OBJECTIVES = [*(n for size in (1, 2) for n in itertools.combinations(ALL_OBJECTIVES, size)), ALL_OBJECTIVES]
SCARCE_TEXT = (("jpg", "txt", "ogg"), ("jpg",), ("jpg", "ogg"), ("ogg",), ("jpg", "ogg"))
STEPS = 6
LARGE_HEAD = ("model.embedding_dim=512", "model.modalities.text.hidden_size=256")
"""More than the 100,000 weights below which DeepSpeed keeps a parameter whole on every rank."""


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # of embeddings, whose input has no gradient
@pytest.mark.parametrize("objectives", SETS_OF_OBJECTIVES, ids="+".join)
def test_the_way_back_is_the_same_whatever_a_rank_lacks(objectives: tuple[str, ...]) -> None:
    task, calls = tiny_task(objectives), []
    for name, module in task.named_modules():
        if not list(module.children()) and list(module.parameters()) and name.startswith("model."):
            module.register_full_backward_pre_hook(lambda *_, name=name: calls.append(name))
    ways = []
    for pattern in PATTERNS:
        calls.clear()
        task(make_batch(pattern)).loss.backward()
        ways.append(list(calls))
    assert {"model.heads.text", "model.projections.audio", "model.fusion.norm"} <= set(ways[0])
    for pattern, way in zip(PATTERNS, ways, strict=True):
        assert way == ways[0], pattern


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", ZERO3])
def test_a_rank_without_any_text_hangs_nobody_where_the_text_head_is_large(tmp_path: Path, strategy: str) -> None:
    recipe = write_sparse_shards(tmp_path / "shards", kept=SCARCE_TEXT)
    run = write_run(tmp_path / "run.yaml", recipe, steps=STEPS)
    settings = (*LARGE_HEAD, "train.global_batch=4")
    alone, together = tmp_path / "alone", tmp_path / "together"
    finish(start("cpu", run, alone, settings=settings), alone)
    finish(start(strategy, run, together, settings=settings), together)
    assert read_losses(together) == pytest.approx(read_losses(alone), rel=TOLERANCE)
    present = read_modalities(recipe)
    halves = [(keys[:2], keys[2:]) for keys in read_samples(together).values()]
    has_text = [tuple(any("text" in present[key] for key in half) for half in pair) for pair in halves]
    assert {(True, False), (False, True)} & set(has_text), has_text
