"""What the study asks: for each question, the sides that answer it and the tasks they train."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import dash_shampoo as ds
from experiments.study.sides import AdamW, Muon, PackageSOAP, Routing, Shampoo, Side, root
from experiments.tasks import DigitsConvTask, DigitsTask, LlamaTask, Mnist1dTask, Task


@dataclass(frozen=True)
class Training:
    """A task of the study.

    Attributes:
        what: Its description.
        make: Makes it; the argument says whether convolution kernels are kept as matrices.
        block: Largest side of a preconditioner.
    """

    what: str
    make: Callable[[bool], Task]
    block: int


TASKS = {
    "mlp": Training("MLP 64-128-128-10 on digits, 300 steps", lambda _: DigitsTask(), 128),
    "conv2d": Training(
        "convnet (3×3 kernels, 16-32-64 channels) on digits, 300 steps", DigitsConvTask, 512
    ),
    "conv1d": Training(
        "convnet (kernels of 5 and 3, 32-64-64 channels) on MNIST-1D, 300 steps", Mnist1dTask, 512
    ),
    "llama": Training(
        "byte-level Llama of 0.6M parameters (width 128, 3 layers), 300 steps of 12 × 64 bytes",
        lambda _: LlamaTask(300, width=128, sequence_length=64, num_layers=3, batch_size=12),
        128,
    ),
    "llama_3m": Training(
        "byte-level Llama of 3.3M parameters (width 256, 4 layers), 600 steps of 8 × 64 bytes",
        lambda _: LlamaTask(600, width=256, sequence_length=64, num_layers=4, batch_size=8),
        256,
    ),
}
_SMALL = ("mlp", "conv2d", "conv1d", "llama")
_CONVNETS = ("conv2d", "conv1d")


@dataclass(frozen=True)
class Question:
    """A question.

    Attributes:
        title: The question.
        sides: By the name in the table.
        tasks: Where it is asked.
    """

    title: str
    sides: Mapping[str, Side]
    tasks: tuple[str, ...] = _SMALL


def squares(
    k: int, exponent: float = 0.5, damping: float = 1e-4
) -> ds.RootInvShampooPreconditionerConfig:
    """Roots by k squarings.

    Args:
        k: Number of squarings.
        exponent: Of every dimension.
        damping: Relative to the largest eigenvalue.

    Returns:
        The preconditioner.
    """
    return root(ds.MinimaxConfig(num_squarings=k, relative_epsilon=damping), exponent)


def truncated(exponent: float, cutoff: float) -> ds.RootInvShampooPreconditionerConfig:
    """Roots by eigendecomposition, eigenvalues below a cutoff dropped.

    Args:
        exponent: Of every dimension.
        cutoff: Relative to the largest eigenvalue.

    Returns:
        The preconditioner.
    """
    pseudo = ds.PseudoInverseConfig(rank_rtol=cutoff)
    return root(ds.EigenConfig(rank_deficient_stability_config=pseudo), exponent)


def _base(
    config: ds.PreconditionerConfig, lr: float, grafts: bool = True, frequency: int = 1
) -> Shampoo:
    """As people use the base: everything by Shampoo, block by block."""
    return Shampoo(
        config,
        lr=lr,
        grafts=grafts,
        frequency=frequency,
        routing="all",
        stacked=False,
        epsilon=1e-10 if grafts else 1e-8,
    )


def _dims(count: float) -> dict[str, Any]:
    """Merge small dimensions until so many are left."""
    return {
        "distributed_config": ds.SingleDeviceDistributedConfig(
            target_parameter_dimensionality=count
        )
    }


_ROUTINGS: dict[str, Routing] = {
    "everything": "all",
    "all matrices": "matrices",
    "hidden matrices": "hidden",
}
_EXACT = root(ds.EigenConfig(), {}, ds.RootInvShampooPreconditionerConfig)
_BASE_SOAP = ds.EigenvalueCorrectedShampooPreconditionerConfig(
    amortized_computation_config=ds.EighEigendecompositionConfig()
)
_TRUNCATED = {
    f"exponent {name}, cutoff {cutoff:.0e}": Shampoo(truncated(value, cutoff), epsilon=0.0)
    for name, value in (("1/3", 1 / 3), ("1/2", 0.5))
    for cutoff in (1e-4, 1e-6)
}
_ONE_SIDED = root(ds.MinimaxConfig(num_squarings=5), {1: 0.5, 2: {0: 0.0, 1: 0.5}, 3: 0.5, 4: 0.5})

_SQUARES = cast(ds.DashShampooPreconditionerConfig, squares(5))
# Its directions have entries of ±1, so that grafting to them gives each block a root mean square of 1.
_SIGN = ds.SignDescentPreconditionerConfig()

QUESTIONS = {
    "peers": Question(
        "Which optimizer reaches the lowest loss?",
        {
            "AdamW, β2 .95": AdamW(),
            "AdamW, β2 .99": AdamW(beta2=0.99),
            "Muon with AdamW": Muon(),
            "SOAP (pytorch_optimizer)": PackageSOAP(),
            "SOAP (pytorch_optimizer), every 10": PackageSOAP(frequency=10),
            "Distributed Shampoo, eigen": _base(_EXACT, 0.008),
            "Distributed Shampoo, SOAP": _base(_BASE_SOAP, 0.004, grafts=False),
            "Distributed Shampoo, eigen, every 10": _base(_EXACT, 0.008, frequency=10),
            "Distributed Shampoo, SOAP, every 10": _base(_BASE_SOAP, 0.004, False, 10),
            "DashShampoo, 9 squares, everything": Shampoo(squares(9), routing="all"),
            "DashShampoo, 5 squares, everything": Shampoo(squares(5), routing="all"),
            "DashShampoo, 5 squares, hidden matrices": Shampoo(squares(5)),
            "DashShampoo, 5 squares, hidden matrices, every 10": Shampoo(squares(5), frequency=10),
        },
        (*_SMALL, "llama_3m"),
    ),
    "squares": Question(
        "How many squares does a root need?",
        {
            **{f"{k} squares": Shampoo(squares(k)) for k in (3, 4, 5, 6, 7, 9)},
            **{
                f"{k} squares, every 10": Shampoo(squares(k), frequency=10) for k in (3, 4, 5, 7, 9)
            },
        },
    ),
    "routing": Question(
        "Which parameters should go to Adam?",
        {
            "hidden matrices by Shampoo": Shampoo(squares(5)),
            "all matrices by Shampoo": Shampoo(squares(5), routing="matrices"),
            "everything by Shampoo": Shampoo(squares(5), routing="all"),
        },
    ),
    "order": Question(
        "What do tensors of order 3 and 4 want?",
        {
            "merged up to the block's size": Shampoo(squares(5)),
            "as matrices": Shampoo(squares(5), options=_dims(2), as_matrices=True),
            "every dimension, exponent 1/2": Shampoo(squares(5), options=_dims(math.inf)),
            "every dimension, exponent 1/(2·order)": Shampoo(
                root(ds.MinimaxConfig(), {}), options=_dims(math.inf)
            ),
            "every dimension, exponent 1/2 up to matrices, 1/(2·order) above, 5 squares": Shampoo(
                root(ds.MinimaxConfig(num_squarings=5), {1: 0.5, 2: 0.5}), options=_dims(math.inf)
            ),
            "every dimension, exponent 1/order": Shampoo(
                root(ds.MinimaxConfig(), {1: 0.5, 2: 0.5, 3: 1 / 3, 4: 0.25}),
                options=_dims(math.inf),
            ),
        },
        _CONVNETS,
    ),
    "convnets": Question(
        "Which exponent do convnets want, with everything by Shampoo?",
        {
            **{
                f"exponent {name}": Shampoo(squares(5, value), routing="all")
                for name, value in (("1/4", 0.25), ("1/3", 1 / 3), ("1/2", 0.5))
            },
            "1/4, vectors 1/2 (DefaultDashConvnetConfig)": Shampoo(
                ds.DefaultDashConvnetConfig, routing="all"
            ),
            "1/4, vectors 1/2, β2 .99": Shampoo(
                ds.DefaultDashConvnetConfig, routing="all", beta2=0.99
            ),
        },
        _CONVNETS,
    ),
    "exponent": Question(
        "Which exponent, and is a small eigenvalue to be damped or dropped?",
        {
            **{
                f"exponent {name}, damping {damping:.0e}": Shampoo(
                    root(ds.MinimaxConfig(relative_epsilon=damping), value)
                )
                for name, value in (("1/4", 0.25), ("1/3", 1 / 3), ("3/8", 0.375))
                for damping in (1e-4, 1e-6)
            },
            **{
                f"exponent 1/2, damping {damping:.0e}": Shampoo(
                    root(ds.MinimaxConfig(relative_epsilon=damping))
                )
                for damping in (1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
            },
            **_TRUNCATED,
        },
    ),
    "memory": Question(
        "How long should the factors remember?",
        {f"β2 {beta2}": Shampoo(squares(5), beta2=beta2) for beta2 in (0.9, 0.95, 0.99)},
    ),
    "frequency": Question(
        "How often should roots be refreshed?",
        {
            **{f"every {every}": Shampoo(squares(5), frequency=every) for every in (1, 3, 10, 30)},
            "every 10, a tenth in each step": Shampoo(
                replace(_SQUARES, stagger_refresh=True), frequency=10
            ),
        },
    ),
    "length": Question(
        "What should the length of an update be?",
        {
            "Adam's (grafting)": Shampoo(squares(5)),
            "root mean square of 1": Shampoo(squares(5), grafting=_SIGN, lr=0.0025),
            "its own": Shampoo(squares(5), grafts=False, lr=0.0005),
            "Adam's, right side alone": Shampoo(_ONE_SIDED),
        },
    ),
    "family": Question(
        "Which preconditioner?",
        {
            "inverse roots": Shampoo(squares(5)),
            "inverse roots, KL": Shampoo(
                root(ds.MinimaxConfig(), {}, ds.RootInvKLShampooPreconditionerConfig)
            ),
            "SOAP": Shampoo(ds.DefaultDashSOAPConfig, grafts=False, lr=0.004, epsilon=1e-8),
            "spectral descent": Shampoo(
                ds.SpectralDescentPreconditionerConfig(
                    orthogonalization_config=ds.MuonOrthogonalizationConfig()
                ),
                grafts=False,
                lr=0.008,
                block=1024,
                as_matrices=True,
            ),
        },
    ),
    "soap": Question(
        "Does our SOAP reach that of pytorch_optimizer?",
        {
            "SOAP (pytorch_optimizer)": PackageSOAP(),
            **{
                f"SOAP, {what}": Shampoo(
                    ds.DefaultDashSOAPConfig, grafts=False, lr=0.004, epsilon=1e-8, routing=routing
                )
                for what, routing in _ROUTINGS.items()
            },
        },
        ("mlp", "conv2d"),
    ),
}
