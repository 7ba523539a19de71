"""Whether the blocks that changed most should be refreshed first: their loss beside that of a fixed turn.

    python benchmarks/adaptive_refresh.py --tasks mlp conv2d llama --output-dir /tmp/adaptive

Both refresh a tenth of the roots in every step. `stagger_refresh` takes each block in its turn. The other
one takes of every stack the blocks with the largest ‖F - F₀‖ / ‖F₀‖, F₀ being the factor matrix of their
last root; how many are chosen is fixed, so that no step would wait for a device. Learning rates are tuned by
a seed of its own, as in `experiments study`; runs are kept in the output folder and not done again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import dash_shampoo as ds
from dash_shampoo.buckets.layout import ActiveStack
from experiments.study.questions import TASKS
from experiments.study.runs import Store, result
from experiments.study.sides import Shampoo, Side

_FREQUENCY = 10


@dataclass(frozen=True)
class LargestChange:
    """A `Shampoo` with `stagger_refresh` whose shares are the blocks that changed most.

    Attributes:
        shampoo: The optimizer that is changed.
    """

    shampoo: Shampoo

    @property
    def lr(self) -> float:
        return self.shampoo.lr

    @property
    def as_matrices(self) -> bool:
        return self.shampoo.as_matrices

    def build(self, model: nn.Module, lr: float, block: int) -> Optimizer:
        optimizer = self.shampoo.build(model, lr, block)
        for lists in optimizer._per_group_state_lists:  # type: ignore[attr-defined]
            shampoo = lists["shampoo_preconditioner_list"]
            if getattr(getattr(shampoo, "_options", None), "stagger_refresh", False):
                _choose_by_change(shampoo)
        return optimizer


def _choose_by_change(shampoo: Any) -> None:
    """Makes a stacked list refresh, of every stack, the rows that changed most."""
    shares, known = shampoo.due, {}

    def due(step: int, is_due: bool) -> Sequence[ActiveStack]:
        chosen = []
        if step <= shampoo._group["start_preconditioning_step"]:
            chosen = list(shares(step, is_due))
        else:
            for active in shampoo._active.stacks:
                now, then = _matrices(shampoo, active), known[active.stack]
                change = torch.linalg.matrix_norm(now - then) / torch.linalg.matrix_norm(then)
                count = -(-len(change) // shampoo._group["precondition_frequency"])
                rows = change.topk(count).indices.sort().values
                slots = tuple(active.slots[row] for row in rows.tolist())
                chosen.append(ActiveStack(active.stack, rows, slots))
        for one in chosen:
            now = _matrices(shampoo, one)
            if one.stack not in known:
                known[one.stack] = now.clone()
            else:
                known[one.stack][one.rows] = now
        return chosen

    shampoo.due = due


def _matrices(shampoo: Any, active: ActiveStack) -> torch.Tensor:
    """The factor matrices of some rows, their EMA's bias corrected."""
    values: torch.Tensor = shampoo._bias_corrected(active.stack, active.rows)
    return values


def main(words: Sequence[str]) -> str:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=["mlp"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--output-dir", type=Path, required=True, help="where runs are kept")
    options = parser.parse_args(words)
    torch.set_num_threads(1)
    in_turn = Shampoo(replace(ds.DefaultDashConfig, stagger_refresh=True), frequency=_FREQUENCY)
    sides: dict[str, Side] = {
        "each in its turn": in_turn,
        "the largest change first": LargestChange(in_turn),
    }
    store = Store(options.output_dir / "runs.jsonl")
    lines = ["| task | which tenth is refreshed | loss | learning rate |", "| - | - | -: | -: |"]
    for task in options.tasks:
        for name, side in sides.items():
            one = result(store, task, name, side, options.seeds, tuning_seeds=[0])
            lines.append(f"| {task} | {name} | {one.mean:.4f} ± {one.deviation:.4f} | {one.lr:g} |")
            print(lines[-1], flush=True)
    text = "\n".join(lines) + "\n"
    (options.output_dir / "table.md").write_text(text, encoding="utf-8")
    return text


if __name__ == "__main__":
    main(sys.argv[1:])
