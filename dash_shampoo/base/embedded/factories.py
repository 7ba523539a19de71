"""Which distributor and which preconditioner list serves which config."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dash_shampoo.base.embedded import keys
from dash_shampoo.base.embedded.configs import (
    AdaGradPreconditionerConfig,
    AdamPreconditionerConfig,
    BaseShampooPreconditionerConfig,
    EigendecomposedKLShampooPreconditionerConfig,
    EigendecomposedShampooPreconditionerConfig,
    EigenvalueCorrectedShampooPreconditionerConfig,
    PreconditionerConfig,
    RMSpropPreconditionerConfig,
    RootInvKLShampooPreconditionerConfig,
    RootInvShampooPreconditionerConfig,
    SGDPreconditionerConfig,
    SignDescentPreconditionerConfig,
    SpectralDescentPreconditionerConfig,
)
from dash_shampoo.base.embedded.distributed_configs import (
    not_implemented,
)
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.kronecker_list import BaseShampooPreconditionerList
from dash_shampoo.base.embedded.other_lists import (
    EigendecomposedShampooPreconditionerList,
    EigenvalueCorrectedShampooPreconditionerList,
    RootInvKLShampooPreconditionerList,
    SignDescentPreconditionerList,
    SpectralDescentPreconditionerList,
)
from dash_shampoo.base.embedded.preconditioner_list import (
    AdagradPreconditionerList,
    PreconditionerList,
    SGDPreconditionerList,
)
from dash_shampoo.base.embedded.shampoo_list import RootInvShampooPreconditionerList

_SHAMPOO_LISTS: dict[type[PreconditionerConfig], type[BaseShampooPreconditionerList]] = {
    RootInvShampooPreconditionerConfig: RootInvShampooPreconditionerList,
    RootInvKLShampooPreconditionerConfig: RootInvKLShampooPreconditionerList,
    EigendecomposedShampooPreconditionerConfig: EigendecomposedShampooPreconditionerList,
    EigendecomposedKLShampooPreconditionerConfig: EigendecomposedShampooPreconditionerList,
    EigenvalueCorrectedShampooPreconditionerConfig: EigenvalueCorrectedShampooPreconditionerList,
}


def own_distributor_class(config: Any) -> type[Distributor] | None:
    """The distributor for a config of either base, or None.

    Args:
        config: A distributed config; looked up by the name of its class.
    """
    strategy = getattr(config, "param_assignment_strategy", None)
    if strategy is not None and strategy.name != "DEFAULT":
        return None
    # DTensor takes a while to import, which a single device need not wait for.
    match type(config).__name__:
        case "SingleDeviceDistributedConfig":
            return Distributor
        case "DDPDistributedConfig":
            from dash_shampoo.base.embedded.gathering import DDPDistributor

            return DDPDistributor
        case "FullyShardDistributedConfig":
            from dash_shampoo.base.embedded.fully_shard import FullyShardDistributor

            return FullyShardDistributor
        case "HybridShardDistributedConfig":
            from dash_shampoo.base.embedded.gathering import HybridShardDistributor

            return HybridShardDistributor
        case _:
            return None


CHECKED_LISTS = (
    *_SHAMPOO_LISTS.values(),
    SignDescentPreconditionerList,
    SpectralDescentPreconditionerList,
)
"""Lists that may find, once built, that they cannot do what is asked for."""


def preconditioner_list(
    config: PreconditionerConfig | None,
    state: Mapping[Tensor, Any],
    distributor: Distributor,
    group: Mapping[str, Any],
) -> PreconditionerList | None:
    """The preconditioner list for a config, of Shampoo or of grafting; None for None.

    Raises:
        NotImplementedError: If the embedded base has none.
    """
    blocks, infos = distributor.local_blocked_params, distributor.local_block_info_list
    if config is None:
        return None
    if isinstance(config, SGDPreconditionerConfig):
        return SGDPreconditionerList(blocks)
    if isinstance(config, AdaGradPreconditionerConfig):
        beta2, weight = 1.0, 1.0
        is_corrected = isinstance(config, AdamPreconditionerConfig)
        if isinstance(config, RMSpropPreconditionerConfig):
            beta2, weight = config.beta2, 1 - config.beta2
            if config.drop_weighting_factor_on_gsquare:
                weight, is_corrected = 1.0, False
        return AdagradPreconditionerList(
            blocks, state, infos, beta2, weight, config.epsilon, is_corrected
        )
    # By exact type: subclasses are other methods, or have options that would be ignored here.
    if isinstance(config, SpectralDescentPreconditionerConfig):
        return SpectralDescentPreconditionerList(blocks, config)
    if isinstance(config, SignDescentPreconditionerConfig):
        return SignDescentPreconditionerList(blocks, config)
    if (list_class := _SHAMPOO_LISTS.get(type(config))) is not None:
        assert isinstance(config, BaseShampooPreconditionerConfig)
        beta2 = group[keys.BETAS][1]
        is_sum = beta2 == 1.0 or config.drop_weighting_factor_on_gsquare
        return list_class(
            blocks,
            state,
            infos,
            preconditioner_config=config,
            beta2=beta2,
            weighting_factor=1.0 if is_sum else 1 - beta2,
            epsilon=group[keys.EPSILON],
            use_bias_correction=group[keys.USE_BIAS_CORRECTION],
        )
    raise not_implemented(f"the preconditioner or grafting config {config!r}")
