"""Token sequences: tensors in memory, or files that are mapped and read where they are needed.

A token file holds little-endian uint16 or uint32 tokens, with or without the header of llm.c and
modded-nanogpt (256 int32: magic number, version, count). Beside it may lie a sidecar, ``NAME.json``,
which tells its vocabulary, dtype, count and digest; ``python -m experiments data`` writes both.
"""

import bisect
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from experiments.tokenizers import Tokenizer, tokenizer_of

# Magic number: (dtype of the tokens, who writes it).
_MAGIC = {20240520: torch.uint16, 20240801: torch.uint32}
_HEADER_BYTES = 1024
_SIDECAR_SUFFIX = ".json"
_DTYPES = {"uint16": torch.uint16, "uint32": torch.uint32}
_CHUNK = 1 << 22


class TokenSequence:
    """Several 1-D tensors, read as one long sequence without joining them.

    Args:
        parts: Integer tensors, in order; mapped files or tensors in memory.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        self.parts = list(parts)
        self._ends = list(itertools.accumulate(part.numel() for part in parts))

    def numel(self) -> int:
        """Number of tokens."""
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, where: slice) -> Tensor:
        """The tokens ``start:stop``, as int64."""
        start, stop, _ = where.indices(self.numel())
        pieces = []
        index = bisect.bisect_right(self._ends, start)
        while start < stop:
            first = self._ends[index] - self.parts[index].numel()
            piece = self.parts[index][start - first : stop - first].long()
            pieces.append(piece)
            start += piece.numel()
            index += 1
        return torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)

    def largest(self, rank: int = 0, world_size: int = 1) -> int:
        """The largest token, or -1 where there is none.

        Args:
            rank: This process looks at every `world_size`-th piece from this one on.
            world_size: Number of processes that share the work.

        Returns:
            The largest token of this process's share.
        """
        pieces = (piece for part in self.parts for piece in torch.split(part, _CHUNK))
        own = itertools.islice(pieces, rank, None, world_size)
        # uint16 has no max() in torch.
        return max((int(piece.long().max()) for piece in own if piece.numel()), default=-1)


@dataclass(frozen=True)
class TokenData:
    """Two long sequences of tokens.

    Attributes:
        train: Training tokens.
        validation: Held-out tokens.
        vocab_size: All tokens are smaller than this.
        name: What the data is, for reports.
        digest: Short hash that tells whether two runs saw the same data.
        unchecked: Sequences, by name, that may hold tokens outside of the vocabulary.
        tokenizer: Tokens as text, where it is known.
    """

    train: TokenSequence
    validation: TokenSequence
    vocab_size: int
    name: str
    digest: str
    unchecked: tuple[tuple[str, TokenSequence], ...] = ()
    tokenizer: Tokenizer | None = None


@dataclass(frozen=True)
class Sidecar:
    """What a token file does not say itself.

    Attributes:
        vocab_size: All tokens are smaller than this.
        dtype: uint16 or uint32.
        count: Number of tokens.
        digest: Hash of the tokens.
        tokenizer: What made them, in words.
    """

    vocab_size: int
    dtype: str
    count: int
    digest: str
    tokenizer: str


def digest(*parts: bytes | bytearray | memoryview) -> str:
    """A short hash of byte strings.

    Args:
        *parts: The strings.

    Returns:
        16 hexadecimal digits.
    """
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.hexdigest()[:16]


def write_tokens(path: Path, tokens: Tensor, vocab_size: int, tokenizer: str) -> Sidecar:
    """Write a token file and its sidecar.

    Args:
        path: The file; its folder must exist.
        tokens: 1-D integer tensor.
        vocab_size: All tokens are smaller than this; up to 65,536 the file has 16 bits a token.
        tokenizer: What made them, in words.

    Returns:
        What the sidecar says.
    """
    name = "uint16" if vocab_size <= 1 << 16 else "uint32"
    data = tokens.to(_DTYPES[name]).contiguous().numpy().tobytes()
    _replace(path, data)
    sidecar = Sidecar(vocab_size, name, tokens.numel(), digest(data), tokenizer)
    _write_sidecar(path, sidecar)
    return sidecar


def write_sidecar(path: Path, vocab_size: int, tokenizer: str) -> Sidecar:
    """Look through a token file of somebody else's and write its sidecar.

    Args:
        path: The file, of uint16 tokens or with a header.
        vocab_size: What its tokens must be smaller than.
        tokenizer: What made them, in words.

    Returns:
        What the sidecar says.

    Raises:
        ValueError: If the file is not whole, or a token is outside of the vocabulary.
    """
    tokens = _map(path, None)
    largest = TokenSequence([tokens]).largest()
    if largest >= vocab_size:
        raise ValueError(
            f"{path} holds token {largest}, outside of the vocabulary of {vocab_size}."
        )
    name = str(tokens.dtype).rpartition(".")[2]
    sidecar = Sidecar(vocab_size, name, tokens.numel(), digest(tokens.numpy().data), tokenizer)
    _write_sidecar(path, sidecar)
    return sidecar


def _write_sidecar(path: Path, sidecar: Sidecar) -> None:
    text = json.dumps(asdict(sidecar), indent=1) + "\n"
    _replace(Path(f"{path}{_SIDECAR_SUFFIX}"), text.encode())


def _replace(path: Path, data: bytes) -> None:
    """Several processes may write the same file: each writes it whole."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(data)
    os.replace(temporary, path)


