"""Text as tokens: bytes, or a small byte-pair encoding that is trained on the spot.

Everything is deterministic. Which files are held out is decided by a hash of their paths, so that
every machine and every optimizer sees the same data.
"""

import fnmatch
import hashlib
import io
import itertools
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

from experiments.tokenizers import Bytes, Pieces
from experiments.tokens import TokenData, TokenSequence, digest, load_token_files, write_tokens

BYTE_VOCABULARY = 256
DEFAULT_PIECES = 2048  # of byte pairs
TOKENIZERS = ("bytes", "bpe")
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
# A byte that no text contains ends each file.
_END = b"\0"
_NEWLINE = "\n"
_END_OF_FILE = "</s>"
# Every so many files of the training part, up to so many characters: plenty for a few thousand
# pairs, and a matter of seconds.
_FILE_STRIDE = 5
_MAX_CHARACTERS = 2_000_000

Files = list[tuple[str, bytes]]


def load_text(
    train: str | Sequence[str] | None = None,
    validation: str | Sequence[str] | None = None,
    tokenizer: str = "bytes",
    vocab_size: int | None = None,
    validation_percent: int = 5,
) -> TokenData:
    """Text files as tokens.

    Args:
        train: Folders, files or glob patterns; None: the sources of the running Python's standard
            library, 12 MB of real text that every machine has.
        validation: The same; None: files of `train`, held out by a hash of their names.
        tokenizer: ``bytes`` (each file ends by a zero byte), or ``bpe`` (a byte-pair encoding,
            trained on `train`; the result is kept in a cache).
        vocab_size: Number of pieces of ``bpe``, 257 to 65,536. (Default: 2048)
        validation_percent: Expected share of held-out files, 1 to 99, without `validation`.

    Returns:
        The data.

    Raises:
        ValueError: If an argument is out of range, there is no text, or too little for that many
            pieces.
    """
    if tokenizer not in TOKENIZERS:
        raise ValueError(f"data.tokenizer={tokenizer} must be one of {', '.join(TOKENIZERS)}.")
    if not 1 <= validation_percent <= 99:
        raise ValueError(f"data.validation_percent={validation_percent} must lie in [1, 99].")
    name = "Python standard library" if train is None else _in_words(train)
    found = read_files(train, "data.train")
    if validation is None:
        held_out = [text for key, text in found if is_held_out(key, validation_percent)]
        parts = [[t for key, t in found if not is_held_out(key, validation_percent)], held_out]
    else:
        parts = [[t for _, t in found], [t for _, t in read_files(validation, "data.validation")]]
    if not all(parts):
        raise ValueError(
            f"There are too few text files in {name}: {len(parts[0])} for training, "
            f"{len(parts[1])} for validation. Give more by data.train, or data.validation."
        )
    if tokenizer == "bytes" and vocab_size not in (None, BYTE_VOCABULARY):
        raise ValueError(f"data.vocab_size={vocab_size}, but bytes have a vocabulary of 256.")
    vocab_size = vocab_size or (BYTE_VOCABULARY if tokenizer == "bytes" else DEFAULT_PIECES)
    key = digest(f"{tokenizer} {vocab_size} 1".encode(), *parts[0], b"", *parts[1])
    if tokenizer == "bytes":
        tokens = [encode_bytes(part) for part in parts]
    else:
        tokens = _bpe_tokens(parts, vocab_size, key)
    return TokenData(
        train=TokenSequence([tokens[0]]),
        validation=TokenSequence([tokens[1]]),
        vocab_size=vocab_size,
        tokenizer=Bytes() if tokenizer == "bytes" else Pieces(_cache() / f"bpe_{key}.model"),
        name=f"{name}, {'bytes' if tokenizer == 'bytes' else f'{vocab_size} byte pairs'}",
        digest=key,
    )


