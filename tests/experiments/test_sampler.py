import pytest
import torch

from experiments.sampler import BatchSampler


@pytest.mark.parametrize("num_tokens", [101, 107])
def test_an_epoch_visits_each_window_once(num_tokens):
    sampler = BatchSampler(torch.arange(num_tokens), 10, batch_size=3, seed=1)
    assert sampler.num_windows == 10
    windows = [row for _ in range(10) for row in sampler.next_batch().tolist()]
    for row in windows:
        assert row == list(range(row[0], row[0] + 11))
    epochs = [[row[0] for row in windows[e * 10 : e * 10 + 10]] for e in range(3)]
    assert all(sorted(epoch) == list(range(0, 100, 10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3


def test_batches_depend_on_the_seed_and_the_step_alone():
    tokens = torch.arange(1000)
    first, second, other = (BatchSampler(tokens, 10, 4, seed) for seed in (1, 1, 2))
    torch.rand(7)  # the global generator has no part in it
    whole = [first.next_batch() for _ in range(30)]
    assert torch.equal(whole[0], second.next_batch())
    assert not torch.equal(whole[0], other.next_batch())
    second.load_state_dict(BatchSampler(tokens, 10, 4, 1).state_dict() | {"step": 20})
    assert torch.equal(second.next_batch(), whole[20])


def test_processes_share_the_batch_of_one():
    tokens = torch.arange(500)
    one = BatchSampler(tokens, 10, 4, 3)
    two = [BatchSampler(tokens, 10, 4, 3) for _ in range(2)]
    for _ in range(15):
        shares = [sampler.next_batch(rank, 2) for rank, sampler in enumerate(two)]
        assert torch.equal(one.next_batch(), torch.cat(shares))
    whole = one.fixed_windows(3)
    shares = [one.fixed_windows(3, rank, 2) for rank in range(2)]
    assert (whole[0::2], whole[1::2]) == tuple(shares)


def test_fixed_windows_spread_over_the_sequence():
    sampler = BatchSampler(torch.arange(1001), 10, 4, 0)
    pieces = list(sampler.batches(sampler.fixed_windows(5), 3))
    assert [len(piece) for piece in pieces] == [3] * 6 + [2]
    assert torch.cat(pieces)[:, 0].tolist() == [50 * i for i in range(20)]
    short = BatchSampler(torch.arange(31), 10, 4, 0)
    assert short.fixed_windows(5) == [0, 1, 2]
    with pytest.raises(ValueError, match="has 3 windows of sequence_length=10, fewer than the 4"):
        short.fixed_windows(5, 0, 4)


def test_a_checkpoint_of_other_data_is_refused():
    state = BatchSampler(torch.arange(500), 10, 4, 3).state_dict()
    with pytest.raises(ValueError, match="num_windows=49, this run num_windows=99"):
        BatchSampler(torch.arange(1000), 10, 4, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=3"):
        BatchSampler(torch.arange(500), 10, 4, 4).load_state_dict(state)


def test_data_shorter_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="sequence_length=10"):
        BatchSampler(torch.arange(10), 10, 1, 0)
