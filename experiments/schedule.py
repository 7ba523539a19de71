"""The learning rate over a run, as a factor on each group's own.

A factor is a pure function of the step, so that continuing a run needs no state. Each function
takes the step (0 to ``total_steps - 1``) and the length of the run.
"""

import math
from collections.abc import Callable

from torch.optim import Optimizer

Factor = Callable[[int, int], float]


def one_cycle(
    step: int, total_steps: int, *, warmup_fraction: float, start_factor: float, end_factor: float
) -> float:
    """Rises and falls by half a cosine, as torch's OneCycleLR.

    Args:
        step: 0 to ``total_steps - 1``.
        total_steps: Length of the run.
        warmup_fraction: Share of the steps in which it rises from `start_factor` to 1; 0 for none.
        start_factor: Value at step 0.
        end_factor: Value at the last step.

    Returns:
        The factor.

    Raises:
        ValueError: If a share or a factor is not in [0, 1].
    """
    _check(warmup_fraction=warmup_fraction, start_factor=start_factor, end_factor=end_factor)
    peak = max(warmup_fraction * total_steps - 1, 0.0)
    last = total_steps - 1
    if step <= peak and peak > 0:
        return _cosine(start_factor, 1.0, step / peak)
    if last <= peak:
        return 1.0
    return _cosine(1.0, end_factor, min((step - peak) / (last - peak), 1.0))


def warmup_stable_decay(
    step: int, total_steps: int, *, warmup_fraction: float, decay_fraction: float, end_factor: float
) -> float:
    """Rises on a line, stays at 1, and falls on a line to `end_factor` at the last step.

    Args:
        step: 0 to ``total_steps - 1``.
        total_steps: Length of the run.
        warmup_fraction: Share of the steps in which it rises; 0 for none.
        decay_fraction: Share of the steps in which it falls; 1 falls from the end of the rise on,
            0 never.
        end_factor: Value at the last step.

    Returns:
        The factor.

    Raises:
        ValueError: If a share or a factor is not in [0, 1].
    """
    _check(warmup_fraction=warmup_fraction, decay_fraction=decay_fraction, end_factor=end_factor)
    rise = warmup_fraction * total_steps
    if step + 1 < rise:
        return (step + 1) / rise
    fall = min(decay_fraction * total_steps, total_steps - rise)
    left = total_steps - 1 - step
    return end_factor + (1 - end_factor) * left / fall if left < fall else 1.0


def cosine_with_restarts(
    step: int, total_steps: int, *, warmup_fraction: float, cycles: int, end_factor: float
) -> float:
    """Rises on a line, then falls by half a cosine, `cycles` times, each from 1 again.

    Args:
        step: 0 to ``total_steps - 1``.
        total_steps: Length of the run.
        warmup_fraction: Share of the steps in which it rises; 0 for none.
        cycles: How often it falls, in equal parts of the rest.
        end_factor: What it falls to.

    Returns:
        The factor.

    Raises:
        ValueError: If a share or a factor is not in [0, 1], or `cycles` is not a whole number of at least 1.
    """
    _check(warmup_fraction=warmup_fraction, end_factor=end_factor)
    if not isinstance(cycles, int) or cycles < 1:
        raise ValueError(f"schedule.cycles={cycles} must be a whole number of at least 1.")
    rise = warmup_fraction * total_steps
    if step + 1 < rise:
        return (step + 1) / rise
    progress = cycles * max(step - rise, 0) / max(total_steps - rise, 1)
    return _cosine(1.0, end_factor, progress % 1)


def _check(**shares: float) -> None:
    for name, value in shares.items():
        if not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ValueError(f"schedule.{name}={value} must be in [0, 1].")


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class LearningRate:
    """Sets every group's lr to its own peak value times the factor of the step.

    Args:
        optimizer: Its groups' current lr are taken as the peak values, so make this before a
            checkpoint is loaded.
        total_steps: Length of the run.
        factor: One of the functions of this module, with its shape given.
    """

    def __init__(self, optimizer: Optimizer, total_steps: int, factor: Factor) -> None:
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.factor = factor
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def apply(self, step: int) -> float:
        """Set the learning rates for a step.

        Args:
            step: The step about to be taken, from 0.

        Returns:
            The first group's learning rate.
        """
        factor = self.factor(step, self.total_steps)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.peaks[0] * factor
