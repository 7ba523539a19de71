"""Tokens as text, for samples."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

# The file that `python -m experiments data` writes beside the tokens of byte pairs.
MODEL_FILE = "tokenizer.model"


class Tokenizer(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> list[int]:
        """The tokens of a text."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of tokens."""


class Bytes:
    """Every byte a token."""

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(text.encode())

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return bytes(tokens).decode(errors="replace")


class Pieces:
    """The pieces of a model of sentencepiece.

    Args:
        model: Its file.
    """

    def __init__(self, model: Path) -> None:
        self._model = model
        self._processor: Any = None

    def _loaded(self) -> Any:
        if self._processor is None:  # few runs want samples, and it takes time
            from sentencepiece import SentencePieceProcessor

            self._processor = SentencePieceProcessor(model_file=str(self._model))
        return self._processor

    def encode(self, text: str) -> list[int]:
        """See `Tokenizer`."""
        return list(self._loaded().encode(text))

    def decode(self, tokens: Sequence[int]) -> str:
        """See `Tokenizer`."""
        return str(self._loaded().decode(list(tokens)))


def tokenizer_of(path: Path, description: str) -> Tokenizer | None:
    """The tokenizer of a token file.

    Args:
        path: The file; a model may lie beside it.
        description: What its sidecar says of the tokenizer.

    Returns:
        The tokenizer, or None where it is not known.
    """
    if description.startswith("bytes"):
        return Bytes()
    model = path.with_name(MODEL_FILE)
    return Pieces(model) if model.is_file() else None