def is_held_out(name: str, validation_percent: int) -> bool:
    """Whether a file belongs to the validation part: a hash of its name decides.

    Args:
        name: Path of the file relative to its folder, with forward slashes.
        validation_percent: Expected share of held-out files, 1 to 99.

    Returns:
        True for validation, False for training; the same on every machine.
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return bucket < validation_percent


def read_files(sources: str | Sequence[str] | None, key: str) -> Files:
    """The contents of text files.

    Args:
        sources: See `load_text`.
        key: The setting that they are from, for messages.

    Returns:
        (name, content) of each file, sorted by name. Left out are hidden files, files with a zero
        byte, and in Python's standard library tests and packages.

    Raises:
        ValueError: If a source does not exist.
    """
    if sources is None:
        sources = [str(Path(sysconfig.get_paths()["stdlib"]) / "**" / "*.py")]
    files: Files = []
    for source in [sources] if isinstance(sources, str) else sources:
        folder, pattern = _split(Path(source).expanduser())
        found = sorted(
            (path.relative_to(folder).as_posix(), path)
            for path in _matching(folder, pattern)
            if path.is_file() and not _is_skipped(path.relative_to(folder))
        )
        if not found:
            raise ValueError(f"{key}: no file matches {source!r}.")
        texts = [(name, path.read_bytes()) for name, path in found]
        files += [(name, text) for name, text in texts if text and _END not in text]
    return files


def _split(path: Path) -> tuple[Path, str]:
    """A path as the folder that names are relative to, and a pattern in it."""
    if path.is_dir():
        return path, "**/*"
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts) - 1)
    return Path(*parts[:first]), str(Path(*parts[first:]))


def _matching(folder: Path, pattern: str) -> Iterator[Path]:
    """What a glob pattern finds; it does not look into folders whose files are skipped anyhow."""
    if not pattern.startswith("**/") or "/" in pattern.removeprefix("**/"):
        yield from folder.glob(pattern)
        return
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not _is_skipped(Path(name))]
        for name in fnmatch.filter(names, pattern.removeprefix("**/")):
            yield Path(place, name)


def _is_skipped(relative: Path) -> bool:
    return bool(_SKIPPED_FOLDERS & set(relative.parts)) or any(p[0] == "." for p in relative.parts)


def _in_words(sources: str | Sequence[str]) -> str:
    return sources if isinstance(sources, str) else ", ".join(sources)


def encode_bytes(texts: Iterable[bytes]) -> Tensor:
    """Bytes of texts, each ended by a zero byte.

    Args:
        texts: Contents of the files.

    Returns:
        1-D uint8 tensor.
    """
    return torch.frombuffer(bytearray(b"".join(text + _END for text in texts)), dtype=torch.uint8)


def _bpe_tokens(parts: Sequence[Sequence[bytes]], vocab_size: int, key: str) -> list[Tensor]:
    """Training and encoding take many seconds: the result is kept."""
    home = _cache()
    paths = [home / f"bpe_{key}_{name}.bin" for name in ("train", "validation")]
    try:
        kept = load_token_files(str(paths[0]), str(paths[1]))
        return [*kept.train.parts, *kept.validation.parts]
    except (OSError, ValueError):
        pass  # not there, or cut off: made anew
    texts = [[text.decode("utf-8", errors="replace") for text in part] for part in parts]
    tokenizer = train_bpe(texts[0], vocab_size)
    tokens = [encode(tokenizer, part) for part in texts]
    try:
        home.mkdir(parents=True, exist_ok=True)
        (home / f"bpe_{key}.model").write_bytes(tokenizer.serialized_model_proto())
        for path, part in zip(paths, tokens, strict=True):
            write_tokens(path, part, vocab_size, f"byte pairs, {vocab_size}")
    except OSError:
        pass  # without a cache the next start is slower, no more
    return tokens


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dash_shampoo"


def train_bpe(texts: Sequence[str], vocab_size: int) -> SentencePieceProcessor:
    """Train a byte-pair encoding; the same texts give the same encoding.

    Args:
        texts: Contents of the files.
        vocab_size: Number of pieces.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If the vocabulary is out of range, or there is too little text for it.
    """
    if not 257 <= vocab_size <= 1 << 16:
        raise ValueError(f"data.vocab_size={vocab_size} must lie in [257, 65536].")
    model = io.BytesIO()
    try:
        SentencePieceTrainer.train(
            sentence_iterator=_sample_lines(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=0.9995,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            user_defined_symbols=[_NEWLINE],
            eos_piece=_END_OF_FILE,
            bos_id=-1,
            pad_id=-1,
            unk_id=0,
            eos_id=1,
            num_threads=1,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"data.vocab_size={vocab_size}: {error}") from error
    return SentencePieceProcessor(model_proto=model.getvalue())


def _sample_lines(texts: Sequence[str]) -> Iterator[str]:
    total = 0
    for line in itertools.chain.from_iterable(t.split(_NEWLINE) for t in texts[::_FILE_STRIDE]):
        if total > _MAX_CHARACTERS:
            return
        total += len(line)
        yield line


def encode(tokenizer: SentencePieceProcessor, texts: Iterable[str]) -> Tensor:
    """Tokens of texts, each ended by the end-of-file piece.

    Args:
        tokenizer: What `train_bpe` returned.
        texts: Contents of the files.

    Returns:
        1-D int32 tensor.
    """
    newline, end = tokenizer.piece_to_id(_NEWLINE), tokenizer.piece_to_id(_END_OF_FILE)
    tokens: list[int] = []
    for text in texts:
        # Line by line, for the time of a sentence grows faster than its length.
        for line in tokenizer.encode(text.split(_NEWLINE)):
            tokens += line
            tokens.append(newline)
        tokens[-1] = end
    return torch.tensor(tokens, dtype=torch.int32)
