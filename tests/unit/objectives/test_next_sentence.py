"""Next sentence: what is asked, and that it can be learned."""

import torch
from batches import CLS, SEP, make_batch, make_samples, tiny_task
from helpers import TINY_MODALITIES
from torch import Tensor

from mmfuse.objectives.next_sentence import NextSentence, _texts_by_row
from mmfuse.types import Batch, ModalityBatch, Sample

OPENING, CLOSING = 100, 200
"""Topic k is spoken of by the word OPENING + k in a first sentence and CLOSING + k in a second one."""


def topic_batch(count: int, *, topics: int, seed: int) -> Batch:
    """Texts of two sentences on one topic; those of a topic are a group."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for number in range(count):
        topic, extra = torch.randint(topics, (), generator=generator), torch.randint(3, (), generator=generator)
        filler = torch.randint(300, 6000, (int(extra),), generator=generator)
        first = torch.tensor([CLS, *filler.tolist(), OPENING + int(topic), SEP])
        text = {"input_ids": torch.cat([first, torch.tensor([CLOSING + int(topic), SEP])])}
        samples.append(Sample(number, int(topic), str(number), {"text": {**text, "second": torch.tensor(len(first))}}))
    return make_batch(samples, letters="t", step=seed)


def texts_asked(objective: NextSentence, batch: Batch) -> tuple[ModalityBatch, Tensor]:
    """What the model has to judge, and whether the second sentence is the text's own."""
    asked = objective.ask(batch)
    assert asked.part is not None
    return asked.part, asked.follows


def topics_of(part: ModalityBatch) -> tuple[Tensor, Tensor]:
    """Of the first and of the second sentence of each text."""
    ids, second, length = part.inputs["input_ids"], part.inputs["second"], part.inputs["attention_mask"].sum(1)
    row = torch.arange(len(ids))
    return ids[row, second - 2] - OPENING, ids[row, length - 2] - CLOSING


def test_half_of_the_second_sentences_are_those_of_other_groups() -> None:
    batch, objective = topic_batch(2000, topics=5, seed=1), NextSentence(8, 32, seed=3)
    part, follows = texts_asked(objective, batch)
    first, second = topics_of(part)
    assert torch.equal(first == second, follows)
    assert abs(float(follows.float().mean()) - 0.5) < 0.03
    drawn = torch.bincount(second[~follows], minlength=5) / (~follows).sum()
    assert (drawn - 0.2).abs().max() < 0.04


def test_what_follows_is_the_text_itself_and_what_is_cut_still_ends() -> None:
    batch = topic_batch(64, topics=4, seed=2)
    whole, follows = texts_asked(NextSentence(8, 32, seed=3), batch)
    own = batch.inputs["text"].inputs
    assert follows.any() and not follows.all()
    for row in follows.nonzero()[:, 0].tolist():
        length = int(own["attention_mask"][row].sum())
        assert whole.inputs["input_ids"][row, :length].tolist() == own["input_ids"][row, :length].tolist()
        assert int(whole.inputs["attention_mask"][row].sum()) == length
    short, _ = texts_asked(NextSentence(8, 6, seed=3), batch)
    lengths = short.inputs["attention_mask"].sum(1)
    assert lengths.max() == 6 and lengths.min() < 6
    assert (short.inputs["input_ids"][torch.arange(64), lengths - 1] == SEP).all()


def test_texts_of_one_sentence_and_lonely_pairs_are_no_question() -> None:
    batch = make_batch(make_samples("t t t t ia t"))
    single = [number for number in range(6) if not _texts_by_row(batch).is_pair[number]]
    assert single == [0, 3, 4]
    part, follows = texts_asked(NextSentence(8, 32, seed=3), batch)
    assert part.rows.tolist() == [1, 2, 5] and len(follows) == 3
    alone, follows = texts_asked(NextSentence(8, 32, seed=3), make_batch(make_samples("t t")))
    assert alone.rows.tolist() == [1] and follows.tolist() == [True]


def test_it_learns_which_sentences_go_together() -> None:
    text = {**TINY_MODALITIES["text"], "num_layers": 2, "hidden_size": 32}
    task = tiny_task(["next_sentence"], fusion=None, modalities={"text": text}).float()
    optimizer = torch.optim.AdamW(task.parameters(), lr=3e-3)
    for step in range(200):
        optimizer.zero_grad()
        task(topic_batch(64, topics=2, seed=100 + step)).loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert task(topic_batch(256, topics=2, seed=9)).loss < 0.1  # 0.69 for who cannot tell
