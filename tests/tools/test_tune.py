"""What `tools/tune.py` makes of its measurements."""

import json

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
