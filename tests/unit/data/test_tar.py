"""The tar walker against the standard library's, and against tars that are damaged or hostile."""

import bz2
import gzip
import io
import lzma
import tarfile
from pathlib import Path

import pytest
from damage import rechecked
from helpers import write_tar

from mmfuse.data.tar import BLOCK, Member, walk_tar
from mmfuse.errors import ShardError

LONG = "folder/" * 40 + "0001.jpg"
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "pax": tarfile.PAX_FORMAT, "gnu": tarfile.GNU_FORMAT}


def walk_with_tarfile(path: Path) -> list[Member]:
    with tarfile.open(path) as tar:
        return [Member(m.name, m.offset_data, m.size) for m in tar if m.isfile()]


def pax_member(records: dict[str, str], *, name: str = "0001.txt", payload: bytes = b"abc") -> bytes:
    """A tar of one member, written by the standard library under these PAX records."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo(name)
        info.size, info.pax_headers = len(payload), records
        tar.addfile(info, io.BytesIO(payload))
    return file.getvalue()


@pytest.mark.parametrize("tar_format", FORMATS.values(), ids=FORMATS)
def test_members_are_those_of_tarfile(tmp_path: Path, tar_format: int) -> None:
    names = ["0001.jpg", "a/b/0002.tar.gz", "p" * 90 + "/" + "n" * 95 + ".txt", "ä/ü.txt"]
    names += [] if tar_format == tarfile.USTAR_FORMAT else [LONG, "é" * 150 + ".jpg"]
    sizes = [0, 1, 511, 512, 513, 5000]
    path = write_tar(tmp_path / "x.tar", [(n, b"x" * sizes[i]) for i, n in enumerate(names)], tar_format=tar_format)

    members = list(walk_tar(path))

    assert members == walk_with_tarfile(path)
    assert [member.name for member in members] == names
    assert all(path.read_bytes()[m.offset : m.offset + m.size] == b"x" * m.size for m in members)


def test_directories_and_global_headers_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "made by git archive"}) as tar:
        folder = tarfile.TarInfo("a")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        tar.addfile(tarfile.TarInfo("a/0001.txt"))
    assert list(walk_tar(path)) == walk_with_tarfile(path) != []


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["base-256", "pax"])
def test_a_member_above_8_gib_is_measured_right(tmp_path: Path, tar_format: int) -> None:
    path, size = tmp_path / "x.tar", 9 << 30  # octal digits end at 8 GiB
    info = tarfile.TarInfo("big.npy")
    info.size = size
    head = info.tobuf(tar_format)
    with open(path, "wb") as file:  # a hole: 9 GiB that take no disk
        file.write(head)
        file.seek(size, io.SEEK_CUR)
        last = tarfile.TarInfo("z.txt")
        file.write(last.tobuf(tar_format) + bytes(2 * BLOCK))
    assert list(walk_tar(path)) == [Member("big.npy", len(head), size), Member("z.txt", len(head) + size + BLOCK, 0)]


WHOLE = {"0001.jpg": b"j" * 700, "0001.txt": b"t" * 10, "0002.txt": b"u" * 10}
"""Headers at 0, 1536 and 2560; end-of-archive blocks from 3584."""


@pytest.mark.parametrize(
    ("length", "message"),
    [
        (0, "cut off at byte 0"),
        (300, "cut off"),
        (1000, "member at byte 0 needs 700 bytes, the file ends at byte 1000"),
        (1536 + 200, "cut off"),
        (3584, "cut off at byte 3584: no end-of-archive blocks"),
        (3584 + 512, "only one end-of-archive block"),
        (3584 + 1000, "only one end-of-archive block"),
    ],
)
def test_a_cut_off_tar_is_refused_with_the_byte(tmp_path: Path, length: int, message: str) -> None:
    path = write_tar(tmp_path / "x.tar", WHOLE)
    with open(path, "r+b") as file:
        file.truncate(length)
    with pytest.raises(ShardError, match=message) as error:
        list(walk_tar(path))
    assert str(path) in str(error.value)


def test_end_blocks_without_further_padding_are_enough(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", WHOLE)
    with open(path, "r+b") as file:
        file.truncate(3584 + 1024)
    assert len(list(walk_tar(path))) == 3


@pytest.mark.parametrize(
    ("offset", "content", "message"),
    [
        (1536, bytes(BLOCK), "zeroed header at byte 1536"),
        (1536 + 148, b"7", "damaged header at byte 1536"),
        (1536, b"X", "damaged header at byte 1536"),
        (1536 + 148, b"\xff\xff", "damaged header at byte 1536"),
        (5000, b"!", "zeroed header at byte 3584 with data after it"),
    ],
    ids=["zeroed header", "checksum", "name", "no digits", "data after the end"],
)
def test_damage_is_refused_with_the_byte(tmp_path: Path, offset: int, content: bytes, message: str) -> None:
    path = write_tar(tmp_path / "x.tar", WHOLE)
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(content)
    with pytest.raises(ShardError, match=message) as error:
        list(walk_tar(path))
    assert str(path) in str(error.value)


@pytest.mark.parametrize(("packer", "pack"), [("gzip", gzip.compress), ("bzip2", bz2.compress), ("xz", lzma.compress)])
def test_a_compressed_tar_is_refused_by_its_name(tmp_path: Path, packer: str, pack) -> None:
    path = write_tar(tmp_path / "x.tar", WHOLE)
    path.write_bytes(pack(path.read_bytes()))  # shorter than one tar block
    with pytest.raises(ShardError, match=f"is compressed with {packer}.*unpack"):
        list(walk_tar(path))


def test_a_member_whose_name_looks_like_compression_is_read(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"BZh0001.txt": b"x"})
    assert [member.name for member in walk_tar(path)] == ["BZh0001.txt"]


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE, tarfile.GNUTYPE_SPARSE])
def test_a_link_is_refused_instead_of_lost(tmp_path: Path, kind: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", WHOLE)
    data = path.read_bytes()
    header = rechecked(data[1536 : 1536 + 156] + kind + data[1536 + 157 : 2048])
    path.write_bytes(data[:1536] + header + data[2048:])
    with pytest.raises(ShardError, match=r"'0001.txt' at byte 1536 is a link or a special file"):
        list(walk_tar(path))


@pytest.mark.parametrize(
    "records",
    [{"size": "-1536"}, {"size": "many"}, {"size": str(1 << 70)}, {"GNU.sparse.major": "1"}],
    ids=["backwards", "no number", "endless", "sparse"],
)
def test_pax_records_that_cannot_be_true_are_refused(tmp_path: Path, records: dict[str, str]) -> None:
    path = tmp_path / "x.tar"
    path.write_bytes(pax_member(records))
    with pytest.raises(ShardError, match="at byte"):
        for seen, _ in enumerate(walk_tar(path)):
            assert seen < 3, "walks in a circle"


def test_garbage_in_a_pax_header_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.tar"
    data = bytearray(pax_member({"comment": "long enough"}))
    data[BLOCK : BLOCK + 4] = b"\xff = "
    path.write_bytes(data)
    with pytest.raises(ShardError, match="damaged extended header at byte 0"):
        list(walk_tar(path))


@pytest.mark.parametrize(
    "record", [b"9 path=a.txt\n", b"15 path=a.txt\n", b"13 path=a.txt", b"0 path=a.txt\n", b"8 patha\n"]
)
def test_a_pax_record_of_a_wrong_length_is_refused(tmp_path: Path, record: bytes) -> None:
    path = tmp_path / "x.tar"
    data = pax_member({"path": "b.txt"})
    size = b"%011o\0" % len(record)
    header = rechecked(data[:124] + size + data[136:BLOCK])
    path.write_bytes(header + record.ljust(BLOCK, b"\0") + data[2 * BLOCK :])
    with pytest.raises(ShardError, match="damaged extended header at byte 0"):
        list(walk_tar(path))


@pytest.mark.parametrize("records", [{"path": "all.txt"}, {"size": "5"}], ids=["name", "size"])
def test_a_global_header_that_speaks_for_every_member_is_refused(tmp_path: Path, records: dict[str, str]) -> None:
    path = tmp_path / "x.tar"
    data = pax_member(records)
    path.write_bytes(rechecked(data[:156] + b"g" + data[157:BLOCK]) + data[BLOCK:])
    with pytest.raises(ShardError, match="global header at byte 0 names all members alike"):
        list(walk_tar(path))


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT], ids=["gnu", "pax"])
def test_a_long_name_without_its_member_is_refused(tmp_path: Path, tar_format: int) -> None:
    path = write_tar(tmp_path / "x.tar", {LONG: b"x"}, tar_format=tar_format)
    path.write_bytes(path.read_bytes()[: 2 * BLOCK] + bytes(2 * BLOCK))
    with pytest.raises(ShardError, match="extended header before byte 1024 has no member"):
        list(walk_tar(path))


def test_checksums_of_signed_bytes_are_accepted_as_old_programs_wrote_them(tmp_path: Path) -> None:
    path = write_tar(tmp_path / "x.tar", {"ü.txt": b"x"})
    data = path.read_bytes()
    signed = sum(b - 256 if b > 127 else b for b in data[:148] + b" " * 8 + data[156:BLOCK])
    path.write_bytes(data[:148] + b"%06o\0 " % signed + data[156:])
    assert list(walk_tar(path)) == walk_with_tarfile(path) == [Member("ü.txt", BLOCK, 1)]


def test_zeros_beyond_the_usual_end_are_worth_a_warning_and_nothing_else_a_refusal(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_tar(tmp_path / "x.tar", WHOLE)
    assert len(list(walk_tar(path))) == 3
    assert not caplog.records
    path.write_bytes(path.read_bytes() + bytes(BLOCK))
    assert len(list(walk_tar(path))) == 3
    assert f"{path}: the last 7168 bytes are zeros" in caplog.text
    path.write_bytes(bytes(10_240 + BLOCK))
    with pytest.raises(ShardError, match="holds nothing but 10752 zeros"):
        list(walk_tar(path))


@pytest.mark.parametrize("size", [b"\xff" * 12, b"\x80" + b"\xff" * 11, b"-0000000001\0"])
def test_sizes_that_no_file_has_are_refused(tmp_path: Path, size: bytes) -> None:
    path = write_tar(tmp_path / "x.tar", WHOLE)
    data = path.read_bytes()
    for kind in (b"0", b"5", b"x"):
        header = rechecked(data[:124] + size + data[136:156] + kind + data[157:BLOCK])
        path.write_bytes(header + data[BLOCK:])
        with pytest.raises(ShardError):
            list(walk_tar(path))
