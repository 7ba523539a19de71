"""What `tools/tune.py` makes of its measurements."""

import json
from importlib.util import find_spec

import pytest
import torch

from benchmarks.device_counts import DeviceCounts
from dash_shampoo.inverse_root import eigh_device
from dash_shampoo.products.tiles import TABLE, Tiles
from tools import tune


def test_equal_neighbours_are_one_row_and_the_last_is_for_any_size():
    rows = [(32, (32, 4)), (64, (64, 4)), (128, (64, 4)), (256, (128, 8)), (512, (128, 8))]
    assert tune.merged(rows) == [[32, 32, 4], [128, 64, 4], [0, 128, 8]]


def test_a_written_table_reads_as_it_was(tmp_path):
    path = tmp_path / "tiles.json"
    table = json.loads(TABLE.read_text())
    path.write_text(TABLE.read_text())
    measured = {kernel: {"fp16": [[0, 64, 32, 4, 3]]} for kernel in tune.KERNELS}
    tune.write_tiles(path, measured, "sm_90", "a device")
    written = json.loads(path.read_text())
    assert written["provenance"].pop("sm_90").startswith("Measured on a device, torch ")
    table["provenance"].pop("sm_90")
    for kernel, rows in measured.items():
        assert written[kernel].pop("sm_90") == rows
        table[kernel].pop("sm_90")
    assert written == table
    tune.write_tiles(path, {}, "sm_80", "another")
    assert path.read_text().count("\n") > 40, "a line for every precision"


def test_the_committed_table_is_as_it_is_written(tmp_path):
    path = tmp_path / "tiles.json"
    path.write_text(TABLE.read_text())
    tune.write_tiles(path, {}, "sm_90", "a device")
    assert path.read_text().splitlines()[6:] == TABLE.read_text().splitlines()[6:]


@pytest.mark.skipif(find_spec("triton") is None, reason="the kernels need triton")
@pytest.mark.parametrize("kernel", tune.KERNELS)
def test_the_fastest_candidate_is_taken(kernel, monkeypatch):
    """Kernels are launched with every candidate; where all fail, torch's products serve."""
    launched = []

    class Kernel:
        def __getitem__(self, grid):
            assert grid[0] > 0
            return self.launch

        def launch(self, *arguments, TILE, STEP, num_warps, num_stages, **options):
            if is_broken:
                raise RuntimeError("out of resource: shared memory")
            launched.append(Tiles(0, TILE, STEP, num_warps, num_stages))

    def milliseconds(call):
        before = len(launched)
        call()
        # The last candidate is the fastest, and torch the slowest.
        return 1.0 / (1 + len(set(launched))) if len(launched) > before else 2.0

    for name in ("symmetric_square", "accumulate_outer", "two_sided"):
        monkeypatch.setattr(f"dash_shampoo.products.kernels.{name}", Kernel())
    monkeypatch.setattr(tune, "queued_milliseconds", milliseconds)
    monkeypatch.setattr(tune, "ELEMENTS", 2**12)
    tiles_of, precisions = tune.KERNELS[kernel]
    with DeviceCounts({}, default=""):
        for precision in ("tf32", precisions[0]):
            is_broken = False
            launched.clear()
            best = tiles_of(precision, 32)
            candidates = tune.SIDED_CANDIDATES if kernel == "two_sided" else tune.CANDIDATES
            assert set(launched) == set(candidates)
            assert best == candidates[-1]
            is_broken = True
            assert tiles_of(precision, 32) == tune.TORCH


def test_both_sides_have_no_kernel_beyond_256():
    assert tune.sided_tiles("fp16", 257) == tune.TORCH


def test_rows_of_the_cpu_s_wins_have_no_gap():
    assert tune.rows_of_wins({16: 16, 32: 16, 64: 16, 256: 1}) == [[64, 16]]
    assert tune.rows_of_wins({16: 4, 32: 64}) == [[16, 4], [32, 64]]
    assert tune.rows_of_wins({16: 64, 32: 4}) == [[32, 64]]
    assert tune.rows_of_wins({32: 4}) == []


def test_a_written_table_decides_where_eigenvectors_are_computed(tmp_path, monkeypatch):
    path = tmp_path / "eigh.json"
    path.write_text(eigh_device.TABLE.read_text())
    tune.write_eigh(path, [[16, 4], [32, 64]], "sm_90", "a device")
    monkeypatch.setattr(eigh_device, "TABLE", path)
    eigh_device._rows.cache_clear()
    try:
        wins = [
            (n, b)
            for n in (16, 32, 64)
            for b in (1, 4, 64)
            if eigh_device.is_faster_on_the_cpu("sm_90", b, n)
        ]
        assert wins == [(16, 4), (16, 64), (32, 64)]
        A = torch.eye(16).expand(4, 16, 16).contiguous()
        with DeviceCounts({}, default="") as device:
            device.place([A])
            assert eigh_device.eigh_device(A, None).type == "cpu"
            assert eigh_device.eigh_device(A[:3], None).type == "cuda"
            assert eigh_device.eigh_device(A, "cuda").type == "cuda", "the user's word decides"
    finally:
        eigh_device._rows.cache_clear()
