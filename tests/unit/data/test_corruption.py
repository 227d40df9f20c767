"""The corruption matrix: what becomes of damaged and hostile data. Each line is a kind of damage and its named outcome:

- refused: no index, a ShardError with the shard's name and what to do, and a run on the data set does not start;
- good: read as it should be, or passed over because nothing in it is a member of a sample;
- bad member: read, and refused by the decoder with a SampleError; everything around it is good.
"""

import gzip
import io
import os
import socket
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from damage import (
    change,
    deadline,
    find_members,
    flac_of_hours,
    huge_png,
    rechecked,
    tar_bytes,
    wav_bytes,
    wav_that_claims,
)
from helpers import ALL, EXTENSION, index_folder, picture_bytes, sample_members, write_yaml

from mmfuse.data.mixture import SourceConfig, open_source
from mmfuse.data.shard_index import build_index
from mmfuse.data.source import Source
from mmfuse.errors import DataError, SampleError, ShardError
from mmfuse.modalities import audio, image, text

MEMBERS = {name: data for number in (1, 2, 3) for name, data in sample_members(number).items()}
TAR = tar_bytes(MEMBERS)
AT = find_members(TAR)
END = -(-AT["0003.ogg"].end // 512) * 512
"""Where the end-of-archive blocks begin."""
NEIGHBOUR = sample_members(7)
PROCESSORS = {
    "image": image.Config().build_processor(),
    "text": text.Config().build_processor(),
    "audio": audio.Config().build_processor(),
}


def open_folder(folder: Path) -> Source:
    recipe = write_yaml(folder / "recipe.yaml", {"name": "made", "splits": {"train": {"shards": ["*.tar"]}}})
    return open_source(SourceConfig(recipe=str(recipe)), modalities=ALL)


def read_folder(folder: Path) -> list[tuple[str, dict[str, bytes]]]:
    """`(key, {extension: bytes})` of every sample, as a run reads it."""
    source = open_folder(folder)
    raws = [source.read(number) for number in range(len(source))]
    return [(raw.key, dict(raw.members.values())) for raw in raws]


def by_key(members: dict[str, bytes]) -> list[tuple[str, dict[str, bytes]]]:
    """What `read_folder` gives for members named `KEY.EXTENSION`, whose keys have no dot."""
    samples: dict[str, dict[str, bytes]] = {}
    for name, data in members.items():
        key, _, extension = name.rpartition(".")
        samples.setdefault(key, {})[extension] = data
    return list(samples.items())


def special_member(kind: bytes, *, linkname: str = "") -> bytes:
    """A good tar with a member of this type in its middle."""
    info = tarfile.TarInfo("0002.txt")
    info.type, info.linkname = kind, linkname
    head = info.tobuf(tarfile.USTAR_FORMAT)
    start = AT["0002.txt"].start
    return TAR[:start] + head + TAR[start:]


def flip(data: bytes, position: int, bit: int = 0) -> bytes:
    return change(data, position, bytes([data[position] ^ 1 << bit]))


def sorted_by_extension(members: dict[str, bytes]) -> list[tuple[str, bytes]]:
    return sorted(members.items(), key=lambda member: member[0].rpartition(".")[2])


CUT, DAMAGED = r"cut off.*copy or build", r"damaged header at byte \d+; copy or build"
REFUSED = {
    "empty file": (b"", CUT),
    "truncated in the first header": (TAR[:300], CUT),
    "truncated in a header": (TAR[: AT["0002.txt"].header + 100], CUT),
    "truncated behind a header": (TAR[: AT["0002.txt"].payload], CUT),
    "truncated in a payload": (TAR[: AT["0002.jpg"].payload + 10], CUT),
    "truncated in padding": (TAR[: AT["0002.txt"].end + 5], CUT),
    "truncated behind a member": (TAR[: AT["0002.jpg"].header], CUT),
    "truncated before the end blocks": (TAR[:END], CUT),
    "truncated between the end blocks": (TAR[: END + 512], CUT),
    "truncated in the second end block": (TAR[: END + 1000], CUT),
    "zeroed header": (change(TAR, AT["0002.txt"].header, bytes(512)), "zeroed header at byte .*copy or build"),
    "zeroed as a whole": (bytes(len(TAR) + 10_240), "nothing but .* zeros.*copy it again"),
    "flipped bit in a name": (flip(TAR, AT["0002.txt"].header), DAMAGED),
    "flipped bit in a size": (flip(TAR, AT["0002.txt"].header + 134), DAMAGED),
    "flipped bit in a checksum": (flip(TAR, AT["0002.txt"].header + 150), DAMAGED),
    "flipped bit in a type": (flip(TAR, AT["0002.txt"].header + 156), DAMAGED),
    "a block lost in a payload": (TAR[: AT["0002.jpg"].payload] + TAR[AT["0002.jpg"].payload + 512 :], DAMAGED),
    "two tars in one file": (TAR * 2, "zeroed header at byte .*copy or build"),
    "a member twice": (tar_bytes([*MEMBERS.items(), ("0003.txt", b"x")]), "more than one member .txt; build"),
    "a key twice": (tar_bytes([*MEMBERS.items(), ("0001.txt", b"x")]), "not next to each other; build .*sorted"),
    "members not adjacent": (tar_bytes(sorted_by_extension(MEMBERS)), "not next to each other; build .*sorted"),
    "gzip": (gzip.compress(TAR), "compressed with gzip.*unpack it first"),
    "a pickle": (tar_bytes(MEMBERS | {"0003.pkl": b"cposix\nsystem\n"}), "pickles run code.*store arrays as"),
    "a pickle behind a dot": (tar_bytes(MEMBERS | {"0003.meta.PyD": b"x"}), "pickles run code.*store arrays as"),
    "a FIFO": (special_member(tarfile.FIFOTYPE), "link or a special file .*build this shard again"),
    "a device": (special_member(tarfile.CHRTYPE), "link or a special file .*build this shard again"),
    "a symbolic link": (special_member(tarfile.SYMTYPE, linkname="/etc/passwd"), "link or a special file .*build"),
    "a hard link": (special_member(tarfile.LNKTYPE, linkname="0001.txt"), "link or a special file .*build"),
    "a size beyond the file": (
        change(TAR, AT["0003.ogg"].header, rechecked(change(TAR[AT["0003.ogg"].header :][:512], 124, b"77777777777"))),
        CUT,
    ),
    "no tar": (picture_bytes(1, size=400), DAMAGED),
    "no samples": (tar_bytes({"README": b"x", "a/.hidden": b"x"}), "no member named KEY.EXTENSION"),
}


@pytest.mark.parametrize(("content", "message"), REFUSED.values(), ids=REFUSED)
def test_a_damaged_shard_is_refused_with_what_to_do_and_no_run_goes_on_without_it(
    tmp_path: Path, content: bytes, message: str
) -> None:
    for name, data in {"0.tar": tar_bytes(NEIGHBOUR), "1.tar": content, "2.tar": tar_bytes(NEIGHBOUR)}.items():
        (tmp_path / name).write_bytes(data)
    with deadline(10):
        errors = [result.outcome for result in index_folder(tmp_path) if isinstance(result.outcome, Exception)]
    assert [type(error) for error in errors] == [ShardError]
    with pytest.raises(ShardError, match=message):
        raise errors[0]
    assert str(tmp_path / "1.tar") in str(errors[0])
    with pytest.raises(DataError, match=r"1.tar: not indexed"):
        open_folder(tmp_path)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (os.mkfifo, "is a FIFO.*not a tar"),
        (make_socket, "is a FIFO, a socket.*not a tar"),
        (Path.mkdir, "is a directory"),
    ],
    ids=["FIFO", "socket", "directory"],
)
def test_what_is_no_file_is_refused_and_not_waited_for(
    tmp_path: Path, monkeypatch, make: Callable[[Path], None], message: str
) -> None:
    monkeypatch.chdir(tmp_path)  # a socket's name has at most 108 bytes
    make(Path("x.tar"))
    with deadline(5), pytest.raises(ShardError, match=rf"x.tar: {message}"):
        build_index(Path("x.tar"), Path("x.idx"))
    assert not Path("x.idx").exists()


