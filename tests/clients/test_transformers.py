"""Hugging Face Transformers: the Trainer resumes exactly; of PEFT's model only the adapters have state."""

from __future__ import annotations

import pytest
import torch

from tests.clients.common import construct, values
from tests.guards.common import CONFIGS

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("config", CONFIGS)]


def llama():
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=32,
            tie_word_embeddings=True,
        )
    )


class Tokens(torch.utils.data.Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        tokens = torch.randint(0, 64, (16,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": tokens, "labels": tokens}


def train(config, folder, steps, resume=None, bf16=False):
    model = llama()
    optimizer = construct(model.named_parameters(), config, lr=0.005)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step / 10))
    trainer = transformers.Trainer(
        model=model,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            max_steps=steps,
            per_device_train_batch_size=8,
            gradient_accumulation_steps=2,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            bf16=bf16,
            disable_tqdm=True,
            seed=1,
        ),
        train_dataset=Tokens(),
        optimizers=(optimizer, scheduler),
    )
    trainer.train(resume_from_checkpoint=resume)
    return values(model)


@pytest.mark.parametrize("bf16", [False, True])
def test_the_trainer_resumes_exactly(config, bf16, tmp_path):
    straight = train(config, tmp_path / "straight", 6, bf16=bf16)
    train(config, tmp_path / "parts", 3, bf16=bf16)
    resumed = train(config, tmp_path / "parts", 6, resume=True, bf16=bf16)
    assert torch.equal(straight, resumed)
    assert not torch.equal(straight, values(llama()))


def test_adapters(config):
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model = peft.get_peft_model(
        llama(), peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    )
    optimizer = construct(model.named_parameters(), config, lr=0.01)
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    batch = torch.stack([Tokens()[i]["input_ids"] for i in range(8)])
    losses = []
    for _ in range(15):
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(torch.equal(dict(model.named_parameters())[n], p) for n, p in frozen.items())
    assert len(optimizer.state) == sum(p.requires_grad for p in model.parameters()) == 4
