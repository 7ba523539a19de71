import sysconfig
from pathlib import Path

import pytest
import torch

from experiments import corpus as corpus_module
from experiments.corpus import encode, is_held_out, load_text, train_bpe
from experiments.main import main

TEXT = "def f(x):\n    return x + 1\n\n\tß = 'é' # 中\r\n        pass"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


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
    data = load_text()
    again = load_text()
    assert data.vocab_size == 256
    assert data.digest == again.digest
    assert torch.equal(data.validation.parts[0], again.validation.parts[0])
    assert data.train.numel() > 5_000_000
    assert 0.01 < data.validation.numel() / data.train.numel() < 0.2
    stdlib = Path(sysconfig.get_paths()["stdlib"])
    part = data.validation if is_held_out("argparse.py", 5) else data.train
    assert (stdlib / "argparse.py").read_bytes() in as_bytes(part)


def test_no_file_is_in_both_parts(corpus):
    data = load_text(str(corpus), validation_percent=30)
    parts = [as_bytes(part) for part in (data.train, data.validation)]
    for path in corpus.iterdir():
        held_out = is_held_out(path.name, 30)
        assert path.read_bytes() + b"\0" in parts[held_out]
        assert path.read_bytes() not in parts[not held_out]


def test_folders_of_tests_and_packages_are_left_out(corpus, tmp_path):
    for path in corpus.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    digest = load_text(str(tmp_path), validation_percent=30).digest
    for folder in ("test", "site-packages/thing", "asyncio/tests"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "x.py").write_text("pass")
    assert load_text(str(tmp_path), validation_percent=30).digest == digest
    (tmp_path / "y.py").write_text("pass")
    assert load_text(str(tmp_path), validation_percent=30).digest != digest


def test_too_little_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data\.train: no file matches"):
        load_text(str(tmp_path))
    (tmp_path / "one.txt").write_text("one")
    with pytest.raises(ValueError, match=r"too few text files .*data\.validation"):
        load_text(str(tmp_path))
    with pytest.raises(ValueError, match="validation_percent=0 must lie in"):
        load_text(validation_percent=0)
    with pytest.raises(ValueError, match="tokenizer=words must be one of bytes, bpe"):
        load_text(tokenizer="words")
    with pytest.raises(ValueError, match="vocab_size=300, but bytes have a vocabulary of 256"):
        load_text(vocab_size=300)


def test_any_text_may_be_the_validation(corpus, tmp_path):
    (tmp_path / "held.txt").write_text("something else")
    (tmp_path / "picture.png").write_bytes(bytes(9))
    (tmp_path / ".hidden").write_text("x")
    data = load_text(str(corpus / "*.py"), [str(tmp_path)])
    assert as_bytes(data.validation) == b"something else\0"
    assert data.train.numel() == sum(len(p.read_bytes()) + 1 for p in corpus.iterdir())


def as_bytes(tokens):
    return bytes(tokens.parts[0].numpy())


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


def bpe(corpus, vocab_size):
    return load_text(str(corpus), tokenizer="bpe", vocab_size=vocab_size, validation_percent=20)


def test_data_is_the_same_every_time(corpus, monkeypatch):
    one = bpe(corpus, 320)
    assert one.vocab_size == 320
    assert one.train.largest() < 320
    size = sum(len(path.read_bytes()) for path in corpus.iterdir())
    assert one.train.numel() + one.validation.numel() < size / 2
    # The second time nothing is trained.
    with monkeypatch.context() as patch:
        patch.setattr(corpus_module, "train_bpe", None)
        other = bpe(corpus, 320)
    assert one.digest == other.digest
    for part in ("train", "validation"):
        first, second = getattr(one, part), getattr(other, part)
        assert torch.equal(first[0 : first.numel()], second[0 : second.numel()])
    assert bpe(corpus, 321).digest != one.digest


def test_a_cache_that_was_cut_off_is_made_anew(corpus, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    one = bpe(corpus, 320).train
    for path in (tmp_path / "dash_shampoo").glob("*.bin"):
        path.write_bytes(path.read_bytes()[:10])
    other = bpe(corpus, 320).train
    assert torch.equal(one[0 : one.numel()], other[0 : other.numel()])
    monkeypatch.setenv("XDG_CACHE_HOME", "/dev/null/nowhere")
    assert bpe(corpus, 320).train.numel() == one.numel()


def test_sizes_out_of_range_are_refused(corpus):
    with pytest.raises(ValueError, match=r"data\.vocab_size=100 must lie in"):
        bpe(corpus, 100)
    with pytest.raises(ValueError, match=r"data\.vocab_size=60000: "):
        bpe(corpus, 60_000)


def test_training(tiny, tmp_path):
    words = [*tiny, "data=stdlib_bpe", "data.vocab_size=320", "optimizer=adamw", "steps=2"]
    assert main(["train", *words, f"output_dir={tmp_path}"]) == 0
