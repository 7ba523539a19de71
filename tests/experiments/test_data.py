import sysconfig
from pathlib import Path

import pytest
import torch

from experiments.data import (
    BatchSampler,
    is_held_out,
    load_stdlib_bytes,
    load_token_files,
)


def write_tokens(path, tokens):
    path.write_bytes(b"".join(int(t).to_bytes(2, "little") for t in tokens))
    return path


def test_the_split_is_the_same_everywhere():
    # Literals: a change of the hash or of the rule would move files between the parts in silence.
    names = [
        "abc.py",
        "argparse.py",
        "json/decoder.py",
        "os.py",
        "typing.py",
        "zipfile/__init__.py",
    ]
    held_out = ["abc.py", "typing.py", "zipfile/__init__.py"]
    assert [name for name in names if is_held_out(name, 50)] == held_out
    count = sum(is_held_out(f"file_{i}.py", 10) for i in range(2000))
    assert 150 < count < 250


def test_standard_library():
    data = load_stdlib_bytes()
    again = load_stdlib_bytes()
    assert data.vocab_size == 256
    assert data.digest == again.digest
    assert torch.equal(data.validation, again.validation)
    assert data.train.numel() > 5_000_000
    assert 0.01 < data.validation.numel() / data.train.numel() < 0.2
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    part = data.validation if is_held_out("argparse.py", 5) else data.train
    assert (stdlib / "argparse.py").read_bytes() in bytes(part.numpy())


def test_no_file_is_in_both_parts(corpus):
    data = load_stdlib_bytes(validation_percent=30, root=str(corpus))
    parts = [bytes(part.numpy()) for part in (data.train, data.validation)]
    for path in corpus.iterdir():
        held_out = is_held_out(path.name, 30)
        assert path.read_bytes() + b"\0" in parts[held_out]
        assert path.read_bytes() not in parts[not held_out]


def test_folders_of_tests_and_packages_are_left_out(corpus, tmp_path):
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    digest = load_stdlib_bytes(validation_percent=30, root=str(tmp_path)).digest
    for folder in ("test", "site-packages/thing", "asyncio/tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text("pass")
    assert load_stdlib_bytes(validation_percent=30, root=str(tmp_path)).digest == digest
    (tmp_path / "y.py").write_text("pass")
    assert load_stdlib_bytes(validation_percent=30, root=str(tmp_path)).digest != digest


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"too few Python source files .*data\.root"):
        load_stdlib_bytes(root=str(tmp_path))
    with pytest.raises(ValueError, match="validation_percent=0 must lie in"):
        load_stdlib_bytes(validation_percent=0)


def test_token_files(tmp_path):
    write_tokens(tmp_path / "train_0.bin", range(100))
    write_tokens(tmp_path / "train_1.bin", range(60_000, 60_050))
    held_out = write_tokens(tmp_path / "validation.bin", [1, 2, 3])
    data = load_token_files(str(tmp_path / "train_*.bin"), str(held_out), 65_536)
    assert data.train.tolist() == [*range(100), *range(60_000, 60_050)]
    assert data.validation.tolist() == [1, 2, 3]
    batch = BatchSampler(data.train, 49, 3, seed=0).next_batch()
    assert batch.dtype == torch.int64
    assert sorted(batch[:, 0].tolist()) == [0, 49, 98]


def test_broken_token_files_are_refused(tmp_path):
    good = str(write_tokens(tmp_path / "good.bin", [1, 2, 3]))
    odd = tmp_path / "odd.bin"
    odd.write_bytes(b"abc")
    (tmp_path / "empty.bin").touch()
    with pytest.raises(ValueError, match=r"odd.bin has 3 bytes"):
        load_token_files(good, str(odd), 10)
    with pytest.raises(ValueError, match=r"empty.bin has 0 bytes"):
        load_token_files(str(tmp_path / "empty.bin"), good, 10)
    with pytest.raises(ValueError, match=r"data\.train: no file matches"):
        load_token_files(str(tmp_path / "none_*.bin"), good, 10)
    with pytest.raises(ValueError, match="vocab_size=65537"):
        load_token_files(good, good, 65_537)


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
    whole = torch.cat(list(one.fixed_batches(3)))
    shares = [torch.cat(list(one.fixed_batches(3, rank, 2))) for rank in range(2)]
    assert torch.equal(whole[0::2], shares[0])
    assert torch.equal(whole[1::2], shares[1])


def test_fixed_batches_spread_over_the_sequence():
    sampler = BatchSampler(torch.arange(1001), 10, 4, 0)
    rows = torch.cat(list(sampler.fixed_batches(5)))[:, 0]
    assert rows.tolist() == [50 * i for i in range(20)]
    short = BatchSampler(torch.arange(31), 10, 4, 0)
    assert torch.cat(list(short.fixed_batches(5)))[:, 0].tolist() == [0, 10, 20]


def test_a_checkpoint_of_other_data_is_refused():
    state = BatchSampler(torch.arange(500), 10, 4, 3).state_dict()
    with pytest.raises(ValueError, match="num_windows=49, this run num_windows=99"):
        BatchSampler(torch.arange(1000), 10, 4, 3).load_state_dict(state)
    with pytest.raises(ValueError, match="seed=3"):
        BatchSampler(torch.arange(500), 10, 4, 4).load_state_dict(state)


def test_data_shorter_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="sequence_length=10"):
        BatchSampler(torch.arange(10), 10, 1, 0)