LONG = "folder/" * 40 + "é" * 60
ONE, TWO = sample_members(1), sample_members(2)
GOOD: dict[str, tuple[bytes, list[tuple[str, dict[str, bytes]]]]] = {
    "whole": (TAR, by_key(MEMBERS)),
    "flipped bit in a payload": (
        flip(TAR, AT["0002.txt"].payload + 3),
        by_key(MEMBERS | {"0002.txt": flip(MEMBERS["0002.txt"], 3)}),
    ),
    "flipped bit in padding": (flip(TAR, AT["0002.txt"].end + 3), by_key(MEMBERS)),
    "end blocks alone": (TAR[: END + 1024], by_key(MEMBERS)),
    "empty tar": (tar_bytes({}), []),
    "PAX long names": (tar_bytes({LONG + ".jpg": b"x"}, tar_format=tarfile.PAX_FORMAT), [(LONG, {"jpg": b"x"})]),
    "GNU long names": (tar_bytes({LONG + ".jpg": b"x"}, tar_format=tarfile.GNU_FORMAT), [(LONG, {"jpg": b"x"})]),
    "a directory": (special_member(tarfile.DIRTYPE), by_key(MEMBERS)),
    # Harmless: reading writes no files, so a key is a label; refusing them would refuse `tar -P` and `tar ../images`.
    "absolute and .. names": (
        tar_bytes({"/etc/passwd.txt": b"a", "../../up.txt": b"b", "up.txt": b"c"}),
        [("/etc/passwd", {"txt": b"a"}), ("../../up", {"txt": b"b"}), ("up", {"txt": b"c"})],
    ),
    # Never run, never read: no modality has such an extension. The sample stays, with what else it has.
    "shell members": (
        tar_bytes({"0001.jpg": b"x", "0001.sh": b"touch /tmp/owned", "0002.sh": b"rm -rf ~"}),
        [("0001", {"jpg": b"x"}), ("0002", {})],
    ),
    "dotted keys": (
        tar_bytes({"0001.v2.jpg": b"x", "0001.v2.txt": b"y", "0002.jpg": b"z"}),
        [("0001", {}), ("0002", {"jpg": b"z"})],
    ),
    "files beside samples": (tar_bytes(ONE | {"README": b"x", "._0002.jpg": b"x"} | TWO), by_key(ONE | TWO)),
    "same name in two folders": (
        tar_bytes({"a/1.txt": b"a", "b/1.txt": b"b"}),
        [("a/1", {"txt": b"a"}), ("b/1", {"txt": b"b"})],
    ),
    "members of 0 bytes": (tar_bytes({"1.txt": b"", "2.jpg": b""}), [("1", {"txt": b""}), ("2", {"jpg": b""})]),
}


