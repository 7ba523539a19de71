"""Batched matrix products at a stated precision, by kernels of their own where they pay, and their count."""

from dash_shampoo.products.counting import ProductCount, count_products
from dash_shampoo.products.fused import norm_parts
from dash_shampoo.products.identity import has_identity, multiple_of_identity
from dash_shampoo.products.outer import accumulate_outer_, can_use_outer
from dash_shampoo.products.precision import (
    MatmulPrecision,
    exact_products,
    is_tf32_allowed,
    plain_products,
)
from dash_shampoo.products.product import Products, weighted_sum
from dash_shampoo.products.sides import can_use_two_sided, two_sided
from dash_shampoo.products.tiles import assumed_kernels

__all__ = [
    "MatmulPrecision",
    "ProductCount",
    "Products",
    "accumulate_outer_",
    "assumed_kernels",
    "can_use_outer",
    "can_use_two_sided",
    "count_products",
    "exact_products",
    "has_identity",
    "is_tf32_allowed",
    "multiple_of_identity",
    "norm_parts",
    "plain_products",
    "two_sided",
    "weighted_sum",
]
