"""The standard library's sources as tokens of a small byte-pair encoding, trained on the spot."""

import io
import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from sentencepiece import SentencePieceProcessor, SentencePieceTrainer
from torch import Tensor

from experiments.data import TokenData, digest, read_stdlib

_NEWLINE = "\n"
_END_OF_FILE = "</s>"
# Every so many files of the training part, up to so many characters: plenty for a few thousand
# pairs, and a matter of seconds.
_FILE_STRIDE = 5
_MAX_CHARACTERS = 2_000_000


def load_stdlib_bpe(
    vocab_size: int = 2048, validation_percent: int = 5, root: str | None = None
) -> TokenData:
    """The sources of `load_stdlib_bytes` in a vocabulary of merged characters.

    The encoding is trained with SentencePiece on a part of the training files. It loses nothing:
    what it has no piece for is spelled in bytes, and line ends and runs of spaces are pieces.

    Args:
        vocab_size: Number of pieces, more than the 256 of the bytes, at most 65,536.
        validation_percent: Expected share of files held out for validation, 1 to 99.
        root: Folder to read instead of the running interpreter's standard library.

    Returns:
        The data.

    Raises:
        ValueError: If an argument is out of range, or there is too little text for that many
            pieces.
    """
    if not 257 <= vocab_size <= 1 << 16:
        raise ValueError(f"data.vocab_size={vocab_size} must lie in [257, 65536].")
    train, validation = (
        [text.decode("utf-8", errors="replace") for text in part]
        for part in read_stdlib(validation_percent, root)
    )
    tokenizer = train_bpe(train, vocab_size)
    parts = [encode(tokenizer, part) for part in (train, validation)]
    return TokenData(
        train=parts[0],
        validation=parts[1],
        vocab_size=vocab_size,
        name=f"Python standard library, {vocab_size} byte pairs",
        digest=digest(*(part.view(torch.uint8).numpy().tobytes() for part in parts)),
    )


def train_bpe(texts: Sequence[str], vocab_size: int) -> SentencePieceProcessor:
    """Train a byte-pair encoding; the same texts give the same encoding.

    Args:
        texts: Contents of the files.
        vocab_size: Number of pieces.

    Returns:
        The tokenizer.

    Raises:
        ValueError: If there is too little text for that many pieces.
    """
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
