"""Token data: the standard library's sources as bytes, or the paper's uint16 token files.

Everything is deterministic. Which file of the standard library is held out is decided by a hash
of its path, and the batch of a step is a function of the seed and the step alone, so that every
optimizer sees the same batches, whatever the number of processes.
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch
from torch import Tensor

BYTE_VOCABULARY = 256
_SKIPPED_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
)
# A byte that no source file contains ends each file.
_END_OF_FILE = b"\0"


@dataclass(frozen=True)
class TokenData:
    """Two long sequences of tokens.

    Attributes:
        train: 1-D integer tensor of training tokens.
        validation: 1-D integer tensor of held-out tokens.
        vocab_size: All tokens are smaller than this.
        name: What the data is, for reports.
        digest: Short hash that tells whether two runs saw the same data.
    """

    train: Tensor
    validation: Tensor
    vocab_size: int
    name: str
    digest: str


def is_held_out(name: str, validation_percent: int) -> bool:
    """Whether a file belongs to the validation part: a hash of its name decides.

    Args:
        name: Path of the file relative to the library, with forward slashes.
        validation_percent: Expected share of held-out files, 1 to 99.

    Returns:
        True for validation, False for training; the same on every machine.
    """
    bucket = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 100
    return bucket < validation_percent


def load_stdlib_bytes(validation_percent: int = 5, root: str | None = None) -> TokenData:
    """The Python standard library's own source files as a sequence of bytes.

    About 12 MB of text that every machine with Python has. Test folders and installed packages
    are left out. Files are split by name (`is_held_out`), sorted and joined by a zero byte.

    Args:
        validation_percent: Expected share of files held out for validation, 1 to 99.
        root: Folder to read instead of the running interpreter's standard library.

    Returns:
        The data, with a vocabulary of the 256 bytes.

    Raises:
        ValueError: If `validation_percent` is out of range, or no source files are found.
    """
    train, validation = (
        bytearray(b"".join(text + _END_OF_FILE for text in part))
        for part in read_stdlib(validation_percent, root)
    )
    return TokenData(
        train=torch.frombuffer(train, dtype=torch.uint8),
        validation=torch.frombuffer(validation, dtype=torch.uint8),
        vocab_size=BYTE_VOCABULARY,
        name="Python standard library, bytes",
        digest=digest(train, validation),
    )


def read_stdlib(validation_percent: int, root: str | None) -> tuple[list[bytes], list[bytes]]:
    """The contents of the source files for training and for validation, sorted by name.

    Args:
        validation_percent: See `load_stdlib_bytes`.
        root: See `load_stdlib_bytes`.

    Returns:
        The two lists, neither of them empty.

    Raises:
        ValueError: If `validation_percent` is out of range, or no source files are found.
    """
    if not 1 <= validation_percent <= 99:
        raise ValueError(f"data.validation_percent={validation_percent} must lie in [1, 99].")
    folder = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    train: list[bytes] = []
    validation: list[bytes] = []
    for name, path in sorted(_source_files(folder)):
        (validation if is_held_out(name, validation_percent) else train).append(path.read_bytes())
    if not train or not validation:
        raise ValueError(
            f"Found too few Python source files under {folder}: {len(train)} for training, "
            f"{len(validation)} for validation. Point data.root at a folder of text files ending "
            "in .py."
        )
    return train, validation


def _source_files(folder: Path) -> list[tuple[str, Path]]:
    found = ((path.relative_to(folder), path) for path in folder.rglob("*.py"))
    return [
        (relative.as_posix(), path)
        for relative, path in found
        if not _SKIPPED_FOLDERS.intersection(relative.parts) and path.is_file()
    ]


def digest(*parts: bytes | bytearray) -> str:
    """A short hash of byte strings, for `TokenData`.

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


def load_token_files(
    train: str | Sequence[str], validation: str | Sequence[str], vocab_size: int
) -> TokenData:
    """Files of raw little-endian uint16 tokens, without a header.

    The files are mapped, not read, unless there are several of a part, which are joined in memory.

    Args:
        train: One path, a glob pattern such as ``/data/c4/train_*.bin``, or a list of those.
        validation: The same for the held-out part.
        vocab_size: Size of the vocabulary, at most 65,536; 32,000 for the paper's.

    Returns:
        The data.

    Raises:
        ValueError: If a path matches no file, a file is empty or of odd size, or the vocabulary
            doesn't fit into 16 bits.
    """
    if not 1 <= vocab_size <= 1 << 16:
        raise ValueError(f"data.vocab_size={vocab_size} must lie in [1, 65536] for uint16 tokens.")
    train_files = _expand(train, "data.train")
    validation_files = _expand(validation, "data.validation")
    sizes = "".join(f"{p.name}:{p.stat().st_size};" for p in (*train_files, *validation_files))
    return TokenData(
        train=_map_tokens(train_files),
        validation=_map_tokens(validation_files),
        vocab_size=vocab_size,
        name=f"tokens of {len(train_files)} + {len(validation_files)} files",
        # Hashing hundreds of gigabytes at every start would be absurd: names and sizes it is.
        digest=digest(sizes.encode()),
    )


