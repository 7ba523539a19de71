"""Lightning: fit and resume, bf16, clipping, accumulation, weight averaging, lr_find, fine-tuning, Fabric."""

from __future__ import annotations

import logging

import pytest
import torch

import dash_shampoo as ds
from tests.clients.common import SETTINGS, construct, network, scheduler_of, values
from tests.guards.common import CONFIGS

lightning = pytest.importorskip("lightning", reason="lightning is not installed")

pytestmark = [
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.parametrize("config", CONFIGS),
]


def batches():
    generator = torch.Generator().manual_seed(3)
    inputs = torch.randn(20, 8, generator=generator)
    target = torch.randn(8, 4, generator=generator)
    data = torch.utils.data.TensorDataset(inputs, inputs @ target)
    return torch.utils.data.DataLoader(data, batch_size=5)


class Module(lightning.LightningModule):
    def __init__(self, config, **settings):
        super().__init__()
        self.network, self.config, self.settings = network(), config, SETTINGS | settings
        self.lr = self.settings.pop("lr")

    def training_step(self, batch, _):
        inputs, targets = batch
        return torch.nn.functional.mse_loss(self.network(inputs), targets)

    def configure_optimizers(self):
        optimizer = construct(self.named_parameters(), self.config, lr=self.lr, **self.settings)
        scheduler = {"scheduler": scheduler_of(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": scheduler}


def trainer(**settings):
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    return lightning.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **({"enable_checkpointing": False} | settings),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": 0.5, "accumulate_grad_batches": 2},
    ],
    ids=str,
)
def test_a_resume_is_exact(config, settings, tmp_path):
    straight = Module(config)
    trainer(max_epochs=4, **settings).fit(straight, batches())
    first = Module(config)
    half = trainer(max_epochs=2, **settings)
    half.fit(first, batches())
    half.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Module(config)
    trainer(max_epochs=4, **settings).fit(resumed, batches(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(values(straight), values(resumed))
    assert not torch.equal(values(straight), values(Module(config)))


def test_averaged_weights(config):
    """A callback that puts averaged weights into the module and back."""
    callbacks = lightning.pytorch.callbacks
    average = getattr(callbacks, "EMAWeightAveraging", None) or callbacks.StochasticWeightAveraging
    arguments = {} if average.__name__.startswith("EMA") else {"swa_lrs": 1e-3}
    module = Module(config)
    before = values(module)
    trainer(max_epochs=3, callbacks=[average(**arguments)]).fit(module, batches())
    assert torch.isfinite(values(module)).all()
    assert not torch.equal(values(module), before)


def test_the_search_for_a_learning_rate(config, tmp_path):
    module = Module(config)
    before = values(module)
    tuner = lightning.pytorch.tuner.Tuner(
        trainer(max_epochs=10, default_root_dir=tmp_path, enable_checkpointing=True)
    )
    found = tuner.lr_find(module, batches(), num_training=20, min_lr=1e-5, max_lr=0.1)
    assert len(found.results["lr"]) >= 15
    assert len(set(found.results["loss"])) > 10
    # It puts everything back.
    assert torch.equal(before, values(module))


class Thaw(lightning.pytorch.callbacks.BaseFinetuning):
    def freeze_before_training(self, module):
        self.freeze(module.network[0])

    def finetune_function(self, module, epoch, optimizer):
        if epoch == 1:
            self.unfreeze_and_add_param_group(module.network[0], optimizer, lr=0.01)


class Head(Module):
    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return construct(trained, self.config, lr=self.lr, **self.settings)


def test_fine_tuning_adds_a_group(config):
    module = Head(config)
    before = values(module.network[0])
    fit = trainer(max_epochs=1, callbacks=[Thaw()])
    fit.fit(module, batches())
    assert torch.equal(before, values(module.network[0]))
    fit = trainer(max_epochs=3, callbacks=[Thaw()])
    fit.fit(module, batches())
    assert not torch.equal(before, values(module.network[0]))


def test_fabric(config, tmp_path):
    def run(steps, start=0, load=None, save=None):
        fabric = lightning.Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        model = network()
        optimizer = construct(
            model.parameters(), config, iterate_averaging_config=ds.ScheduleFreeConfig()
        )
        model, optimizer = fabric.setup(model, optimizer)
        state = {"model": model, "optimizer": optimizer}
        if load:
            fabric.load(load, state)
        for step in range(start, steps):
            optimizer.zero_grad()
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step))
            fabric.backward(model(x).float().square().mean())
            optimizer.step()
        if save:
            fabric.save(save, state)
        return values(model)

    straight = run(6)
    run(3, save=tmp_path / "half.ckpt")
    assert torch.equal(straight, run(6, start=3, load=tmp_path / "half.ckpt"))