@pytest.mark.parametrize(("content", "expected"), GOOD.values(), ids=GOOD)
def test_what_can_be_read_is_read_byte_for_byte_and_nothing_is_written(
    tmp_path: Path, content: bytes, expected: list[tuple[str, dict[str, bytes]]]
) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "0.tar").write_bytes(content)
    (folder / "1.tar").write_bytes(tar_bytes(NEIGHBOUR))
    index_folder(folder)
    before = set(folder.rglob("*"))
    assert read_folder(folder) == expected + by_key(NEIGHBOUR)
    assert set(folder.rglob("*")) - before == {folder / "recipe.yaml"}
    assert os.listdir(tmp_path) == ["set"]


def test_keys_with_dots_alone_are_told_where_an_extension_begins(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(tar_bytes({"img.0001.jpg": b"x", "img.0002.jpg": b"y"}))
    index_folder(tmp_path)
    with pytest.raises(DataError, match=r"no sample has a member .*an extension begins at the first dot"):
        open_folder(tmp_path)


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["base-256", "pax"])
def test_samples_behind_a_member_of_9_gib_are_read(tmp_path: Path, tar_format: int) -> None:
    big = tarfile.TarInfo("0001.npy")
    big.size = 9 << 30
    with open(tmp_path / "0.tar", "wb") as file:  # a hole, which takes no disk
        file.write(big.tobuf(tar_format))
        file.seek(big.size, io.SEEK_CUR)
        file.write(TAR[AT["0002.jpg"].start :])
    index_folder(tmp_path)
    assert read_folder(tmp_path) == [("0001", {}), *by_key(MEMBERS)[1:]]


