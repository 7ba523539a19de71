"""What is looked at beside the training loss: held-out tokens, blocks and roots, text samples."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

import dash_shampoo
from experiments.parallel import Process
from experiments.sampler import BatchSampler
from experiments.settings import Precision, SettingsError
from experiments.startup import unwrapped
from experiments.tokens import TokenData

_TEMPERATURE = 0.8


class Evaluator:
    """Losses and samples of a model.

    Args:
        config: The composed settings of ``train``.
        process: This process.
        data: Its held-out part is what losses are about.

    Raises:
        SettingsError: If there are too few held-out tokens, or samples are asked for and nobody
            knows the tokens' text.
    """

    def __init__(self, config: DictConfig, process: Process, data: TokenData) -> None:
        self.config, self.process, self.data = config, process, data
        try:
            self.sampler = BatchSampler(
                data.validation, config.sequence_length, config.batch_size, config.seed
            )
            self.windows = self.sampler.fixed_windows(
                config.validation_batches, process.rank, process.world_size
            )
        except ValueError as error:
            raise SettingsError(str(error)) from error
        if config.sample_prompts and data.tokenizer is None:
            raise SettingsError(
                f"sample_prompts={list(config.sample_prompts)} needs a tokenizer, and {data.name} has none: "
                "files written by `python -m experiments data` have one."
            )

    def loss(self, model: nn.Module, batch: Tensor) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy of the next token in nats, and the logits.

        Args:
            model: Takes tokens, gives logits.
            batch: (B, T + 1) tokens.

        Returns:
            A scalar, and (B, T, vocabulary).
        """
        batch = batch.to(self.process.device)
        use_bf16 = self.config.precision == Precision.bf16
        with torch.autocast(self.process.device.type, torch.bfloat16, enabled=use_bf16):
            logits = model(batch[:, :-1])
            loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        return loss, logits

    @torch.no_grad()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Loss, perplexity and accuracy over the fixed windows, micro-batch by micro-batch.

        Args:
            model: Likewise.

        Returns:
            The three, the same on all processes.
        """
        model.eval()
        process, config = self.process, self.config
        sums = torch.zeros(2, dtype=torch.float64, device=process.device)
        size = config.micro_batch_size or config.batch_size // process.world_size
        for batch in self.sampler.batches(self.windows, size):
            loss, logits = self.loss(model, batch)
            right = logits.argmax(-1) == batch[:, 1:].to(process.device)
            sums += torch.stack([loss.double(), right.double().mean()]) * batch.shape[0]
        model.train()
        value, accuracy = process.mean(sums / len(self.windows)).tolist()
        return {"loss": value, "perplexity": math.exp(min(value, 700.0)), "accuracy": accuracy}

    @torch.no_grad()
    def samples(self, model: nn.Module) -> list[dict[str, str]]:
        """Text that a model writes after each prompt; every process calls this.

        Args:
            model: Likewise.

        Returns:
            ``prompt`` and ``text`` of each.
        """
        if not self.config.sample_prompts:
            return []
        model = unwrapped(model)
        model.eval()
        found = [
            {"prompt": prompt, "text": self._continued(model, prompt)}
            for prompt in self.config.sample_prompts
        ]
        model.train()
        return found

    def _continued(self, model: nn.Module, prompt: str) -> str:
        assert self.data.tokenizer is not None
        generator = torch.Generator().manual_seed(self.config.seed)
        tokens = self.data.tokenizer.encode(prompt) or [0]
        start, length = len(tokens), self.config.sequence_length
        use_bf16 = self.config.precision == Precision.bf16
        for _ in range(self.config.sample_length):
            window = tokens[-length:]
            # Of one length, so that a compiled model stays as it is; what follows is not attended to.
            padded = torch.zeros(1, length, dtype=torch.int64, device=self.process.device)
            padded[0, : len(window)] = torch.tensor(window)
            with torch.autocast(self.process.device.type, torch.bfloat16, enabled=use_bf16):
                logits = model(padded)[0, len(window) - 1]
            shares = torch.softmax(logits.float() / _TEMPERATURE, dim=-1).cpu()
            tokens.append(int(torch.multinomial(shares, 1, generator=generator)))
        return self.data.tokenizer.decode(tokens[start:])


def failures(optimizer: Optimizer) -> dict[str, dict[str, int]]:
    """Inverse roots of this process that were not accepted so far, by parameter.

    Args:
        optimizer: Any.

    Returns:
        Empty for an optimizer without roots.
    """
    if not isinstance(optimizer, dash_shampoo.DashShampoo):
        return {}
    return {"failures": optimizer.failure_counts()}


def block_records(optimizer: dash_shampoo.DashShampoo, process: Process) -> dict[str, Any]:
    """The blocks of all processes and their factor matrices; every process calls this.

    Args:
        optimizer: Of this process.
        process: This process.

    Returns:
        ``blocks``, and the worst of each number beside it; None stands for what there is not.
    """
    own = [_plain(asdict(block)) for block in optimizer.diagnostics()]
    blocks = [block for part in process.gathered(own) for block in part]
    factors = [factor for block in blocks for factor in block["factors"]]
    worst = {
        f"largest_{name}": max(values)
        for name, values in (
            *((n, _numbers(factors, n)) for n in ("condition", "residual")),
            ("update_to_weight", _numbers(blocks, "update_to_weight")),
        )
        if values
    }
    return {**worst, "blocks": blocks}


def _numbers(records: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [record[name] for record in records if record[name] is not None]


def _plain(value: Any) -> Any:
    """JSON has no NaN."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.4g}") if math.isfinite(value) else None
    return value
