"""The guides of the documentation, run with the real packages."""

import copy
import re

import pytest
import torch

from tests.docs.markdown import ROOT, blocks

PAGE = (ROOT / "docs" / "guides.md").read_text()
TOKENS = torch.randint(0, 64, (16, 9), generator=torch.Generator().manual_seed(0))


def guide(title, **names):
    """The names that the page's common part and one of its guides define."""
    common = [b.text for b in blocks(PAGE) if b.info == "python"]
    section = re.search(rf"(?ms)^## {title}$(.*?)(?=^## |\Z)", PAGE)
    (own,) = [b.text for b in blocks(section[1]) if b.info == "python notest"]
    namespace = {"__name__": "guide", **names}
    for text in [*common, own]:
        exec(text, namespace)
    return namespace


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    found = guide("Accelerate")
    model = found["GPT"]()
    before = weights(model).clone()
    found["with_accelerate"](accelerate.Accelerator(cpu=True), model, [TOKENS, TOKENS])
    assert not torch.equal(weights(model), before)


def test_lightning():
    lightning = pytest.importorskip("lightning", reason="lightning is not installed")
    module = guide("Lightning", lightning=lightning)["Module"]()
    before = weights(module).clone()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=3,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, torch.utils.data.DataLoader(TOKENS, batch_size=4))
    assert not torch.equal(weights(module), before)


def test_transformers(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    config = transformers.GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    before = weights(model).clone()
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), max_steps=3, report_to=[], use_cpu=True, disable_tqdm=True
    )
    rows = [{"input_ids": row, "labels": row} for row in TOKENS]
    guide("Transformers", transformers=transformers)["with_trainer"](model, arguments, rows)
    assert not torch.equal(weights(model), before)


def test_torchtitan(tmp_path):
    pytest.importorskip("torchtitan.components.optimizer", reason="torchtitan is not installed")
    from torch.distributed.fsdp import fully_shard

    def state():
        torch.manual_seed(0)
        model = fully_shard(found["GPT"](), mesh=mesh)
        return model, found["DashContainer"].Config(lr=1e-3).build(model_parts=[model])

    def train(model, optimizers):
        model(TOKENS).logsumexp(-1).mean().backward()
        optimizers.step()
        optimizers.zero_grad()

    def local(model):
        return torch.cat([p.detach().full_tensor().flatten() for p in model.parameters()])

    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        found = guide("torchtitan")
        model, optimizers = state()
        before = local(model).clone()
        train(model, optimizers)
        assert not torch.equal(local(model), before)
        # As its checkpoints do: flat, by the names of the parameters.
        saved = copy.deepcopy((model.state_dict(), optimizers.state_dict()))
        train(model, optimizers)
        resumed, its = state()
        resumed.load_state_dict(saved[0])
        its.load_state_dict(saved[1])
        train(resumed, its)
        assert torch.equal(local(resumed), local(model))
    finally:
        torch.distributed.destroy_process_group()
