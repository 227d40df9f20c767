"""Pictures and speech of the emoji sets, rendered once and kept under a name that hashes everything they depend on."""

import functools
import hashlib
import io
import multiprocessing
import os
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import soundfile
from PIL import Image
from tqdm import tqdm

RENDER_VERSION = "1"
"""Raised when the code below changes its output: it is part of every cached name."""

JPEG_QUALITY = 88
SAMPLE_RATE = 16_000
END_SILENCE_DB = -50.0
"""Whatever stays this far below the loudest sample counts as silence at the end of a clip."""
END_MARGIN_SECONDS = 0.05
VORBIS_COMPRESSION = 0.6
"""libsndfile's scale, 1 is the smallest file: a name costs about 7 kB, of which 3.7 kB are the headers."""
OGG_SERIAL = 1


@dataclass(frozen=True)
class Voice:
    """One synthetic speaker: an espeak-ng voice with its variant, speed and pitch."""

    voice: str
    words_per_minute: int
    pitch: int

    @property
    def label(self) -> str:
        """What the sample's JSON calls it."""
        return f"{self.voice} speed {self.words_per_minute} pitch {self.pitch}"


@dataclass(frozen=True)
class Picture:
    """One SVG document to draw on a white square."""

    svg: str
    pixels: int

    @property
    def extension(self) -> str:
        """Member of the sample that it becomes."""
        return "jpg"

    def render(self) -> bytes:
        """The JPEG."""
        return render_picture(self.svg, pixels=self.pixels)


@dataclass(frozen=True)
class Speech:
    """One text for one voice to speak."""

    text: str
    voice: Voice
    extension: str

    def render(self) -> bytes:
        """FLAC or Ogg Vorbis, as `extension` says."""
        return render_speech(self.text, voice=self.voice, extension=self.extension)


Rendering = Picture | Speech