def _expand(patterns: str | Sequence[str], key: str) -> list[Path]:
    files: list[Path] = []
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        path = Path(pattern).expanduser()
        matches = [path] if path.is_file() else sorted(path.parent.glob(path.name))
        if not matches:
            raise ValueError(f"{key}: no file matches {pattern!r}.")
        files += matches
    if not files:
        raise ValueError(f"{key} names no file.")
    return files


def _map_tokens(files: Sequence[Path]) -> Tensor:
    parts = []
    for path in files:
        size = path.stat().st_size
        if size == 0 or size % 2:
            raise ValueError(f"{path} has {size} bytes; a file of uint16 tokens has 2 per token.")
        parts.append(torch.from_file(str(path), shared=False, size=size // 2, dtype=torch.uint16))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class SamplerState(TypedDict):
    """What a checkpoint holds of the sampler: plain integers."""

    seed: int
    num_windows: int
    batch_size: int
    step: int


class BatchSampler:
    """Shuffled windows of a long token sequence, one batch per step.

    The sequence is cut into windows of ``sequence_length + 1`` tokens that overlap by one token
    (the last target of one is the first input of the next). Each epoch visits every window once,
    in an order drawn from (seed, epoch); batches run across the border of epochs. The whole batch
    of a step is the same for any number of processes; each takes its slice of the rows.

    Args:
        tokens: 1-D integer tensor.
        sequence_length: Inputs per window, T.
        batch_size: Windows per step B, of all processes together.
        seed: Seed of the order.

    Raises:
        ValueError: If the data has not a single window.
    """

    def __init__(self, tokens: Tensor, sequence_length: int, batch_size: int, seed: int) -> None:
        self.num_windows = (tokens.numel() - 1) // sequence_length
        if self.num_windows < 1:
            raise ValueError(
                f"The data has {tokens.numel()} tokens, too few for one sequence of "
                f"sequence_length={sequence_length}."
            )
        self.tokens = tokens
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.step = 0
        self._order: tuple[int, Tensor] | None = None

    def next_batch(self, rank: int = 0, world_size: int = 1) -> Tensor:
        """The windows of this process for the current step; then moves on to the next step.

        Args:
            rank: This process, 0 to ``world_size - 1``.
            world_size: Number of processes; must divide the batch size.

        Returns:
            int64 tensor of shape (B / world_size, T + 1).
        """
        share = self.batch_size // world_size
        first = self.step * self.batch_size + rank * share
        self.step += 1
        return self._gather([self._window(first + row) for row in range(share)])

    def _window(self, position: int) -> int:
        epoch, index = divmod(position, self.num_windows)
        if self._order is None or self._order[0] != epoch:
            # Own generator: neither the model's initialisation nor an optimizer can disturb it.
            seed = int.from_bytes(hashlib.sha256(f"{self.seed}/{epoch}".encode()).digest()[:7])
            generator = torch.Generator().manual_seed(seed)
            self._order = (epoch, torch.randperm(self.num_windows, generator=generator))
        return int(self._order[1][index])

    def _gather(self, windows: Sequence[int]) -> Tensor:
        length = self.sequence_length
        rows = [self.tokens[w * length : w * length + length + 1] for w in windows]
        return torch.stack(rows).long()

    def fixed_batches(self, count: int, rank: int = 0, world_size: int = 1) -> Iterator[Tensor]:
        """This process's share of a fixed set of batches, spread evenly over the sequence.

        Args:
            count: Number of batches of all processes together, for validation.
            rank: This process, 0 to ``world_size - 1``.
            world_size: Number of processes. Each gets equally many rows, so that collective
                operations match up.

        Yields:
            int64 tensors of shape (up to B / world_size, T + 1); fewer batches where the
            sequence is too short for `count`.
        """
        total = min(count * self.batch_size, self.num_windows) // world_size * world_size
        windows = [row * self.num_windows // total for row in range(rank, total, world_size)]
        share = self.batch_size // world_size
        for start in range(0, len(windows), share):
            yield self._gather(windows[start : start + share])

    def state_dict(self) -> SamplerState:
        """The position, as plain integers."""
        return SamplerState(
            seed=self.seed,
            num_windows=self.num_windows,
            batch_size=self.batch_size,
            step=self.step,
        )

    def load_state_dict(self, state: SamplerState) -> None:
        """Continue from a saved position.

        Args:
            state: What `state_dict` returned.

        Raises:
            ValueError: If the data, the batch size or the seed are not those of the saved run.
        """
        own = self.state_dict()
        for key, value in state.items():
            if key != "step" and own.get(key) != value:
                raise ValueError(
                    f"The checkpoint's sampler has {key}={value}, this run {key}={own.get(key)}; "
                    "the batches would not be the same."
                )
        self.step = state["step"]
