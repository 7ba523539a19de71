"""The settings of the paper's table of step times, and its figures.

Source: arXiv 2602.02016: milliseconds of an optimizer's step of the 953M model on eight H100, TF32
allowed. Its columns are Distributed Shampoo, stacks within a layer, and one stack for a whole GPU.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import dash_shampoo as ds

# Ours, in the order of the paper's columns.
LISTS = ("base", "layer_wise", "whole")
SETTINGS = ("evd", "cn_fp32", "cn_fp16", "ndb_fp32", "ndb_power_fp32")

# (block, setting, steps between refreshes): the three columns; None where the paper gives nothing.
PAPER_MS: dict[tuple[int, str, int], tuple[float | None, float, float]] = {
    (2048, "evd", 1): (2200, 1747, 1755),
    (2048, "evd", 10): (253, 209, 210),
    (2048, "cn_fp32", 1): (675, 221, 207),
    (2048, "cn_fp16", 1): (243, 169, 153),
    (2048, "ndb_fp32", 1): (None, 279, 264),
    (2048, "ndb_power_fp32", 1): (355, 284, 267),
    (1024, "evd", 1): (3080, 2850, 2850),
    (1024, "evd", 10): (355, 315, 313),
    (1024, "cn_fp32", 1): (666, 149, 136),
    (1024, "cn_fp16", 1): (471, 138, 119),
    (1024, "ndb_fp32", 1): (558, 188, 174),
    (1024, "ndb_power_fp32", 1): (740, 194, 177),
}


@dataclass(frozen=True)
class Setting:
    """What is computed, and how often.

    Attributes:
        name: In the table.
        ours: The preconditioner's config.
        base: The config that Distributed Shampoo's own list computes the same with; None: it can't.
        frequencies: Steps between refreshes.
        solver: The name under which peers have it.
    """

    name: str
    ours: Any
    base: Any
    frequencies: tuple[int, ...]
    solver: str


def paper_settings(single: str) -> list[Setting]:
    """The rows of the paper's table.

    Args:
        single: What its fp32 is: "tf32" where tensor cores are, as its authors allowed; else "fp32".

    Returns:
        The settings.
    """
    power = ds.PowerIterationScaling(num_iterations=10, num_vectors=16, matmul_precision="bf16")
    newton = ds.CoupledNewtonConfig(max_iterations=10, tolerance=1e-6)

    def scaled(precision: Any) -> Any:
        return _of(
            ds.ScaledCoupledNewtonConfig(
                max_iterations=10, tolerance=1e-6, matmul_precision=precision
            )
        )

    def newton_db(**more: Any) -> Any:
        return _of(ds.NewtonDBConfig(num_iterations=10, matmul_precision=single, **more))  # type: ignore[arg-type]

    eigen = _of(ds.EigenConfig())
    return [
        Setting("evd", eigen, eigen, (1, 10), "eigen"),
        Setting("cn_fp32", scaled(single), _of(newton), (1,), "coupled_newton"),
        Setting("cn_fp16", scaled("fp16"), None, (1,), ""),
        Setting("ndb_fp32", newton_db(), None, (1,), "newton_db"),
        Setting("ndb_power_fp32", newton_db(scaling=power), None, (1,), ""),
    ]


def _of(solver: Any) -> Any:
    return ds.RootInvShampooPreconditionerConfig(
        amortized_computation_config=solver, use_symmetric_packing=False
    )


def in_precision(config: Any, name: str, precision: str) -> tuple[Any, str]:
    """A config whose products are taken in a precision.

    Args:
        config: A preconditioner's.
        name: Of its solver.
        precision: Of the products.

    Returns:
        The config, and a name that tells the precision; both as they are where the solver has none.
    """
    solver = getattr(config, "amortized_computation_config", None)
    if solver is None or not hasattr(solver, "matmul_precision"):
        return config, name
    solver = dataclasses.replace(solver, matmul_precision=precision)
    changed = dataclasses.replace(config, amortized_computation_config=solver)
    return changed, f"{name} {precision}"
