"""CPU microseconds that a sample's members take from bytes to tensors, beside the bare calls that decode them.

    python -m benchmarks.decode [--repeats 7] [--members 48] [--only TEXT] [--json FILE]

One thread. Every repeat times every row once, one after the other, so that a busy machine slows all of them; the table
shows the medians. Evaluation has no augmentation, training that of the defaults, `everything` all there is.
"""

import argparse
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from PIL import Image

from benchmarks.loader_data import draw_picture, speak
from benchmarks.measure import current_commit, describe_machine, read_clock, summarise, write_section
from mmfuse.modalities import audio, image, text
from mmfuse.modalities.base import ModalityConfig

CLIPS = {2.56: audio.Config(), 10.24: audio.Config(clip_seconds=10.24, num_mel_bins=128, patch_size=16)}
EVERYTHING = {
    "image": image.AugmentConfig(rand_augment_magnitude=9, erase=0.3),
    "audio": audio.AugmentConfig(gain_db=6, noise_snr_db=(10, 40), num_time_masks=2, num_frequency_masks=2),
    "text": text.AugmentConfig(drop_probability=0.1),
}


class Row(NamedTuple):
    """One line of the table."""

    name: str
    bare: str
    """Name of the row that does the bare decoding of the same members; its own where it is that."""
    members: list[bytes]
    process: Callable[[bytes, int], object]
    """Of the bytes and a seed."""


def draw_large_picture(rng: np.random.Generator) -> bytes:
    """A 1024 px JPEG: 16 pictures of 256 px."""
    canvas = Image.new("RGB", (1024, 1024))
    for place in range(16):
        tile = Image.open(io.BytesIO(draw_picture(rng)))
        canvas.paste(tile, (place % 4 * 256, place // 4 * 256))
    file = io.BytesIO()
    canvas.save(file, "JPEG", quality=88)
    return file.getvalue()


def write_caption(rng: np.random.Generator) -> bytes:
    """5 to 20 words."""
    words = "a red apple on the wooden table beside two small green pears under blue morning light of an old house"
    return " ".join(rng.choice(words.split(), rng.integers(5, 21))).encode()


def rows_of(name: str, config: ModalityConfig, members: list[bytes], bare: Row) -> Iterator[Row]:
    """Evaluation, training and training with everything of one processor."""
    modality = name.split()[0]
    processor = config.build_processor()
    loud = config.model_copy(update={"augment": EVERYTHING[modality]}).build_processor()
    yield Row(f"{name}, evaluation", bare.name, members, lambda data, seed: processor(data, seed=None))
    yield Row(f"{name}, training", bare.name, members, lambda data, seed: processor(data, seed=seed))
    yield Row(f"{name}, everything", bare.name, members, lambda data, seed: loud(data, seed=seed))


def read_picture(data: bytes, seed: int) -> object:
    """The bare decoding of a picture."""
    return Image.open(io.BytesIO(data)).convert("RGB")


def read_sound(data: bytes, seconds: float) -> object:
    """The bare decoding of the first seconds of a sound."""
    with soundfile.SoundFile(io.BytesIO(data)) as sound:
        return sound.read(int(seconds * sound.samplerate), dtype="float32")


def make_rows(num_members: int) -> list[Row]:
    """All lines of the table, the bare calls before what is made of them."""
    rng = np.random.default_rng(0)
    pools = {256: [draw_picture(rng) for _ in range(num_members)]}
    pools[1024] = [draw_large_picture(rng) for _ in range(4)]
    sounds, captions = [speak(rng) for _ in range(num_members)], [write_caption(rng) for _ in range(num_members)]
    rows: list[Row] = []
    for pixels, sizes in ((256, (96, 224)), (1024, (224,))):
        rows.append(Row(f"PIL, {pixels} px", f"PIL, {pixels} px", pools[pixels], read_picture))
        bare = rows[-1]
        for size in sizes:
            rows += rows_of(f"image {size} of {pixels} px", image.Config(image_size=size), pools[pixels], bare)
    for seconds, config in CLIPS.items():
        name = f"soundfile, {seconds} s"
        rows.append(Row(name, name, sounds, lambda data, seed, seconds=seconds: read_sound(data, seconds)))
        rows += rows_of(f"audio {seconds} s", config, sounds, rows[-1])
    tokenizer = text.Config().build_tokenizer()
    rows.append(
        Row(
            "tokenizer",
            "tokenizer",
            captions,
            lambda data, seed: tokenizer(data.decode(), truncation=True, max_length=32),
        )
    )
    rows += rows_of("text", text.Config(), captions, rows[-1])
    return rows


def time_row(row: Row, repeat: int) -> float:
    """CPU microseconds per member."""
    before = read_clock()
    for number, data in enumerate(row.members):
        row.process(data, repeat * len(row.members) + number)
    return read_clock().since(before).cpu_seconds / len(row.members) * 1e6


def measure(rows: list[Row], repeats: int) -> dict[str, list[float]]:
    """Microseconds of every repeat by row, after one that is not counted."""
    times: dict[str, list[float]] = {row.name: [] for row in rows}
    for repeat in range(repeats + 1):
        for row in rows:
            taken = time_row(row, repeat)
            if repeat:
                times[row.name].append(taken)
    return times


def report(rows: list[Row], times: dict[str, list[float]], arguments: argparse.Namespace) -> str:
    """The section of RESULTS.md."""
    machine = describe_machine(("torch", "torchaudio", "torchvision", "pillow", "soundfile", "transformers"))
    lines = [
        "## From bytes to tensors",
        "",
        f"`python -m benchmarks.decode --repeats {arguments.repeats}` at commit {current_commit()}: {machine}.",
        "",
        "CPU microseconds a member in one thread, medians (lowest to highest), and as a multiple of the bare call that "
        "decodes it. Evaluation resizes and crops, or computes the filter bank; training adds the default "
        "augmentation, `everything` all there is. Sounds are FLAC of 5 to 10 s.",
        "",
        "| | us | of the bare call |",
        "|---|---|---|",
    ]
    for row in rows:
        found, bare = summarise(times[row.name]), summarise(times[row.bare])
        low_to_high = f"{found.low:,.0f} to {found.high:,.0f}"
        lines.append(f"| {row.name} | {found.median:,.0f} ({low_to_high}) | {found.median / bare.median:.2f} |")
    return "\n".join(lines)


def main() -> None:
    """Measures, prints, and writes the section of RESULTS.md where all rows were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7, help="at least 5")
    parser.add_argument("--members", type=int, default=48, help="different pictures, sounds and captions")
    parser.add_argument("--only", default="", help="rows whose bare call has this in its name")
    parser.add_argument("--json", type=Path, help="also write every repeat there")
    arguments = parser.parse_args()
    if arguments.repeats < 5 or arguments.members < 1:
        parser.error("medians need at least 5 repeats, of at least 1 member")
    torch.set_num_threads(1)
    rows = [row for row in make_rows(arguments.members) if arguments.only in row.bare]
    times = measure(rows, arguments.repeats)
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": describe_machine(), "microseconds": times}, indent=1))
    text = report(rows, times, arguments)
    print(text)
    if not arguments.only:
        write_section("decode", text)


if __name__ == "__main__":
    main()
