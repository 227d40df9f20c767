"""Makes the tars of the loader benchmark, and converts them for the peers that need a format of their own.

    python -m benchmarks.loader_data [--data FOLDER] [--peers-python PYTHON]

`pairs`: 8,192 samples of a 256 px JPEG (about 20 KB), a caption and a small JSON. `triples`: 1,280 samples of the same
JPEG, a caption and 5 to 10 s of 16 kHz FLAC. Pictures and sounds come from a seeded pool, captions are all different.
"""

import argparse
import io
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import soundfile
import xxhash
from PIL import Image, ImageDraw

from benchmarks.measure import DEFAULT_DATA, REPOSITORY, run_child

SETS = {"pairs": ("jpg", "txt", "json"), "triples": ("jpg", "txt", "flac")}
SAMPLES = {"pairs": 8192, "triples": 1280}
NUM_SHARDS = 16
POOL = 256
RATE = 16_000
SEED = 20


def draw_picture(rng: np.random.Generator) -> bytes:
    """A 256 px JPEG with the spectrum of a photograph and a few edges."""
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None, :]) + 1 / 256
    spectrum = np.exp(2j * np.pi * rng.random((3, *frequency.shape))) / frequency**1.7
    planes = np.fft.irfft2(spectrum, s=(256, 256))
    mixed = np.einsum("ij,jhw->hwi", np.eye(3) * 0.4 + 0.6, planes)  # colours of a photograph go together
    pixels = 128 + 55 * mixed / mixed.std()
    image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        corners = [tuple(point) for point in rng.integers(0, 256, (3, 2)).tolist()]
        draw.polygon(corners, fill=tuple(rng.integers(0, 256, 3).tolist()))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=88)
    return file.getvalue()


def speak(rng: np.random.Generator) -> bytes:
    """5 to 10 s of FLAC: syllables of a gliding voice with harmonics, breath noise, and pauses."""
    count = int(rng.uniform(5, 10) * RATE)
    time = np.arange(count) / RATE
    pitch = 110 * 2 ** (rng.uniform(0, 1) + 0.2 * np.sin(2 * np.pi * 0.7 * time + rng.uniform(0, 6)))
    phase = 2 * np.pi * np.cumsum(pitch) / RATE
    voice = sum(np.sin(harmonic * phase) / harmonic**1.3 for harmonic in range(1, 13))
    syllables = np.clip(np.sin(2 * np.pi * 3.5 * time + rng.uniform(0, 6)) + 0.4, 0, None)
    noise = rng.standard_normal(count)
    sound = 0.12 * syllables * (voice + 0.1 * noise) + 0.0005 * noise
    file = io.BytesIO()
    soundfile.write(file, np.clip(sound, -1, 1), RATE, format="FLAC", subtype="PCM_16")
    return file.getvalue()


def make_samples(name: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Key and members of every sample of a set, in order."""
    rng = np.random.default_rng([SEED, len(name)])
    pictures = [draw_picture(rng) for _ in range(POOL)]
    sounds = [speak(rng) for _ in range(POOL)] if "flac" in SETS[name] else [b""]
    for number in range(SAMPLES[name]):
        picture, sound = rng.integers(len(pictures)), rng.integers(len(sounds))
        key, caption = f"{number:06d}", f"Picture {picture} and sound {sound} are sample {number} of {name}."
        record = json.dumps({"key": key, "caption": caption, "width": 256, "height": 256, "status": "success"})
        known = {"jpg": pictures[picture], "txt": caption.encode(), "json": record.encode(), "flac": sounds[sound]}
        yield key, {extension: known[extension] for extension in SETS[name]}


def digest_sample(members: list[bytes]) -> int:
    """Of all members' bytes, in the order of the set's extensions; a set's checksum is the sum over its samples."""
    return xxhash.xxh3_64_intdigest(b"|".join(members))


def write_set(name: str, folder: Path) -> None:
    """Tars, and `manifest.json` with the count, the bytes and the checksum."""
    folder.mkdir(parents=True)
    per_shard = SAMPLES[name] // NUM_SHARDS
    samples = make_samples(name)
    total_bytes = checksum = 0
    for shard in range(NUM_SHARDS):
        path = folder / f"{shard:06d}.tar"
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for _ in range(per_shard):
                key, members = next(samples)
                for extension, data in members.items():
                    member = tarfile.TarInfo(f"{key}.{extension}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))
                total_bytes += sum(map(len, members.values()))
                checksum = (checksum + digest_sample(list(members.values()))) % 2**64
    manifest = {"samples": SAMPLES[name], "bytes": total_bytes, "checksum": checksum, "extensions": SETS[name]}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def prepare_energon(folder: Path, *, peers_python: str) -> None:
    """Energon's index and metadata beside the tars."""
    energon = Path(peers_python).with_name("energon")
    command = [energon, "prepare", folder, "--non-interactive", "--force-overwrite", "--split-ratio", "1,0,0"]
    subprocess.run([*command, "--sample-type", "CrudeWebdataset"], check=True, capture_output=True)


def make_all(data: Path, *, peers_python: str) -> None:
    """Makes what is not there yet."""
    for name in SETS:
        folder = data / name
        if not (folder / "manifest.json").is_file():
            write_set(name, folder)
        subprocess.run(
            [Path(sys.executable).with_name("mmfuse"), "shards", "index", folder], cwd=REPOSITORY, check=True
        )
        if not (folder / ".nv-meta").is_dir():
            prepare_energon(folder, peers_python=peers_python)
        for system in ("streaming", "litdata"):
            if not (data / f"{name}.{system}").is_dir():
                run_child(peers_python, "benchmarks.loader_convert", system, str(folder))


def main() -> None:
    """Makes what is not there yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DEFAULT_DATA)
    parser.add_argument("--peers-python", default=str(DEFAULT_DATA / "peers" / "bin" / "python"))
    arguments = parser.parse_args()
    make_all(arguments.data, peers_python=arguments.peers_python)


if __name__ == "__main__":
    main()
