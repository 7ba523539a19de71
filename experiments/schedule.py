"""The learning rate over a run: rise by half a cosine, then fall by half a cosine.

The factor is a pure function of the step, so that resuming needs no state.
"""

import math

from torch.optim import Optimizer


def one_cycle_factor(
    step: int, total_steps: int, warmup_fraction: float, start_factor: float, end_factor: float
) -> float:
    """Factor on the learning rate at a step, as of torch's OneCycleLR with cosine annealing.

    Rises from `start_factor` to 1 over the first ``warmup_fraction * total_steps`` steps, then
    falls to `end_factor` at the last one.

    Args:
        step: 0 to ``total_steps - 1``.
        total_steps: Length of the run.
        warmup_fraction: Share of the steps in which it rises; 0 for none.
        start_factor: Value at step 0.
        end_factor: Value at the last step.

    Returns:
        The factor.
    """
    peak = max(warmup_fraction * total_steps - 1, 0.0)
    last = total_steps - 1
    if step <= peak and peak > 0:
        return _cosine(start_factor, 1.0, step / peak)
    if last <= peak:
        return 1.0
    return _cosine(1.0, end_factor, min((step - peak) / (last - peak), 1.0))


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


class LearningRate:
    """Sets every group's lr to its own peak value times the factor of the step.

    Args:
        optimizer: Its groups' current lr are taken as the peak values, so make this before a
            checkpoint is loaded.
        total_steps: Length of the run.
        warmup_fraction: See `one_cycle_factor`.
        start_factor: See `one_cycle_factor`.
        end_factor: See `one_cycle_factor`.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        total_steps: int,
        warmup_fraction: float,
        start_factor: float,
        end_factor: float,
    ) -> None:
        self.optimizer = optimizer
        self.total_steps = total_steps
        self.shape = (warmup_fraction, start_factor, end_factor)
        self.peaks = [float(group["lr"]) for group in optimizer.param_groups]

    def apply(self, step: int) -> float:
        """Set the learning rates for a step.

        Args:
            step: The step about to be taken, from 0.

        Returns:
            The first group's learning rate.
        """
        factor = one_cycle_factor(step, self.total_steps, *self.shape)
        for group, peak in zip(self.optimizer.param_groups, self.peaks, strict=True):
            group["lr"] = peak * factor
        return self.peaks[0] * factor
