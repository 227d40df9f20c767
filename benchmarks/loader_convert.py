"""Writes one set of tars in a peer's own format; run by the interpreter that has the peers.

python -m benchmarks.loader_convert streaming|litdata FOLDER_OF_TARS
"""

import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path


def read_tar(path: str) -> Iterator[dict[str, bytes]]:
    """Samples of one tar as extension -> bytes, by the standard library alone."""
    current, sample = "", {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, _, extension = member.name.partition(".")
            if key != current and sample:
                yield sample
                sample = {}
            current = key
            file = tar.extractfile(member)
            assert file is not None
            sample[extension] = file.read()
    yield sample


def write_streaming(tars: list[str], destination: Path) -> None:
    """MosaicML Streaming's MDS, shards of its default size, every member a column of bytes."""
    from streaming import MDSWriter

    columns = dict.fromkeys(next(read_tar(tars[0])), "bytes")
    with MDSWriter(out=str(destination), columns=columns) as writer:
        for tar in tars:
            for sample in read_tar(tar):
                writer.write(sample)


def write_litdata(tars: list[str], destination: Path) -> None:
    """LitData's chunks of 64 MB, as its README does."""
    from litdata import optimize

    optimize(fn=read_tar, inputs=tars, output_dir=str(destination), chunk_bytes="64MB", num_workers=1)


def main() -> None:
    """Converts and prints nothing but an empty JSON object."""
    system, folder = sys.argv[1], Path(sys.argv[2])
    tars = [str(path) for path in sorted(folder.glob("*.tar"))]
    {"streaming": write_streaming, "litdata": write_litdata}[system](tars, folder.with_name(f"{folder.name}.{system}"))
    print("{}")


if __name__ == "__main__":
    main()
