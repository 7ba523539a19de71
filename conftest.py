"""Which files pytest can import: kernels are made of Triton, which there is for Linux alone."""

import importlib.util

collect_ignore = (
    []
    if importlib.util.find_spec("triton")
    else [
        "dash_shampoo/products/kernels.py",
        "tests/products/compiling.py",
        "tests/products/interpreted.py",
    ]
)
