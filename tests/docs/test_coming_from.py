"""The table of DashConfig's fields names what exists here."""

import dataclasses
import inspect
import re

import dash_shampoo
from dash_shampoo import DashShampoo
from dash_shampoo.base import DistributedShampoo
from tests.docs.markdown import ROOT, table

ROWS = table((ROOT / "docs" / "coming-from.md").read_text(), "`DashConfig`")
# A function, a method, and two values of theirs.
FUNCTIONS = {"param_groups", "model.named_parameters()", "ADAMW", "SHAMPOO"}


def known_names() -> set[str]:
    """Public classes, their fields, and the arguments of the optimizer."""
    names = set(dash_shampoo.__all__) | set(inspect.signature(DistributedShampoo).parameters)
    for name in dash_shampoo.__all__:
        value = getattr(dash_shampoo, name)
        if dataclasses.is_dataclass(value):
            names |= {field.name for field in dataclasses.fields(value)}
    return names


def test_every_counterpart_exists():
    assert issubclass(DashShampoo, DistributedShampoo)
    counterparts = {name for _, ours in ROWS for name in re.findall(r"`([^`]+)`", ours)}
    assert len(counterparts) > 25
    assert counterparts - FUNCTIONS - known_names() == set()


def test_no_field_is_named_twice_or_missing():
    fields = [name for theirs, _ in ROWS for name in re.findall(r"`([^`]+)`", theirs)]
    lower = [name for name in fields if not name.isupper()]
    assert len(lower) == len(set(lower)) == 26
