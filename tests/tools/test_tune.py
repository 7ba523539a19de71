"""What `tools/tune.py` makes of its measurements."""

import json

import torch

from benchmarks.device_counts import DeviceCounts
from dash_shampoo.inverse_root import eigh_device
from dash_shampoo.products import fused
from tools import tune


def test_equal_neighbours_are_one_row_and_the_last_is_for_any_size():
    rows = [(32, (32, 4)), (64, (64, 4)), (128, (64, 4)), (256, (128, 8)), (512, (128, 8))]
    assert tune.merged(rows) == [[32, 32, 4], [128, 64, 4], [0, 128, 8]]


def test_a_written_table_reads_as_it_was(tmp_path):
    path = tmp_path / "tiles.json"
    table = json.loads(fused.TABLE.read_text())
    path.write_text(fused.TABLE.read_text())
    tune.write_tiles(path, {"fp16": [[0, 64, 32, 4, 3]]}, "sm_90", "a device")
    written = json.loads(path.read_text())
    assert written["square"].pop("sm_90") == {"fp16": [[0, 64, 32, 4, 3]]}
    assert written["provenance"].pop("sm_90").startswith("Measured on a device, torch ")
    for part in ("square", "provenance"):
        table[part].pop("sm_90")
        assert written[part] == table[part]


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
