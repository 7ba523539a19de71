"""The ledger: which outcome leads to which exception, warning or repair."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest
import torch

import dash_shampoo as ds
from dash_shampoo.inverse_root import InverseRootStatus as Status
from dash_shampoo.safety import FailureLedger

SLOTS = ((0, 0), (0, 1), (1, 0), (2, 0))


def ledger(safety=None, tolerated=1):
    blocks = [
        SimpleNamespace(
            factor_matrix_indices=(f"{i}.block_0.0", f"{i}.block_0.1"),
            _failed_amortized_computation_counter=0,
        )
        for i in range(3)
    ]
    return FailureLedger(blocks, ["a", "b", "c"], tolerated, safety), blocks


def status(**codes):
    values = [codes.get(f"s{i}", Status.SUCCESS) for i in range(len(SLOTS))]
    return torch.tensor([int(v) for v in values], dtype=torch.uint8)


def test_success_needs_nothing():
    book, _ = ledger()
    book.record(SLOTS, status())
    assert book.settle() == []
    assert book.counts() == {}
    assert book.settle() == []


@pytest.mark.parametrize("code", [Status.NON_FINITE_INPUT, Status.NON_FINITE_RESULT])
def test_not_finite_raises_and_names_the_lowest_block(code):
    book, _ = ledger()
    book.record(SLOTS, status(s1=code, s3=code))
    with pytest.raises(ds.PreconditionerValueError, match=r"0\.block_0\.1 of a"):
        book.settle()


def test_failures_are_tolerated_in_a_row_as_configured():
    book, blocks = ledger(tolerated=1)
    book.record(SLOTS, status(s2=Status.FAILED))
    assert book.settle() == []
    assert blocks[1]._failed_amortized_computation_counter == 1
    book.record(SLOTS, status())
    book.settle()
    assert blocks[1]._failed_amortized_computation_counter == 0
    for _ in range(1):
        book.record(SLOTS, status(s2=Status.FAILED))
        book.settle()
    book.record(SLOTS, status(s2=Status.FAILED))
    with pytest.raises(ValueError, match=r"1\.block_0\.0 of b.*2 times in a row"):
        book.settle()
    assert book.counts() == {"b": 3}


def test_two_failures_of_one_block_in_one_refresh_count_once():
    book, blocks = ledger()
    book.record(SLOTS, status(s0=Status.FAILED, s1=Status.FAILED))
    book.settle()
    assert blocks[0]._failed_amortized_computation_counter == 1


def test_a_block_is_warned_of_once(caplog):
    book, _ = ledger(tolerated=9)
    with caplog.at_level(logging.WARNING, logger="dash_shampoo"):
        for _ in range(3):
            book.record(SLOTS, status(s2=Status.FAILED))
            book.settle()
    assert len(caplog.records) == 1
    assert "1.block_0.0 of b" in caplog.text


def test_the_iteration_cap_is_only_a_warning(caplog):
    book, _ = ledger()
    with caplog.at_level(logging.WARNING, logger="dash_shampoo"):
        for _ in range(2):
            book.record(SLOTS, status(s0=Status.MAX_ITERATIONS))
            assert book.settle() == []
    assert len(caplog.records) == 1
    assert book.counts() == {}


@pytest.mark.parametrize("policy", ["repair", "keep"])
@pytest.mark.parametrize(
    "code", [Status.NON_FINITE_RESULT, Status.FAILED, Status.INACCURATE, Status.NON_FINITE_INPUT]
)
def test_with_safety_bad_slots_are_returned_and_counted(policy, code):
    book, _ = ledger(ds.SafetyConfig(policy=policy))
    book.record(SLOTS, status(s1=code, s3=code))
    assert book.settle() == [(0, 1), (2, 0)]
    assert book.counts() == {"a": 1, "c": 1}


def test_with_policy_raise_the_lowest_bad_block_is_named():
    book, _ = ledger(ds.SafetyConfig(policy="raise"))
    book.record(SLOTS, status(s3=Status.INACCURATE, s2=Status.FAILED))
    with pytest.raises(ds.PreconditionerValueError, match=r"1\.block_0\.0 of b"):
        book.settle()


def test_only_the_latest_outcome_of_a_slot_asks_for_repair():
    book, _ = ledger(ds.SafetyConfig())
    book.record(SLOTS, status(s1=Status.INACCURATE, s2=Status.INACCURATE))
    book.record(SLOTS, status(s1=Status.INACCURATE))
    assert book.settle() == [(0, 1)]
    assert book.counts() == {"a": 2, "b": 1}
