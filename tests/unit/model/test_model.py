"""The model: encoders on present rows only, and embeddings that know nothing of the batch."""

import pytest
import torch
from batches import LETTERS, make_batch, make_samples, tiny_model

from mmfuse.model.model import FusionModel

PRESENCE = "tia ti t ia a - tia"


def build(**changes) -> FusionModel:
    torch.manual_seed(0)
    return FusionModel(tiny_model(**changes)).double()


def test_embeddings_are_unit_vectors_where_a_row_has_the_modality_and_zeros_elsewhere() -> None:
    batch = make_batch(PRESENCE)
    embeddings = build().embed(batch)
    assert set(embeddings) == {*LETTERS.values(), "fused"}
    present = {name: batch.present[:, column] for column, name in enumerate(batch.modalities)}
    present["fused"] = batch.present.any(1)
    for name, embedding in embeddings.items():
        assert embedding.shape == (7, 8)
        torch.testing.assert_close(embedding.norm(dim=1), present[name].double(), rtol=0, atol=1e-12)


def test_a_row_s_embeddings_do_not_depend_on_its_batch() -> None:
    model, samples = build(), make_samples(PRESENCE)
    together = model.embed(make_batch(samples))
    for row, sample in enumerate(samples):
        for name, embedding in model.embed(make_batch([sample])).items():
            torch.testing.assert_close(embedding[0], together[name][row], rtol=0, atol=1e-12)


def test_a_width_that_the_heads_cannot_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"width = 16 is not a multiple of fusion.num_heads = 3"):
        tiny_model(fusion={"num_heads": 3})


def test_embeddings_are_fp32_where_the_model_is_bf16() -> None:
    model = FusionModel(tiny_model()).to(torch.bfloat16)
    assert {x.dtype for x in model.embed(make_batch(PRESENCE)).values()} == {torch.float32}


@pytest.mark.parametrize("missing", ["text", "image", "audio"])
def test_an_encoder_without_rows_runs_once_on_its_cheapest_row_and_leaves_nothing_behind(missing: str) -> None:
    model, rows = build(), []
    letters = "".join(letter for letter, name in LETTERS.items() if name != missing)
    model.encoders[missing].register_forward_hook(lambda _, inputs, output: rows.append(len(output.tokens)))
    encoded = model.encode(make_batch(f"{letters} {letters}"))
    assert rows == [1]
    assert len(encoded.token_batch.tokens[missing]) == len(encoded.token_batch.rows[missing]) == 0
    assert not encoded.embeddings[missing].any()


def test_a_model_without_fusion_has_no_parameter_that_only_fusion_would_train() -> None:
    model = build(fusion=None)
    batch = make_batch(PRESENCE)
    sum(embedding.sum() for embedding in model.encode(batch).embeddings.values()).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert set(model.embed(batch)) == set(LETTERS.values())
