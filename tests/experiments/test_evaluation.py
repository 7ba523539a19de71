"""Validation, samples, and records of blocks and roots."""

import json

import pytest
import torch

from benchmarks.memory import memory_of
from experiments.builders import build_data, build_model
from experiments.evaluation import Evaluator
from experiments.main import main
from experiments.memory import model_memory
from experiments.metrics import read_metrics
from experiments.parallel import Process
from tests.experiments.composing import composed


def evaluated(words, sizes):
    """The peak of what a validation allocates, by batch size; and its results."""
    peaks, losses = {}, []
    for batch_size, more in sizes.items():
        config = composed([*words, f"batch_size={batch_size}", *more])
        data = build_data(config)
        torch.manual_seed(0)
        model = build_model(config.model, data.vocab_size, config.sequence_length).double()
        evaluator = Evaluator(config, Process(0, 1, torch.device("cpu")), data)
        assert len(evaluator.windows) == 2 * batch_size
        peaks[batch_size] = memory_of(lambda e=evaluator, m=model: losses.append(e.validate(m)))
    return {size: memory.peak for size, memory in peaks.items()}, losses


def test_the_memory_of_validation_follows_the_micro_batch_not_the_batch(tiny):
    pieces = {size: ["micro_batch_size=2"] for size in (2, 8, 32)}
    peaks, losses = evaluated(tiny, pieces)
    assert max(peaks.values()) < 1.05 * min(peaks.values())
    whole, whole_losses = evaluated(tiny, {2: [], 8: [], 32: []})
    assert whole[32] > 10 * whole[2]
    assert [x["loss"] for x in losses] == pytest.approx([x["loss"] for x in whole_losses], rel=1e-9)


def test_the_validation_of_the_paper_fits_80_gb():
    """By arithmetic: on one device, with all of the optimizer's state there, and nothing compiled."""
    config = composed(["experiment=llama_953m", "data.train=x", "data.validation=x"])
    counted = model_memory(
        lambda: build_model(config.model, 32_000, config.sequence_length),
        config.micro_batch_size,
        config.sequence_length,
        use_bf16=True,
    )
    logits = config.micro_batch_size * config.sequence_length * 32_000
    # bf16 logits, their fp32 copy in the loss and its log-softmax; and autocast's copy of the weights.
    expected = 10 * logits + counted.parameters / 2
    assert counted.validation == pytest.approx(expected, rel=0.05)
    # Factor matrices, their roots, both moments of every block: less than 6 times the parameters.
    assert 8 * counted.parameters + counted.validation < 40e9


def test_samples_and_blocks_are_recorded_on_request(tiny, tmp_path):
    words = [*tiny, "optimizer=dash", "steps=2", "diagnose_every=2", "peak_tflops=1"]
    words.append("optimizer.precondition_frequency=1")
    words += ["sample_prompts=['def ','return']", "sample_length=5", f"output_dir={tmp_path}"]
    assert main(["train", *words]) == 0
    records = read_metrics(tmp_path / "metrics.jsonl")
    samples = [r for r in records if r["event"] == "sample"]
    assert [(r["step"], r["prompt"]) for r in samples] == [
        (step, prompt) for step in (0, 2) for prompt in ("def ", "return")
    ]
    assert all(r["text"] for r in samples)
    (found,) = [r for r in records if r["event"] == "diagnostics"]
    assert found["step"] == 2
    assert found["largest_condition"] >= 1
    names = {block["parameter"] for block in found["blocks"]}
    assert {"embedding.weight", "blocks.0.attention.query.weight", "norm.weight"} <= names
    for block in found["blocks"]:
        assert block["update_to_weight"] > 0
        assert all(factor["steps_since_good_root"] <= 1 for factor in block["factors"])
    steps = [r for r in records if r["event"] == "train"]
    assert all(0 < r["mfu"] < 1 for r in steps)
    assert json.dumps(found, allow_nan=False)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_token_files_and_text_are_read_back(tokenizer, corpus, tmp_path):
    out = tmp_path / "tokens"
    vocabulary = ["--vocab", "300"] if tokenizer == "bpe" else []
    words = ["text", str(corpus), "--tokenizer", tokenizer, *vocabulary, "--out", str(out)]
    assert main(["data", *words, "--percent", "20"]) == 0
    files = ["data=token_files", f"data.train={out}/train.bin"]
    config = composed([*files, f"data.validation={out}/validation.bin"])
    data = build_data(config)
    text = "def name_1 ( name_2 ) : return"
    assert data.tokenizer.decode(data.tokenizer.encode(text)) == text
    assert data.tokenizer.decode(data.train[0:50].tolist()).strip()


def test_samples_without_a_tokenizer_are_refused(tiny, tmp_path, capsys):
    tokens = tmp_path / "tokens.bin"
    torch.zeros(4000, dtype=torch.int16).numpy().tofile(tokens)
    files = [f"data.train={tokens}", f"data.validation={tokens}", "data.vocab_size=8"]
    words = [word for word in tiny if not word.startswith("data.")]
    words = ["data=token_files", *files, *words, "sample_prompts=[a]", f"output_dir={tmp_path}/run"]
    assert main(["train", *words]) == 2
    assert "sample_prompts=['a'] needs a tokenizer" in capsys.readouterr().err
