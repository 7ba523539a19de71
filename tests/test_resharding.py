"""States of another number of shards under the keys of this one; what is one rank's own part stays."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dash_shampoo as ds
from dash_shampoo.resharding import resharded

GROUP = {
    "max_preconditioner_dim": 1024,
    "distributed_config": ds.SingleDeviceDistributedConfig(),
}


def param(num_shards: int) -> Any:
    placement = SimpleNamespace(is_shard=lambda: True)
    mesh = SimpleNamespace(size=lambda _: num_shards)
    return SimpleNamespace(shape=torch.Size((256, 16)), placements=(placement,), device_mesh=mesh)


def block(rows: int) -> dict[str, Any]:
    return {
        "filtered_grad": torch.ones(rows, 16),
        "shampoo": {"factor_matrices": {0: torch.ones(rows, rows), 1: torch.ones(136)}},
    }


def test_a_rank_s_own_part_of_a_state_stays_as_it_is() -> None:
    saved = {"rank_0-block_0": block(128), "step": torch.tensor(3.0)}
    assert resharded(saved, param(2), GROUP, "weight") is saved


def test_the_state_of_one_shard_does_not_fit_two() -> None:
    saved = {"rank_0-block_0": block(256), "step": torch.tensor(3.0)}
    with pytest.raises(ValueError, match="was saved in 1 shards and is now in 2 shards"):
        resharded(saved, param(2), GROUP, "weight")


def test_blocks_that_are_the_same_get_their_keys_of_now() -> None:
    group = {**GROUP, "max_preconditioner_dim": 128}
    saved = {f"rank_0-block_{number}": block(128) for number in range(2)}
    result = resharded(saved, param(2), group, "weight")
    assert result["rank_0-block_0"] is saved["rank_0-block_0"]
    assert result["rank_1-block_0"] is saved["rank_0-block_1"]
