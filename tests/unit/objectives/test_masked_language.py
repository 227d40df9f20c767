"""Masked language modelling: BERT's rates, what is never masked, and what the loss sees."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from batches import CLS, FIRST_WORD, SEP, make_batch, objective_configs, tiny_model, tiny_task
from transformers import BertForMaskedLM

from mmfuse.errors import ConfigError
from mmfuse.objectives.base import StepInputs
from mmfuse.objectives.masked_language import Config, MaskedLanguage
from mmfuse.types import FusionOutput, ModalityBatch

MASK, VOCABULARY = 4, 6368
CAPTIONS, LENGTH = 3500, 60


def build(ratio: float = 0.15) -> MaskedLanguage:
    return Config(mask_ratio=ratio).build(tiny_model(), seed=0)


def captions() -> tuple[ModalityBatch, torch.Tensor]:
    """Many captions of 10 to 60 tokens, [CLS] and [SEP] included, and their sample ids."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(10, LENGTH + 1, (CAPTIONS, 1), generator=generator)
    ids = torch.randint(FIRST_WORD, VOCABULARY, (CAPTIONS, LENGTH), generator=generator)
    position = torch.arange(LENGTH)
    ids = torch.where(position == 0, CLS, torch.where(position == lengths - 1, SEP, ids))
    ids = torch.where(position < lengths, ids, 0)
    part = ModalityBatch(torch.arange(CAPTIONS), {"input_ids": ids, "attention_mask": position < lengths})
    return part, torch.randint(1 << 50, (CAPTIONS,), generator=generator)


def test_rates_are_bert_s() -> None:
    part, sample_id = captions()
    ids = part.inputs["input_ids"]
    masked, targets = build()._mask(part, sample_id, 7)
    chosen, words = targets >= 0, ids >= FIRST_WORD
    assert words.sum() >= 100_000
    assert chosen.sum() / words.sum() == pytest.approx(0.15, abs=0.005)
    after, before = masked[chosen], ids[chosen]
    assert (after == MASK).double().mean() == pytest.approx(0.8, abs=0.015)
    assert (after == before).double().mean() == pytest.approx(0.1, abs=0.015)
    random = after[(after != MASK) & (after != before)]
    assert len(random) / len(after) == pytest.approx(0.1, abs=0.015)
    # Over the whole vocabulary: 99.99% of a chi-square with 7 degrees of freedom lie below 30.
    counts = torch.histc(random.float(), bins=8, min=0, max=VOCABULARY)
    assert ((counts - counts.mean()) ** 2 / counts.mean()).sum() < 30


def test_special_tokens_and_padding_are_never_touched_and_targets_are_what_was_there() -> None:
    part, sample_id = captions()
    ids = part.inputs["input_ids"]
    masked, targets = build(ratio=0.9)._mask(part, sample_id, 7)
    special = ids < FIRST_WORD
    assert torch.equal(masked[special], ids[special]) and (targets[special] == -1).all()
    assert torch.equal(targets[targets >= 0], ids[targets >= 0])
    assert torch.equal(masked[targets < 0], ids[targets < 0])
    # A word in padding, as no tokenizer gives it, would not be a target either.
    part.inputs["input_ids"] = torch.where(part.inputs["attention_mask"], ids, 77)
    assert (build(ratio=0.9)._mask(part, sample_id, 7)[1][~part.inputs["attention_mask"]] == -1).all()


def test_masks_follow_the_sample_into_any_row_beside_any_other_and_change_with_the_step() -> None:
    part, sample_id = captions()
    objective, order = build(), torch.tensor([17, 3, 999])
    masked, targets = objective._mask(part, sample_id, 7)
    longest = int(part.inputs["attention_mask"][order].sum(1).max())
    some = ModalityBatch(torch.arange(3), {name: x[order, :longest] for name, x in part.inputs.items()})
    for whole, again in zip((masked, targets), objective._mask(some, sample_id[order], 7), strict=True):
        assert torch.equal(again, whole[order, :longest])
    assert not torch.equal(objective._mask(part, sample_id, 8)[1], targets)


