"""How many workers a loader has where the recipe does not say."""

from pathlib import Path

import pytest
import torch

from harness.benchmarks.loader import synthetic_split
from harness.data import loaders
from harness.data.torch_loader import TorchLoader


@pytest.mark.parametrize(
    ("cores", "ranks", "expected"), [(8, None, 8), (8, "1", 8), (8, "3", 2), (2, "2", 1), (1, "4", 1)]
)
def test_the_cores_are_shared_out_among_the_ranks_of_the_machine(
    cores: int, ranks: str | None, expected: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "usable_cores", lambda: cores)  # stands for machines of all sizes
    if ranks is None:
        monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    else:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    loader = loaders.build_loader(
        "torch",
        synthetic_split(tmp_path, count=4),
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        augmentation=None,
        device=torch.device("cpu"),
        workers=None,
    )
    assert isinstance(loader, TorchLoader)
    assert loader._workers == expected
