"""Batches of windows of a long token sequence, the same for every optimizer and number of processes."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypedDict

import torch
from torch import Tensor

from experiments.tokens import TokenSequence


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
        tokens: The sequence.
        sequence_length: Inputs per window, T.
        batch_size: Windows per step B, of all processes together.
        seed: Seed of the order.

    Raises:
        ValueError: If the data has not a single window.
    """

    def __init__(
        self, tokens: TokenSequence, sequence_length: int, batch_size: int, seed: int
    ) -> None:
        self.num_windows = (tokens.numel() - 1) // sequence_length
        if self.num_windows < 1:
            raise ValueError(
                f"The data has {tokens.numel()} tokens, too few for one window of "
                f"sequence_length={sequence_length} and its last target: give more data or a smaller "
                "sequence_length."
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
        return torch.stack([row.long() for row in rows])

    def fixed_windows(self, count: int, rank: int = 0, world_size: int = 1) -> list[int]:
        """This process's share of a fixed set of windows, spread evenly over the sequence.

        Args:
            count: Number of batches of all processes together, for validation; fewer where the
                sequence is too short for them.
            rank: This process, 0 to ``world_size - 1``.
            world_size: Number of processes. Each gets equally many windows, so that collective
                operations match up.

        Returns:
            Indices of windows.

        Raises:
            ValueError: If there are fewer windows than processes.
        """
        total = min(count * self.batch_size, self.num_windows) // world_size * world_size
        if total == 0:
            raise ValueError(
                f"The validation data has {self.num_windows} windows of sequence_length="
                f"{self.sequence_length}, fewer than the {world_size} processes: give more data, a "
                "smaller sequence_length or fewer processes."
            )
        return [row * self.num_windows // total for row in range(rank, total, world_size)]

    def batches(self, windows: Sequence[int], size: int) -> Iterator[Tensor]:
        """The tokens of given windows.

        Args:
            windows: Their indices.
            size: Windows of a tensor, at most.

        Yields:
            int64 tensors of shape (up to `size`, T + 1).
        """
        for start in range(0, len(windows), size):
            yield self._gather(windows[start : start + size])

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
