"""Stacks: many small matrices in one tensor. Knows neither optimizers nor process groups."""

from dash_shampoo.stacks.plan import (
    ActiveBucket,
    ActivePlan,
    ActiveStack,
    BlockSpec,
    Bucket,
    FactorSlots,
    Rows,
    StackPlan,
    StackSpec,
    activate,
    num_rows,
    plan_stacks,
    split_rows,
)
from dash_shampoo.stacks.storage import MatrixStack, bind_, pack, row_of, unpack

__all__ = [
    "ActiveBucket",
    "ActivePlan",
    "ActiveStack",
    "BlockSpec",
    "Bucket",
    "FactorSlots",
    "MatrixStack",
    "Rows",
    "StackPlan",
    "StackSpec",
    "activate",
    "bind_",
    "num_rows",
    "pack",
    "plan_stacks",
    "row_of",
    "split_rows",
    "unpack",
]
