"""Batched matrix products at a stated precision, and what counts them from outside."""

from dash_shampoo.products.counting import ProductCount, count_products
from dash_shampoo.products.identity import has_identity, multiple_of_identity
from dash_shampoo.products.precision import MatmulPrecision, exact_products, is_tf32_allowed
from dash_shampoo.products.product import Products

__all__ = [
    "MatmulPrecision",
    "ProductCount",
    "Products",
    "count_products",
    "exact_products",
    "has_identity",
    "is_tf32_allowed",
    "multiple_of_identity",
]