def render_picture(svg: str, *, pixels: int) -> bytes:
    """JPEG of `svg` on white, `pixels` square, a drawing of another shape centred."""
    size = str(pixels)
    command = ["rsvg-convert", "--width", size, "--height", size, "--keep-aspect-ratio", "--background-color", "white"]
    png = subprocess.run(command, input=svg.encode(), capture_output=True, check=True).stdout
    drawing = Image.open(io.BytesIO(png)).convert("RGB")
    square = Image.new("RGB", (pixels, pixels), "white")
    square.paste(drawing, ((pixels - drawing.width) // 2, (pixels - drawing.height) // 2))
    jpeg = io.BytesIO()
    square.save(jpeg, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return jpeg.getvalue()


@functools.cache
def resampler(rate: int) -> Callable[[np.ndarray], np.ndarray]:
    """Function from a waveform at `rate` to one at `SAMPLE_RATE`."""
    import torch
    import torchaudio

    torch.set_num_threads(1)
    resample = torchaudio.transforms.Resample(
        rate, SAMPLE_RATE, resampling_method="sinc_interp_kaiser", lowpass_filter_width=64, rolloff=0.945
    )
    return lambda wave: resample(torch.from_numpy(wave)).numpy()


def trim_end(wave: np.ndarray) -> np.ndarray:
    """`wave` up to a little after its last audible sample."""
    threshold = np.abs(wave).max() * 10 ** (END_SILENCE_DB / 20)
    audible = np.flatnonzero(np.abs(wave) > threshold)
    return wave[: audible[-1] + 1 + round(END_MARGIN_SECONDS * SAMPLE_RATE)] if audible.size else wave


def render_speech(text: str, *, voice: Voice, extension: str) -> bytes:
    """`text` spoken by `voice`, mono at `SAMPLE_RATE`, encoded as `extension` says."""
    with tempfile.TemporaryDirectory(prefix="mmfuse-speech-") as folder:
        path = os.path.join(folder, "speech.wav")
        speed, pitch = str(voice.words_per_minute), str(voice.pitch)
        command = ["espeak-ng", "-v", voice.voice, "-s", speed, "-p", pitch, "-b", "1", "--stdin", "-w", path]
        subprocess.run(command, input=text.encode(), capture_output=True, check=True)
        wave, rate = soundfile.read(path, dtype="float32")
    wave = np.clip(trim_end(resampler(rate)(wave)), -1.0, 1.0)
    encoded = io.BytesIO()
    if extension == "flac":
        soundfile.write(encoded, wave, SAMPLE_RATE, format="FLAC", subtype="PCM_16", compression_level=1.0)
        return encoded.getvalue()
    soundfile.write(encoded, wave, SAMPLE_RATE, format="OGG", subtype="VORBIS", compression_level=VORBIS_COMPRESSION)
    return fix_ogg_serial(encoded.getvalue())


@functools.cache
def ogg_crc_table() -> tuple[int, ...]:
    """Table of Ogg's CRC-32 (RFC 3533): polynomial 04c11db7, not reflected, which `zlib.crc32` is."""
    table = []
    for byte in range(256):
        value = byte << 24
        for _ in range(8):
            value = (value << 1) ^ (0x104C11DB7 if value & 0x80000000 else 0)
        table.append(value)
    return tuple(table)


def fix_ogg_serial(stream: bytes) -> bytes:
    """`stream` with `OGG_SERIAL` on every page: libsndfile draws one from the clock, and two builds would differ."""
    table = ogg_crc_table()
    pages = bytearray(stream)
    start = 0
    while start < len(pages):
        if pages[start : start + 4] != b"OggS":
            raise ValueError(f"no Ogg page at byte {start} of {len(pages)}")
        segments = pages[start + 26]
        end = start + 27 + segments + sum(pages[start + 27 : start + 27 + segments])
        struct.pack_into("<I", pages, start + 14, OGG_SERIAL)
        struct.pack_into("<I", pages, start + 22, 0)
        crc = 0
        for byte in pages[start:end]:
            crc = (crc << 8) & 0xFFFFFFFF ^ table[(crc >> 24) ^ byte]
        struct.pack_into("<I", pages, start + 22, crc)
        start = end
    return bytes(pages)


def cached_path(rendering: Rendering, work: Path) -> Path:
    """Where `rendering` is kept: a name over all that decides its bytes, so nothing stale is ever found there."""
    settings = {
        "jpg": (JPEG_QUALITY,),
        "flac": (END_SILENCE_DB, END_MARGIN_SECONDS),
        "ogg": (END_SILENCE_DB, END_MARGIN_SECONDS, VORBIS_COMPRESSION),
    }[rendering.extension]
    content = repr((RENDER_VERSION, *settings, *astuple(rendering)))
    name = hashlib.sha256(content.encode()).hexdigest()
    return work / name[:2] / f"{name}.{rendering.extension}"


def render_to_cache(job: tuple[Rendering, Path]) -> None:
    """Render into the given file, whole or not at all."""
    rendering, path = job
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        partial.write_bytes(rendering.render())
        partial.replace(path)
    except subprocess.CalledProcessError as error:
        reason = error.stderr.decode(errors="replace").strip()
        raise RuntimeError(f"{error.cmd[0]} failed on {str(rendering)[:200]}: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)


def render_all(renderings: Iterable[Rendering], *, work: Path, num_processes: int) -> None:
    """Render what `work` does not hold yet; an interrupted call goes on where it stopped."""
    jobs = {cached_path(rendering, work): rendering for rendering in renderings}
    missing = [(rendering, path) for path, rendering in jobs.items() if not path.exists()]
    if not missing:
        return
    with multiprocessing.get_context("spawn").Pool(num_processes) as pool:
        done = pool.imap_unordered(render_to_cache, missing, chunksize=8)
        for _ in tqdm(done, total=len(missing), desc="pictures and speech", unit="file", smoothing=0.05):
            pass
