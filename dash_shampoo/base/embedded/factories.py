"""Which distributor and which preconditioner list serves which config."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from dash_shampoo.base.embedded import configs
from dash_shampoo.base.embedded.distributed_configs import not_implemented
from dash_shampoo.base.embedded.distributor import Distributor
from dash_shampoo.base.embedded.kronecker_list import BaseShampooPreconditionerList
from dash_shampoo.base.embedded.preconditioner_list import (
    AdagradPreconditionerList,
    PreconditionerList,
    SGDPreconditionerList,
)
from dash_shampoo.base.embedded.shampoo_list import RootInvShampooPreconditionerList

CHECKED_LISTS = (
    PreconditionerList,
    BaseShampooPreconditionerList,
    RootInvShampooPreconditionerList,
)
"""Lists that may find, once built, that they cannot do what is asked for."""


def own_distributor_class(config: Any) -> type[Distributor] | None:
    """The distributor for a config of either base, or None.

    Args:
        config: A distributed config; looked up by the name of its class.
    """
    strategy = getattr(config, "param_assignment_strategy", None)
    if strategy is not None and strategy.name != "DEFAULT":
        return None
    if type(config).__name__ == "SingleDeviceDistributedConfig":
        return Distributor
    # DTensor takes a while to import, which a single device need not wait for.
    from dash_shampoo.base.embedded import fully_shard, gathering

    return {
        "DDPDistributedConfig": gathering.DDPDistributor,
        "FullyShardDistributedConfig": fully_shard.FullyShardDistributor,
        "HybridShardDistributedConfig": fully_shard.HybridShardDistributor,
    }.get(type(config).__name__)


def preconditioner_list(
    config: configs.PreconditionerConfig | None,
    state: Mapping[Tensor, Any],
    distributor: Distributor,
    group: Mapping[str, Any],
) -> PreconditionerList | None:
    """The preconditioner list for a config, of Shampoo or of grafting; None for None.

    Raises:
        NotImplementedError: If the embedded base has none.
    """
    if config is None:
        return None
    blocks, infos = distributor.local_blocked_params, distributor.local_block_info_list
    if isinstance(config, configs.SGDPreconditionerConfig):
        return SGDPreconditionerList(blocks)
    stateless = configs.SignDescentPreconditionerConfig, configs.SpectralDescentPreconditionerConfig
    if isinstance(config, stateless):
        return PreconditionerList(blocks, config)
    if isinstance(config, configs.AdaGradPreconditionerConfig):
        beta2 = getattr(config, "beta2", 1.0)
        is_sum = getattr(config, "drop_weighting_factor_on_gsquare", True)
        is_adam = isinstance(config, configs.AdamPreconditionerConfig)
        return AdagradPreconditionerList(
            blocks,
            state,
            infos,
            beta2=beta2,
            weighting_factor=1.0 if is_sum else 1 - beta2,
            epsilon=config.epsilon,
            use_bias_correction=is_adam and not is_sum,
        )
    # By exact type: subclasses are other methods, or have options that would be ignored here.
    is_known = type(config) is getattr(configs, type(config).__name__, None)
    if not is_known or not isinstance(config, configs.BaseShampooPreconditionerConfig):
        raise not_implemented(f"the preconditioner or grafting config {config!r}")
    is_root_inverse = type(config) is configs.RootInvShampooPreconditionerConfig
    list_class = (
        RootInvShampooPreconditionerList if is_root_inverse else BaseShampooPreconditionerList
    )
    beta2 = group["betas"][1]
    is_sum = beta2 == 1.0 or config.drop_weighting_factor_on_gsquare
    return list_class(
        blocks,
        state,
        infos,
        preconditioner_config=config,
        beta2=beta2,
        weighting_factor=1.0 if is_sum else 1 - beta2,
        epsilon=group["epsilon"],
        use_bias_correction=group["use_bias_correction"],
    )
