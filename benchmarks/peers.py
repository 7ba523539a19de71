"""Optimizers of other packages for `step_time.py`, where they are importable, set as ours are.

- `pytorch_optimizer` (from PyPI): DASH, SOAP.
- `ista_daslab_optimizers` (github.com/IST-DASLab/ISTA-DASLab-Optimizers): DashGpu. Its package imports CUDA
  extensions, triton and wandb; without a GPU put its subpackage `dash` on the path with empty stand-ins.
- `torch.optim`: Muon, with AdamW for what is no matrix; AdamW, in its foreach form.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module

import torch

Parameters = Sequence[torch.nn.Parameter]
LR, BETAS, EPSILON, GRAFTING_EPSILON = 1e-3, (0.9, 0.95), 1e-10, 1e-8
NEVER = 10**9


@dataclass(frozen=True)
class Steppable:
    """An optimizer as the benchmark uses it.

    Attributes:
        step (Callable): Takes a step.
        set_frequency (Callable): From now on roots are refreshed every so many steps.
    """

    step: Callable[[], object]
    set_frequency: Callable[[int], None] = lambda _: None


@dataclass(frozen=True)
class Peer:
    """An optimizer of another package.

    Attributes:
        package (str): The module that it needs.
        solver (str): Name of our config that computes the same, or `rival` of several; empty if none does.
        make (Callable): make(block size, parameters) refreshes its roots in every step.
    """

    package: str
    solver: str
    make: Callable[[int, Parameters], Steppable]

    def is_importable(self) -> bool:
        """Whether the package is here."""
        try:
            import_module(self.package)
        except (
            ImportError,
            OSError,
        ):  # or what it is built on, such as a CUDA extension, can't be loaded
            return False
        return True


def of_groups(optimizer: torch.optim.Optimizer) -> Steppable:
    """An optimizer that reads the frequency from its parameter groups, as ours does."""

    def set_frequency(frequency: int) -> None:
        for group in optimizer.param_groups:
            group["precondition_frequency"] = frequency

    return Steppable(optimizer.step, set_frequency)


def _pytorch_optimizer_dash(method: str) -> Callable[[int, Parameters], Steppable]:
    def make(block: int, parameters: Parameters) -> Steppable:
        module = import_module("pytorch_optimizer.optimizer.dash")
        return of_groups(
            module.DASH(
                parameters,
                lr=LR,
                betas=BETAS,
                block_size=block,
                precondition_frequency=1,
                inverse_root_method=method,
                eps=GRAFTING_EPSILON,
                matrix_eps=EPSILON,
            )
        )

    return make


def _dash_gpu(method: str) -> Callable[[int, Parameters], Steppable]:
    def make(block: int, parameters: Parameters) -> Steppable:
        dash = import_module("ista_daslab_optimizers.dash")
        config = dash.DashConfig(
            beta_G=BETAS[0],
            beta_LR=BETAS[1],
            beta_graft=BETAS[1],
            eps_inv_root=EPSILON,
            eps_grafting=GRAFTING_EPSILON,
            inv_root_freq=1,
            start_prec_step=1,
            block_size=block,
            inv_root_method=dash.DashInverseRootMethodType[method],
            algo_one_dim=dash.DashAlgoOneDim.SHAMPOO,
        )
        optimizer = dash.DashGpu(parameters, lr=LR, weight_decay=0.0, config=config)

        def step() -> None:
            # It reports the shapes of its stacks in the first step.
            with contextlib.redirect_stdout(io.StringIO()):
                optimizer.step()

        def set_frequency(frequency: int) -> None:
            config.inv_root_freq = frequency

        return Steppable(step, set_frequency)

    return make


def _soap(block: int, parameters: Parameters) -> Steppable:
    module = import_module("pytorch_optimizer.optimizer.soap")
    options = dict(precondition_frequency=1, eps=GRAFTING_EPSILON)
    optimizer = module.SOAP(parameters, lr=LR, betas=BETAS, weight_decay=0.0, **options)

    def set_frequency(frequency: int) -> None:
        of_groups(optimizer).set_frequency(frequency)
        for state in optimizer.state.values():  # which keeps what it began with
            state["precondition_frequency"] = frequency

    return Steppable(optimizer.step, set_frequency)


def _muon(block: int, parameters: Parameters) -> Steppable:
    matrices = [p for p in parameters if p.ndim == 2]
    others = [p for p in parameters if p.ndim != 2]
    muon = torch.optim.Muon(matrices, lr=LR, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=LR, betas=BETAS, foreach=True) if others else None

    def step() -> None:
        muon.step()  # type: ignore[no-untyped-call]
        if adamw is not None:
            adamw.step()

    return Steppable(step)


def _adamw(block: int, parameters: Parameters) -> Steppable:
    return Steppable(torch.optim.AdamW(parameters, lr=LR, betas=BETAS, foreach=True).step)


PEERS: dict[str, Peer] = {
    **{
        f"DashGpu/{solver}": Peer("ista_daslab_optimizers.dash", solver, _dash_gpu(method))
        for solver, method in {
            "eigen": "EVD",
            "coupled_newton": "CN",
            "newton_db": "NDB",
            "chebyshev": "CBSHV",
        }.items()
    },
    **{
        f"pytorch_optimizer.DASH/{solver}": Peer(
            "pytorch_optimizer", solver, _pytorch_optimizer_dash(method)
        )
        for solver, method in {"eigen": "eigh", "newton_db": "newton_db"}.items()
    },
    "pytorch_optimizer.SOAP": Peer("pytorch_optimizer", "soap", _soap),
    "Muon": Peer("torch.optim", "muon", _muon),
    "AdamW": Peer("torch.optim", "", _adamw),
}
