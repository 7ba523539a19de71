"""Every row of the table of tiles, compiled for the devices that it is for: what its machine code uses."""

from __future__ import annotations

import re

import pytest

from dash_shampoo.products.fused import FUSED_PRECISIONS
from dash_shampoo.products.outer import OUTER_PRECISIONS
from dash_shampoo.products.sides import SIDED_PRECISIONS
from dash_shampoo.products.tiles import tile_table

PRECISIONS = {
    "square": FUSED_PRECISIONS,
    "outer": OUTER_PRECISIONS,
    "outer_small": OUTER_PRECISIONS,
    "two_sided": SIDED_PRECISIONS,
}
# Of what one block may have; CUDA C Programming Guide, table of technical specifications. The rows of sm_80
# also serve 8.6, 8.9 and 12.0, which have the least.
SHARED_MEMORY = {"sm_80": 99 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024}
TENSOR_CORES = {
    "sm_80": r"\bmma\.sync",
    "sm_90": r"wgmma\.mma_async",
    "sm_100": r"tcgen05\.mma",
}
# Those multiply tiles of 64 rows and more.
SMALL_TENSOR_CORES, LEAST_TILE = r"\bmma\.sync", 64

# Tables that are equal on several devices are compiled for each.
CONFIGURATIONS = [
    pytest.param(name, device, precision, tiles, id=f"{name}-{device}-{precision}-{tiles.max_size}")
    for name in PRECISIONS
    for device, rows in tile_table(name).items()
    for precision, of_precision in rows.items()
    for tiles in of_precision
    if tiles.tile
]


@pytest.mark.parametrize("name", PRECISIONS)
def test_the_table_is_whole(name):
    assert set(tile_table(name)) == set(SHARED_MEMORY)
    for rows in tile_table(name).values():
        assert set(rows) == set(PRECISIONS[name])
        for tiles in rows.values():
            assert [row.max_size == 0 for row in tiles] == [False] * (len(tiles) - 1) + [True]


def constants(name, tiles):
    """The further compile-time arguments of a kernel, at their most demanding."""
    match name:
        case "outer" | "outer_small":
            return dict.fromkeys(("IS_PACKED", "IS_NESTED"), name == "outer_small")
        case "two_sided":
            assert tiles.max_size, "a tile of rows has to fit the registers"
            return {"WIDTH": tiles.max_size}
    return {}


@pytest.mark.parametrize(("name", "device", "precision", "tiles"), CONFIGURATIONS)
def test_a_kernel_compiles_to_the_units_of_its_precision_without_spills(
    name, device, precision, tiles, tmp_path
):
    pytest.importorskip("triton", reason="the kernels need triton")
    from tests.products.compiling import compile_kernel, resources

    kernel = "outer" if name == "outer_small" else name
    compiled = compile_kernel(kernel, device, precision, tiles, **constants(name, tiles))
    if precision == "fp32":
        used = "|".join((SMALL_TENSOR_CORES, *TENSOR_CORES.values()))
        assert not re.search(used, compiled.asm["ptx"]), "they round to TF32"
        assert len(re.findall(r"\bfma\.rn\.f32", compiled.asm["ptx"])) > tiles.step
    else:
        pattern = TENSOR_CORES[device] if tiles.tile >= LEAST_TILE else SMALL_TENSOR_CORES
        assert re.search(pattern, compiled.asm["ptx"]), "no tensor cores"
    used = resources(compiled, tmp_path)
    assert used["STACK"] == used["LOCAL"] == 0, f"registers are spilled: {used}"
    assert compiled.metadata.shared <= SHARED_MEMORY[device]