def step_inputs(presence: str) -> tuple[MaskedLanguage, StepInputs]:
    task = tiny_task(("masked_language",))
    batch = make_batch(presence)
    return task.objectives["masked_language"], StepInputs(task.model, batch, task.model.encode(batch), None)


def test_loss_is_the_mean_over_masked_words_of_the_fused_text() -> None:
    objective, inputs = step_inputs("tia t ti ta ia tia t")
    objective.mask_ratio = 0.5
    part = inputs.batch.inputs["text"]
    masked, targets = objective._mask(part, inputs.batch.sample_id[part.rows], inputs.batch.step)
    # The same in two steps: all of the batch encoded with masked words, and logits for every token.
    changed = replace(part, inputs={**part.inputs, "input_ids": masked})
    encoded = inputs.model.encode(replace(inputs.batch, inputs={**inputs.batch.inputs, "text": changed}))
    logits = objective.decoder(objective.transform(inputs.model.fuse(encoded.token_batch).tokens["text"]))
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
    assert (targets >= 0).sum() > 5
    torch.testing.assert_close(objective(inputs)["masked_language"].loss, expected)


def test_words_are_predicted_from_the_picture_of_their_own_sample_only() -> None:
    for presence, reached in (("tia tia", True), ("t i a t", False)):
        objective, inputs = step_inputs(presence)
        objective.mask_ratio = 0.9
        objective(inputs)["masked_language"].loss.backward()
        for name in ("image", "audio"):
            weight = inputs.model.projections[name].weight
            assert weight.grad is not None and bool(weight.grad.any()) is reached


@pytest.mark.parametrize(("presence", "ratio"), [("ia i a -", 0.5), ("t ti tia", 1e-9)])
def test_without_a_masked_word_the_loss_is_an_exact_zero_that_has_gradients(presence: str, ratio: float) -> None:
    objective, inputs = step_inputs(presence)
    objective.mask_ratio = ratio
    loss = objective(inputs)["masked_language"].loss
    assert loss.item() == 0.0
    loss.backward()
    used = [*objective.parameters(), *inputs.model.encoders["text"].parameters(), *inputs.model.fusion.parameters()]
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in used)


def test_a_model_without_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="text"):
        objective_configs(("masked_language",))["masked_language"].build(tiny_model("ia"), seed=0)


def test_without_a_fusion_the_loss_is_that_of_bert_for_masked_lm(monkeypatch: pytest.MonkeyPatch) -> None:
    objective, inputs = step_inputs("t t t t t t t t")
    encoder = inputs.model.encoders["text"]
    reference = BertForMaskedLM(encoder.bert.config).double().eval()
    reference.bert.load_state_dict(encoder.bert.state_dict())
    head = reference.cls.predictions
    objective.transform[0].load_state_dict(head.transform.dense.state_dict())
    objective.transform[2].load_state_dict(head.transform.LayerNorm.state_dict())
    objective.transform[2].eps = head.transform.LayerNorm.eps
    objective.decoder.load_state_dict(head.decoder.state_dict())
    inputs.model.projections["text"] = torch.nn.Identity()  # both are 16 wide here
    zeros = torch.zeros(0)
    monkeypatch.setattr(inputs.model, "fuse", lambda batch: FusionOutput(batch.tokens, zeros, zeros))

    part = inputs.batch.inputs["text"]
    masked, targets = objective._mask(part, inputs.batch.sample_id[part.rows], inputs.batch.step)
    labels = targets.masked_fill(targets < 0, -100)
    mask = part.inputs["attention_mask"].long()
    second = mask * (torch.arange(mask.shape[1]) >= part.inputs["second"][:, None])
    expected = reference(input_ids=masked, attention_mask=mask, token_type_ids=second, labels=labels).loss
    assert (targets >= 0).sum() > 2
    assert objective(inputs)["masked_language"].loss.item() == pytest.approx(expected.item(), rel=1e-12)
