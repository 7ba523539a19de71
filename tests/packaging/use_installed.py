"""Uses an installed dash_shampoo: its version, the files it ships, a training step."""

import importlib.metadata
import importlib.resources
import sys
from pathlib import Path

import torch


def main() -> None:
    import dash_shampoo as ds

    package = Path(ds.__file__).resolve()
    if not package.is_relative_to(Path(sys.prefix).resolve()):
        sys.exit(f"This is a test of the installed package, but {package} was imported.")
    assert ds.__version__ == importlib.metadata.version("dash-shampoo"), ds.__version__

    files = importlib.resources.files("dash_shampoo")
    assert files.joinpath("py.typed").is_file()

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
    x, y = torch.randn(64, 16), torch.randn(64, 4)
    optimizer = ds.DashShampoo(
        model.parameters(),
        lr=0.01,
        precondition_frequency=1,
        start_preconditioning_step=1,
        grafting_config=ds.AdamPreconditionerConfig(),
        preconditioner_config=ds.RootInvShampooPreconditionerConfig(
            amortized_computation_config=ds.NewtonDBConfig()
        ),
    )
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        loss = torch.nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    print(
        f"dash_shampoo {ds.__version__}, base {ds.base.name}: {losses[0]:.3f} to {losses[-1]:.3f}"
    )


if __name__ == "__main__":
    main()
