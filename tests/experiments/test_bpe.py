import pytest
import torch

from experiments.bpe import encode, load_stdlib_bpe, train_bpe
from experiments.main import main

TEXT = "def f(x):\n    return x + 1\n\n\tß = 'é' # 中\r\n        pass"


def test_it_loses_nothing(corpus):
    texts = [path.read_text() for path in sorted(corpus.iterdir())]
    tokenizer = train_bpe(texts, 320)
    assert tokenizer.vocab_size() == 320
    for text in (TEXT, "", "\n", texts[3]):
        tokens = encode(tokenizer, [text]).tolist()
        assert tokens[-1] == tokenizer.eos_id()
        assert tokenizer.decode(tokens[:-1]) == text
    joined = encode(tokenizer, [TEXT, texts[0]]).tolist()
    assert joined == [t for text in (TEXT, texts[0]) for t in encode(tokenizer, [text]).tolist()]


def test_data_is_the_same_every_time(corpus):
    one, other = (load_stdlib_bpe(320, 20, str(corpus)) for _ in range(2))
    assert one.digest == other.digest
    assert torch.equal(one.train, other.train)
    assert one.vocab_size == 320
    assert one.train.max() < 320
    size = sum(len(path.read_bytes()) for path in corpus.iterdir())
    assert one.train.numel() + one.validation.numel() < size / 2
    assert load_stdlib_bpe(321, 20, str(corpus)).digest != one.digest


def test_sizes_out_of_range_are_refused(corpus):
    with pytest.raises(ValueError, match=r"data\.vocab_size=100 must lie in"):
        load_stdlib_bpe(100)
    with pytest.raises(ValueError, match=r"data\.vocab_size=60000: "):
        load_stdlib_bpe(60_000, 20, str(corpus))


def test_training(tiny, tmp_path):
    words = [*tiny, "data=stdlib_bpe", "data.vocab_size=320", "optimizer=adamw", "steps=2"]
    assert main(["train", *words, f"output_dir={tmp_path}"]) == 0
