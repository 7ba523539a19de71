"""Which processes are replicas, what is said where they are not, and errors that only one of them has."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch

import dash_shampoo as ds
from tests.distributed import replica_workers
from tests.distributed.processes import run


def assert_equal(found, expected):
    for p, q in zip(found, expected, strict=True):
        # Blocks are stacked with others than in one process, which changes round-off.
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("given", ["mesh", "process group"])
def test_stages_of_a_pipeline_are_no_replicas(given, tmp_path):
    results = run(4, replica_workers.stages, tmp_path, given)
    for result in results:
        for found in result["found"]:
            assert_equal(found, result["expected"])
        # Each process alone, for state that nobody else has; pairs are the mesh's.
        assert result["num_made"] <= 2
    assert not torch.equal(results[0]["expected"][0], results[1]["expected"][0])


@pytest.mark.parametrize(("size", "most"), [(-1, 1), (2, 2), (1, 2)])
def test_one_process_group_serves_all_parameter_groups(size, most, tmp_path):
    made = run(4, replica_workers.groups, tmp_path, size)
    assert max(made) <= most


@pytest.mark.parametrize(
    ("kind", "text"),
    [
        ("shapes", r"parameter 2 of shape (6, 5) (torch.float32) instead of (6, 6)"),
        ("numbers", "2 parameters instead of 4"),
    ],
)
def test_other_parameters_are_refused_on_every_rank(kind, text, tmp_path):
    for said in run(2, replica_workers.others, tmp_path, kind):
        assert said[0] == "ValueError"
        assert text in said[1]
        assert "Rank 1 is taken for a replica of rank 0" in said[1]
        assert "DashDDPDistributedConfig(replicas=...)" in said[1]


def test_other_values_are_warned_of(tmp_path):
    for records in run(2, replica_workers.others, tmp_path, "values"):
        warnings = [record for record in records if "parameters of rank 1 differ" in record]
        assert len(warnings) == 1


@pytest.mark.parametrize("communicate_params", [False, True])
@pytest.mark.parametrize("where", ["_update_preconditioners", "_precondition_and_grafting"])
def test_an_error_of_one_rank_reaches_all(where, communicate_params, tmp_path):
    results = run(3, replica_workers.failing, tmp_path, where, communicate_params)
    for rank, result in enumerate(results):
        kind, text = result["said"]
        if rank == 1:
            assert (kind, text) == ("ZeroDivisionError", "the owner's own error")
        else:
            assert kind == "RuntimeError"
            assert "step failed on rank 1" in text
        assert_equal(result["after"], results[0]["after"])
        assert all(p.isfinite().all() for p in result["after"])


@pytest.mark.parametrize("communicate_params", [False, True])
def test_a_group_computes_while_the_gather_of_the_one_before_is_under_way(
    communicate_params, tmp_path
):
    for result in run(2, replica_workers.overlapping, tmp_path, communicate_params):
        assert result["events"] == [
            ("compute", 0), ("send", 0),
            ("compute", 1), ("arrive", 0), ("send", 1),
            ("compute", 2), ("arrive", 1), ("send", 2),
            ("compute", 3), ("arrive", 2), ("send", 3), ("arrive", 3),
        ]  # fmt: skip
        for p, q in zip(result["overlapped"], result["one by one"], strict=True):
            assert torch.equal(p, q)


@pytest.mark.parametrize("number", [0, 2])
def test_an_error_in_one_of_several_groups_reaches_all(number, tmp_path):
    results = run(2, replica_workers.failing_in_a_group, tmp_path, number)
    assert results[1]["said"] == ("ZeroDivisionError", "the owner's own error")
    assert results[0]["said"][0] == "RuntimeError"
    assert "step failed on rank 1" in results[0]["said"][1]
    for result in results:
        # Those before it are updated, those behind it aren't; of its own some blocks may be.
        assert all(result["moved"][:number])
        assert not any(result["moved"][number + 1 :])
        assert_equal(result["after"], results[0]["after"])


def test_uneven_inputs_end_with_an_error_on_all_ranks(tmp_path):
    (first, first_steps), (second, second_steps) = run(2, replica_workers.joining, tmp_path)
    assert (first_steps, second_steps) == (3, 3)
    assert first[0] == second[0] == "RuntimeError"
    assert "step failed on rank 1" in first[1]
    assert "Rank 1 has no more batches while others still step" in second[1]


def test_an_error_that_is_noticed_late_reaches_all(tmp_path):
    said = run(3, replica_workers.failing_late, tmp_path)
    assert said[1] == ("ZeroDivisionError", "noticed late")
    for rank in (0, 2):
        assert said[rank][0] == "RuntimeError"
        assert "step failed on another rank" in said[rank][1]


@pytest.mark.parametrize("mode", ["steps", "eval first"])
@pytest.mark.parametrize(
    "config", [ds.ScheduleFreeConfig(), ds.GeneralizedPrimalAveragingConfig()], ids=["sf", "gpa"]
)
def test_averaging_begins_at_the_weights_of_the_first_step(config, mode, tmp_path):
    for result in run(2, replica_workers.averaging, tmp_path, config, mode):
        for found, expected in zip(result["found"], result["expected"], strict=True):
            assert_equal(found, expected)


def test_a_config_with_a_process_group_can_be_copied_and_saved():
    config = ds.DashDDPDistributedConfig(replicas=threading_lock(), communicate_params=True)
    assert copy.deepcopy({"config": config})["config"] is config
    loaded = pickle.loads(pickle.dumps(config))
    assert loaded.replicas is None
    assert loaded.communicate_params


def threading_lock():
    """Something that cannot be pickled or copied, as a process group."""
    import threading

    return threading.Lock()


def test_a_mesh_of_replicas_has_one_dimension(tmp_path):
    for said in run(4, replica_workers.two_dimensions, tmp_path):
        assert said[0] == "ValueError"
        assert "must be a mesh of one dimension" in said[1]
