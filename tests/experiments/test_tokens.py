import json

import numpy as np
import pytest
import torch

from experiments.sampler import BatchSampler
from experiments.tokens import TokenSequence, load_token_files, write_tokens


def write(path, tokens, dtype="<u2"):
    path.write_bytes(np.asarray(list(tokens), dtype).tobytes())
    return path


def with_header(path, tokens, magic=20240520, dtype="<u2", count=None):
    tokens = np.asarray(list(tokens), dtype)
    header = np.zeros(256, "<i4")
    header[:3] = magic, 1, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.tobytes())
    return path


def everything(tokens):
    return tokens[0 : tokens.numel()].tolist()


def test_a_sequence_of_several_parts_reads_as_one():
    parts = [torch.arange(0, 7), torch.arange(7, 8), torch.arange(8, 20)]
    one = TokenSequence([part.to(torch.uint16) for part in parts])
    whole = torch.arange(20)
    assert one.numel() == 20
    for start in range(20):
        for stop in range(start, 23):
            assert torch.equal(one[start:stop], whole[start:stop]), (start, stop)
    assert one[3:12].dtype == torch.int64


def test_the_largest_token_is_found_by_any_number_of_processes():
    tokens = TokenSequence([torch.arange(100, dtype=torch.int32), torch.tensor([7, 70000, 3])])
    assert tokens.largest() == 70000
    assert max(tokens.largest(rank, 2) for rank in range(2)) == 70000
    assert TokenSequence([torch.tensor([65535]).to(torch.uint16)]).largest() == 65535


def test_shards_are_mapped_as_one(tmp_path):
    write(tmp_path / "train_0.bin", range(100))
    write(tmp_path / "train_1.bin", range(60_000, 60_050))
    held_out = write(tmp_path / "validation.bin", [1, 2, 3])
    data = load_token_files(str(tmp_path / "train_*.bin"), str(held_out), 65_536)
    assert everything(data.train) == [*range(100), *range(60_000, 60_050)]
    assert everything(data.validation) == [1, 2, 3]
    batch = BatchSampler(data.train, 49, 3, seed=0).next_batch()
    assert batch.dtype == torch.int64
    assert sorted(batch[:, 0].tolist()) == [0, 49, 98]
    assert [name for name, _ in data.unchecked] == [
        str(tmp_path / name) for name in ("train_0.bin", "train_1.bin", "validation.bin")
    ]


@pytest.mark.parametrize(("vocab_size", "width"), [(300, 2), (1 << 16, 2), (70_000, 4)])
def test_what_is_written_is_read(vocab_size, width, tmp_path):
    tokens = torch.arange(0, vocab_size, 7)
    sidecar = write_tokens(tmp_path / "a.bin", tokens, vocab_size, "numbers")
    assert (tmp_path / "a.bin").stat().st_size == width * tokens.numel()
    assert (sidecar.count, sidecar.vocab_size) == (tokens.numel(), vocab_size)
    # The sidecar tells the vocabulary and the dtype, and is no data itself.
    data = load_token_files(str(tmp_path / "a.*"), str(tmp_path / "a.bin"))
    assert data.vocab_size == vocab_size
    assert everything(data.train) == tokens.tolist()
    assert data.unchecked == ()
    before = data.digest
    write_tokens(tmp_path / "a.bin", tokens.flip(0), vocab_size, "numbers")
    assert load_token_files(str(tmp_path / "a.bin"), str(tmp_path / "a.bin")).digest != before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.bin", "a.bin.json"]


def test_headers_are_read(tmp_path):
    old = with_header(tmp_path / "gpt2.bin", range(50_000, 50_257))
    new = with_header(tmp_path / "llama3.bin", range(128_000, 128_100), 20240801, "<u4")
    data = load_token_files(str(old), str(new), 128_256)
    assert everything(data.train) == list(range(50_000, 50_257))
    assert everything(data.validation) == list(range(128_000, 128_100))


def test_broken_files_are_refused(tmp_path):
    good = str(write(tmp_path / "good.bin", [1, 2, 3]))
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").touch()
    with_header(tmp_path / "short.bin", range(5), count=9)
    with_header(tmp_path / "bare.bin", [])
    write_tokens(tmp_path / "cut.bin", torch.arange(9), 10, "")
    (tmp_path / "cut.bin").write_bytes(bytes(8))
    write(tmp_path / "other.bin", [1])
    (tmp_path / "other.bin.json").write_text(json.dumps({"name": "somebody else's"}))
    for name, message in [
        ("odd.bin", r"odd.bin has 3 bytes; a file of torch.uint16 tokens has 2 per token"),
        ("empty.bin", r"empty.bin has 0 bytes: it is empty"),
        ("bare.bin", r"bare.bin has 1024 bytes: it is empty"),
        ("short.bin", r"short.bin has 5 tokens, but its header says 9"),
        ("cut.bin", r"cut.bin has 4 tokens, but its sidecar says 9"),
        ("other.bin", r"other.bin.json is not a sidecar"),
        ("none_*.bin", r"data\.validation: no file matches"),
        ("missing.bin", r"data\.validation: no file matches"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_token_files(good, str(tmp_path / name), 10)
    with pytest.raises(ValueError, match=r"data\.vocab_size must be given"):
        load_token_files(good, good)
    write_tokens(tmp_path / "large.bin", torch.arange(9), 300, "")
    with pytest.raises(ValueError, match=r"large.bin has a vocabulary of 300: use that"):
        load_token_files(good, str(tmp_path / "large.bin"), 10)
