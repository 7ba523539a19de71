import random

import pytest

WORDS = [f"name_{i}" for i in range(40)] + [
    "def",
    "return",
    "import",
    "class",
    "=",
    "(",
    "):",
    "\n",
]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """A folder of 40 small files that look a bit like Python: 90 kB."""
    folder = tmp_path_factory.mktemp("corpus")
    draw = random.Random(0)
    for index in range(40):
        text = " ".join(draw.choices(WORDS, k=400))
        (folder / f"module_{index}.py").write_text(text)
    return folder


@pytest.fixture
def tiny(corpus):
    """Overrides for runs of a fraction of a second a step."""
    return [
        f"data.train={corpus}",
        "data.validation_percent=20",
        "model.num_layers=1",
        "model.width=16",
        "model.num_heads=2",
        "batch_size=4",
        "sequence_length=16",
        "validation_batches=2",
        "evaluate_every=2",
        "device=cpu",
        "progress=false",
    ]