def read_sidecar(path: Path) -> Sidecar | None:
    """The sidecar of a token file.

    Args:
        path: The token file.

    Returns:
        What it says, or None where there is none.

    Raises:
        ValueError: If it is not one of `write_tokens`.
    """
    sidecar = Path(f"{path}{_SIDECAR_SUFFIX}")
    if not sidecar.is_file():
        return None
    try:
        found = Sidecar(**json.loads(sidecar.read_text(encoding="utf-8")))
        if found.dtype not in _DTYPES:
            raise ValueError(f"dtype {found.dtype} is none of {', '.join(_DTYPES)}")
    except (ValueError, TypeError) as error:
        raise ValueError(f"{sidecar} is not a sidecar of a token file: {error}.") from error
    return found


def load_token_files(
    train: str | Sequence[str], validation: str | Sequence[str], vocab_size: int | None = None
) -> TokenData:
    """Token files, mapped, not read: many shards are one sequence.

    Args:
        train: One path, a glob pattern such as ``data/train_*.bin``, or a list of those.
        validation: The same for the held-out part.
        vocab_size: Size of the vocabulary; None where sidecars tell it.

    Returns:
        The data.

    Raises:
        ValueError: If a path matches no file, a file is not what it says, or the vocabulary is
            unknown or contradicted.
    """
    files = {"data.train": expand(train, "data.train")}
    files["data.validation"] = expand(validation, "data.validation")
    paths = [path for part in files.values() for path in part]
    sidecars = {path: read_sidecar(path) for path in paths}
    for path, sidecar in sidecars.items():
        vocab_size = vocab_size or (sidecar.vocab_size if sidecar else None)
        if sidecar and vocab_size is not None and sidecar.vocab_size > vocab_size:
            raise ValueError(
                f"data.vocab_size={vocab_size}, but {path} has a vocabulary of "
                f"{sidecar.vocab_size}: use that."
            )
    if vocab_size is None:
        raise ValueError(f"data.vocab_size must be given: {paths[0]} has no sidecar that tells it.")
    described = sidecars[paths[0]]
    mapped = {path: _map(path, sidecar) for path, sidecar in sidecars.items()}
    train_part, validation_part = (
        TokenSequence([mapped[path] for path in part]) for part in files.values()
    )
    # Hashing hundreds of gigabytes at every start would be absurd: names, sizes and sidecars it is.
    known = "".join(
        f"{p.name}:{p.stat().st_size}:{s.digest if s else ''};" for p, s in sidecars.items()
    )
    return TokenData(
        train=train_part,
        validation=validation_part,
        vocab_size=vocab_size,
        name=f"tokens of {len(files['data.train'])} + {len(files['data.validation'])} files",
        digest=digest(known.encode()),
        unchecked=tuple(
            (str(p), TokenSequence([mapped[p]])) for p, s in sidecars.items() if s is None
        ),
        tokenizer=None if described is None else tokenizer_of(paths[0], described.tokenizer),
    )


def expand(patterns: str | Iterable[str], key: str) -> list[Path]:
    """The files that paths and glob patterns name.

    Args:
        patterns: One or several.
        key: The setting that they are from, for messages.

    Returns:
        Files, in order; those of one pattern sorted. Sidecars are left out.

    Raises:
        ValueError: If a pattern matches no file.
    """
    files: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = Path(pattern).expanduser()
        found = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        found = [p for p in found if p.is_file() and p.suffix != _SIDECAR_SUFFIX]
        if not found:
            raise ValueError(f"{key}: no file matches {pattern!r}.")
        files += found
    if not files:
        raise ValueError(f"{key} names no file.")
    return files


def _map(path: Path, sidecar: Sidecar | None) -> Tensor:
    size = path.stat().st_size
    with path.open("rb") as file:
        magic, _, count = (int.from_bytes(file.read(4), "little") for _ in range(3))
    has_header = magic in _MAGIC and size >= _HEADER_BYTES
    dtype = _MAGIC[magic] if has_header else _DTYPES[sidecar.dtype if sidecar else "uint16"]
    width, skipped = dtype.itemsize, _HEADER_BYTES if has_header else 0
    if size == skipped:
        raise ValueError(f"{path} has {size} bytes: it is empty.")
    if (size - skipped) % width:
        raise ValueError(
            f"{path} has {size} bytes; a file of {dtype} tokens has {width} per token."
        )
    tokens = torch.from_file(str(path), shared=False, size=size // width, dtype=dtype)
    tokens = tokens[skipped // width :]
    stated = count if has_header else sidecar.count if sidecar else tokens.numel()
    if stated != tokens.numel():
        raise ValueError(
            f"{path} has {tokens.numel()} tokens, but its {'header' if has_header else 'sidecar'} says "
            f"{stated}: it was cut off or changed; write it again."
        )
    return tokens
