"""Turn folders of text files into tokens for the study: docs/study/train.py reads them.

    python docs/study/prepare_text.py FOLDER... --output FILE

Every file that is UTF-8 text counts, symbolic links and copies of an earlier file do not. A file is
held out whole, or it is for training: a hash of its path decides. A byte-level BPE vocabulary is
trained on training files alone. The same folders give the same bytes.

FILE                  uint16 tokens: the training files, then the held-out files, one after the
                      other by path, an end-of-file token after each
FILE.json             where held-out text begins; sizes, by kind of file too; licence files;
                      versions
FILE.tokenizer.json   the vocabulary, for ``tokenizers.Tokenizer.from_file``
"""

import argparse
import hashlib
import json
import platform
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END = "<end of file>"
LICENCE = re.compile(r"(licen[cs]e|copying|notice|copyright)", re.I)


class File(NamedTuple):
    """A text file. ``name`` begins with the name of the folder that was given."""

    path: Path
    name: str
    kind: str
    size: int

    @property
    def share(self) -> float:
        """A number in [0, 1) that depends on the name alone."""
        return int.from_bytes(hashlib.sha256(self.name.encode()).digest()[:6]) / 2**48

    def read(self) -> str:
        return self.path.read_bytes().decode()


def find(
    folders: Iterable[Path], suffixes: Sequence[str], longest: int, kinds: str
) -> tuple[list[File], list[str]]:
    """All text files by name, and the names of those that look like licences."""
    paths = {
        f"{folder.resolve().name}/{path.relative_to(folder).as_posix()}": path
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file() and not path.is_symlink()
    }
    files, licences, seen = [], [], set()
    for name, path in sorted(paths.items()):
        if LICENCE.match(path.name):
            licences.append(name)
        if (suffixes and path.suffix not in suffixes) or not 0 < path.stat().st_size <= longest:
            continue
        content = path.read_bytes()
        digest = hashlib.sha256(content).digest()
        if digest in seen or not is_text(content):
            continue
        seen.add(digest)
        kind = path.suffix.lower() if kinds == "suffix" else name.split("/")[0]
        files.append(File(path, name, kind or "no suffix", len(content)))
    return files, licences


def is_text(content: bytes) -> bool:
    try:
        return "\0" not in content.decode()
    except UnicodeDecodeError:
        return False


def train_tokenizer(files: Iterable[File], vocabulary: int, size: int) -> Tokenizer:
    """Byte-level BPE of the first ``size`` bytes of files, taken in the order of their shares."""

    def sample() -> Iterator[str]:
        left = size
        for file in sorted(files, key=lambda file: file.share, reverse=True):
            if left <= 0:
                return
            left -= file.size
            yield file.read()

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sample(), trainer)
    return tokenizer


def write_tokens(files: Sequence[File], tokenizer: Tokenizer, output: Any) -> list[int]:
    """Append the tokens of every file and an end; how many tokens each file has."""
    from tqdm import tqdm

    end = tokenizer.token_to_id(END)
    counts = []
    with tqdm(total=sum(f.size for f in files), unit="B", unit_scale=True, disable=None) as bar:
        for group in (files[start : start + 64] for start in range(0, len(files), 64)):
            texts = [file.read() for file in group]
            # Else a file that spells the end's name would end there.
            texts = [text.replace(END, "") for text in texts]
            for encoding in tokenizer.encode_batch(texts, add_special_tokens=False):
                ids = np.array([*encoding.ids, end], dtype="<u2")
                ids.tofile(output)
                counts.append(len(ids))
            bar.update(sum(file.size for file in group))
    return counts


def summary(files: Sequence[File], counts: Sequence[int]) -> dict[str, Any]:
    """Files, bytes and tokens, in all and by kind."""
    kinds: dict[str, Counter[str]] = {}
    for file, count in zip(files, counts, strict=True):
        one = Counter(files=1, bytes=file.size, tokens=count)
        kinds[file.kind] = kinds.get(file.kind, Counter()) + one
    by_kind = sorted(kinds.items(), key=lambda item: (-item[1]["bytes"], item[0]))
    whole = sum(kinds.values(), Counter())
    return dict(whole) | dict(kinds={name: dict(counter) for name, counter in by_kind})


def prepare(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write all three files; what FILE.json holds."""
    files, licences = find(
        arguments.folders, arguments.suffixes, arguments.longest_file, arguments.kinds
    )
    held_out = [file for file in files if file.share < arguments.held_out]
    training = [file for file in files if file.share >= arguments.held_out]
    if not (held_out and training):
        raise SystemExit(f"{len(training)} training and {len(held_out)} held-out files: too few")
    tokenizer = train_tokenizer(training, arguments.vocabulary, arguments.tokenizer_bytes)
    output = arguments.output
    output.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(f"{output}.tokenizer.json")
    with output.open("wb") as opened:
        counts = [write_tokens(part, tokenizer, opened) for part in (training, held_out)]
    starts = np.cumsum([sum(counts[0]), *counts[1][:-1]]).tolist()
    return dict(
        vocabulary=tokenizer.get_vocab_size(),
        dtype="<u2",
        held_out_from=sum(counts[0]),
        training=summary(training, counts[0]),
        held_out=summary(held_out, counts[1]),
        held_out_files=[
            dict(start=start, kind=file.kind, name=file.name)
            for start, file in zip(starts, held_out, strict=True)
        ],
        licences=licences,
        sources=arguments.sources,
        sha256=digest(output),
        versions=dict(tokenizers=version("tokenizers"), python=platform.python_version()),
    )


def digest(path: Path) -> str:
    with path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--vocabulary", type=int, default=16_384, help="tokens, at most 65,536")
    parser.add_argument("--held-out", type=float, default=0.02, help="share of the files")
    parser.add_argument(
        "--tokenizer-bytes", type=int, default=100_000_000, help="of training files"
    )
    parser.add_argument("--suffixes", nargs="+", default=[], help="take these alone: .py .c .rst")
    parser.add_argument("--longest-file", type=int, default=1_000_000, help="bytes")
    parser.add_argument("--kinds", choices=("suffix", "folder"), default="suffix")
    parser.add_argument(
        "--sources", nargs="+", default=[], help="packages and versions, to be recorded"
    )
    arguments = parser.parse_args()
    if not 257 <= arguments.vocabulary <= 2**16:
        parser.error("--vocabulary must be between 257 (bytes and the end of a file) and 65,536")
    record = prepare(arguments)
    Path(f"{arguments.output}.json").write_text(json.dumps(record, indent=1) + "\n")
    for part in ("training", "held_out"):
        sizes = record[part]
        print(f"{part}: {sizes['files']:,} files, {sizes['bytes']:,} bytes, ", end="")
        print(f"{sizes['tokens']:,} tokens of {record['vocabulary']:,}")


if __name__ == "__main__":
    main()