PICTURE = picture_bytes(2, size=200)
BAD_MEMBERS = {
    "200 megapixels": ("0002.png", huge_png(20_000, 10_000), "exceeds"),
    "a picture of one row": ("0002.png", huge_png(60_000, 1), "too thin"),
    "half a picture": ("0002.jpg", PICTURE[: len(PICTURE) // 2], "not a readable JPEG"),
    "a web page for a picture": ("0002.jpg", b"<html>404 Not Found</html>", "not a readable JPEG"),
    "a pickle for a picture": ("0002.jpg", b"cposix\nsystem\n(S'true'\ntR.", "not a readable JPEG"),
    "no bytes for a picture": ("0002.jpg", b"", "not a readable JPEG"),
    "10 hours of silence": ("0002.flac", flac_of_hours(10), "36000 s exceeds max_seconds"),
    "a sound of NaN": ("0002.wav", wav_bytes(np.full(16_000, np.nan, np.float32)), "not finite"),
    "a sound of infinity": ("0002.wav", wav_bytes(np.full(16_000, np.inf, np.float32)), "not finite"),
    "no sound": ("0002.ogg", b"\x7fELF" * 200, "not a readable WAV"),
    "a sound of no length": ("0002.wav", wav_bytes(np.zeros(0, np.float32)), "empty|shorter"),
    "not UTF-8": ("0002.txt", "é".encode("latin-1"), "not UTF-8"),
    "no text": ("0002.txt", b" \n", "empty"),
}


@pytest.mark.parametrize(("name", "data", "message"), BAD_MEMBERS.values(), ids=BAD_MEMBERS)
def test_a_bad_member_is_named_by_its_decoder_and_all_others_are_good(
    tmp_path: Path, name: str, data: bytes, message: str
) -> None:
    modality = next(
        m for m, module in (("image", image), ("text", text), ("audio", audio)) if name[5:] in module.EXTENSIONS
    )
    members = {(name if n == f"0002.{EXTENSION[modality]}" else n): d for n, d in MEMBERS.items()} | {name: data}
    (tmp_path / "0.tar").write_bytes(tar_bytes(members))
    index_folder(tmp_path)
    source = open_folder(tmp_path)
    outcomes: dict[tuple[str, str], str] = {}
    for number in range(len(source)):
        raw = source.read(number)
        for m, (_, content) in raw.members.items():
            outcomes[raw.key, m] = decode(m, content)
    assert len(outcomes) == len(members)
    assert {place for place, outcome in outcomes.items() if outcome != "good"} == {("0002", modality)}
    with pytest.raises(SampleError, match=message):
        PROCESSORS[modality](data, seed=None)


def test_a_wav_header_that_claims_10_hours_gives_the_second_that_is_there() -> None:
    data = wav_that_claims(hours=10, seconds=1)
    with deadline(5):
        frames = PROCESSORS["audio"](data, seed=None)["fbank"].shape[0]
    assert 90 < frames <= 100  # of 10 ms


def decode(modality: str, data: bytes) -> str:
    """`good`, or what is wrong, in training and in evaluation alike."""
    found = set()
    for seed in (None, 5):
        try:
            with deadline(10):
                PROCESSORS[modality](data, seed=seed)
            found.add("good")
        except SampleError:
            found.add("bad")
    assert len(found) == 1
    return found.pop()
