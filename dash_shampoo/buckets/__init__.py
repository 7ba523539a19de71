"""Buckets and stacks: many small tensors in one. Knows neither optimizers nor process groups."""

from dash_shampoo.buckets.layout import (
    ActiveLayout,
    ActiveStack,
    BlockSpec,
    Bucket,
    FactorSlots,
    Layout,
    Piece,
    Rows,
    StackSpec,
    layout_of_shapes,
    make_layout,
    num_rows,
    rows_of,
    subset,
)
from dash_shampoo.buckets.storage import MatrixStack, bind_, row_of, stack_
from dash_shampoo.buckets.transfer import GridsOfPiece, gather, grids_of_pieces, to_blocks

__all__ = [
    "ActiveLayout",
    "ActiveStack",
    "BlockSpec",
    "Bucket",
    "FactorSlots",
    "GridsOfPiece",
    "Layout",
    "MatrixStack",
    "Piece",
    "Rows",
    "StackSpec",
    "bind_",
    "gather",
    "grids_of_pieces",
    "layout_of_shapes",
    "make_layout",
    "num_rows",
    "row_of",
    "rows_of",
    "stack_",
    "subset",
    "to_blocks",
]
