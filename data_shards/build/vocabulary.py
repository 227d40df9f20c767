"""Build the WordPiece vocabulary of the tiny text encoder from the captions of training tars.

Only training text goes in, so that words of the validation splits stay as unseen as they are.
"""

import argparse
import glob
import io
import string
import sys
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tokenizers import BertWordPieceTokenizer

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CHARACTERS = string.ascii_lowercase + string.digits + string.punctuation
"""Always in, alone and as a continuation: no word in ASCII becomes [UNK]. The tokenizer folds capitals."""
MIN_FREQUENCY = 2


def read_captions(shards: Iterable[str]) -> list[str]:
    """Every line of every `.txt` member, in the order of the tars."""
    captions = []
    for shard in shards:
        with tarfile.open(shard) as archive:
            for member in archive:
                content = archive.extractfile(member) if member.name.endswith(".txt") else None
                if content is not None:
                    captions += io.TextIOWrapper(content, encoding="utf-8").read().splitlines()
    return captions


def train_vocabulary(captions: list[str], *, size: int) -> list[str]:
    """At most `size` tokens: special ones, characters and their continuations, then pieces as training found them."""
    tokenizer = BertWordPieceTokenizer(lowercase=True)
    seen = {character for caption in captions for character in tokenizer.normalize(caption) if not character.isspace()}
    alphabet = [*CHARACTERS, *sorted(seen - set(CHARACTERS))]
    forced = [*SPECIAL_TOKENS, *alphabet, *(f"##{character}" for character in alphabet)]
    tokenizer.train_from_iterator(
        captions,
        vocab_size=size,
        min_frequency=MIN_FREQUENCY,
        # all of the alphabet gets its number here: the trainer numbers the rest of it in the order of a hash map, which
        # differs from run to run and decides between pieces of equal frequency
        special_tokens=forced,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learned = tokenizer.get_vocab()
    return sorted(learned, key=learned.__getitem__)


def describe(vocabulary: list[str], captions: list[str]) -> str:
    """Size, and tokens per caption without [CLS] and [SEP]."""
    tokenizer = BertWordPieceTokenizer(vocab={token: i for i, token in enumerate(vocabulary)}, lowercase=True)
    encodings = tokenizer.encode_batch(captions, add_special_tokens=False)
    lengths = np.array([len(encoding.ids) for encoding in encodings])
    num_unknown = sum(encoding.tokens.count("[UNK]") for encoding in encodings)
    p50, p99 = np.percentile(lengths, [50, 99])
    return (
        f"{len(vocabulary)} tokens; {len(captions)} captions of {lengths.mean():.2f} tokens on average, "
        f"median {p50:.0f}, 99th percentile {p99:.0f}, longest {lengths.max()}; {num_unknown} [UNK]"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "shards", nargs="+", metavar="TAR", help='training tars; a quoted glob such as "train-*.tar" works'
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FILE", help="vocabulary, one token per line")
    parser.add_argument("--size", type=int, default=8000, metavar="N", help="most tokens it may hold (default: 8000)")
    arguments = parser.parse_args(argv)
    shards = sorted({path for pattern in arguments.shards for path in glob.glob(pattern)})
    captions = read_captions(shards)
    if not captions:
        print(f"error: no .txt member in the {len(shards)} tars that {arguments.shards} matches", file=sys.stderr)
        return 1
    vocabulary = train_vocabulary(captions, size=arguments.size)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("".join(f"{token}\n" for token in vocabulary), encoding="utf-8")
    print(f"{arguments.out}: {describe(vocabulary, captions)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
