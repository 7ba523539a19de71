import json
import re
import sys
from types import ModuleType

import pytest
import torch

from experiments.main import main
from experiments.tokens import load_token_files, read_sidecar


def data(*words):
    return main(["data", *map(str, words)])


def texts_of(tokens):
    return bytes(tokens[0 : tokens.numel()].tolist()).split(b"\0")[:-1]


def test_text_becomes_token_files_that_can_be_trained_on(corpus, tiny, tmp_path, capsys):
    assert data("text", corpus, "--percent", 20, "--out", tmp_path) == 0
    printed = capsys.readouterr().out
    found = load_token_files(str(tmp_path / "train.bin"), str(tmp_path / "validation.bin"))
    parts = [*texts_of(found.train), *texts_of(found.validation)]
    assert sorted(parts) == sorted(path.read_bytes() for path in corpus.iterdir())
    assert found.unchecked == ()
    command = printed.splitlines()[-1].split()
    own = [word for word in tiny if not word.startswith("data.")]
    assert command[:4] == ["python", "-m", "experiments", "train"]
    assert (
        main([*command[3:], *own, "optimizer=adamw", "steps=1", f"output_dir={tmp_path / 'run'}"])
        == 0
    )


def test_byte_pairs_keep_their_model(corpus, tmp_path):
    (tmp_path / "held.txt").write_text("name_1 import")
    words = ["--tokenizer", "bpe", "--vocab", 320, "--out", tmp_path / "out"]
    assert data("text", corpus, "--validation", tmp_path / "held.txt", *words) == 0
    sidecar = read_sidecar(tmp_path / "out" / "train.bin")
    assert (sidecar.vocab_size, sidecar.dtype) == (320, "uint16")
    from sentencepiece import SentencePieceProcessor

    tokenizer = SentencePieceProcessor(model_file=str(tmp_path / "out" / "tokenizer.model"))
    held_out = load_token_files(*[str(tmp_path / "out" / "validation.bin")] * 2).train
    assert tokenizer.decode(held_out[0 : held_out.numel() - 1].tolist()) == "name_1 import"


MISTAKES = [
    (["text", "nowhere/", "--out", "o"], "data text: no file matches 'nowhere/'"),
    (["text", "{corpus}", "--vocab", "300", "--out", "o"], "--vocab 300, but bytes have"),
    (["text", "{corpus}/module_0.py", "--out", "o"], "or --validation"),
    (
        ["text", "{corpus}", "--tokenizer", "bpe", "--vocab", "60000", "--out", "o"],
        "vocab_size=60000",
    ),
]


@pytest.mark.parametrize(("words", "message"), MISTAKES, ids=[m for _, m in MISTAKES])
def test_a_mistake_is_one_sentence(words, message, corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert data(*(word.replace("{corpus}", str(corpus)) for word in words)) == 2
    error = capsys.readouterr().err
    assert error.startswith("experiments: error: ")
    assert message in error
    assert error.count("\n") == 1


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """Stand-ins for what needs the network; what they return is what the real ones do."""
    datasets, hub = ModuleType("datasets"), ModuleType("huggingface_hub")
    rows = [{"text": f"document {number}"} for number in range(2500)]
    datasets.load_dataset = lambda name, config, split, streaming, **more: iter(rows)
    chunks = {"chunk_0": [1, 2, 3], "chunk_1": [31999], "val.bin": [5, 6], "README.md": []}

    def download(name, file, repo_type, local_dir):
        path = local_dir / file
        path.write_bytes(torch.tensor(chunks[file]).to(torch.uint16).numpy().tobytes())
        return str(path)

    hub.list_repo_files = lambda name, repo_type: [] if "text" in name else list(chunks)
    hub.hf_hub_download = download
    monkeypatch.setitem(sys.modules, "datasets", datasets)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    return tmp_path / "out"


def test_documents_of_the_hub_go_into_shards(hub, capsys):
    assert data("hf", "some/text", "--percent", 10, "--shard", 10_000, "--out", hub) == 0
    assert re.search(r"data.train=\S+train_\*.bin", capsys.readouterr().out)
    found = load_token_files(str(hub / "train_*.bin"), str(hub / "validation.bin"))
    assert len(found.train.parts) > 2
    held_out = texts_of(found.validation)
    assert held_out == [b"document %d" % number for number in range(0, 2500, 10)]
    assert len(texts_of(found.train)) == 2250
    assert data("hf", "some/text", "--column", "body", "--out", hub) == 2
    assert "no column 'body'; --column names one of text" in capsys.readouterr().err


def test_token_files_of_the_hub_get_sidecars(hub, capsys):
    assert data("hf", "somebody/tokens", "--vocab", 32_000, "--out", hub) == 0
    found = load_token_files(str(hub / "chunk*"), str(hub / "val.bin"))
    assert found.train[0:9].tolist() == [1, 2, 3, 31999]
    assert json.loads((hub / "chunk_0.json").read_text())["count"] == 3
    assert data("hf", "somebody/tokens", "--out", hub) == 2
    assert "--vocab must tell" in capsys.readouterr().err
    assert data("hf", "somebody/tokens", "--vocab", 31_999, "--out", hub) == 2
    assert (
        "chunk_1 holds token 31999, outside of the vocabulary of 31999" in capsys.readouterr().err
    )


def test_what_is_missing_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert data("hf", "text", "--out", tmp_path) == 2
    assert "the module datasets is missing: pip install -e '.[data]'" in capsys.readouterr().err
