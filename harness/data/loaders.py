"""Three loaders, one contract: the same ids and the same pixels from each.

`ffcv` (the quickest on a CPU), `device` (the data lies on the device, augmentation there) and `torch`
(DataLoader and torchvision, the plain reference). What a loader yields depends on its arguments alone, never
on its workers.

Shapes: B batch, C = 3 channels, H height, W width.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from harness.data.augment import Augmentation, check_normalisation
from harness.data.batches import Loader
from harness.environment import whole_number
from harness.errors import HarnessError, nearest
from harness.machine import rank_has_its_own_cores, usable_cores

if TYPE_CHECKING:
    from harness.data.store import Split

LOADER_KINDS = ("ffcv", "device", "torch")


def build_loader(
    kind: str,
    split: Split,
    *,
    mean: Sequence[float],
    std: Sequence[float],
    augmentation: Augmentation | None,
    device: torch.device,
    workers: int | None,
) -> Loader:
    """Make a loader of one split.

    Args:
        kind: "ffcv", "device" or "torch".
        split: the data.
        mean: of each channel, on the scale [0, 1].
        std: of each channel, on the scale [0, 1].
        augmentation: of the training images; None only normalises.
        device: where the batches are wanted.
        workers: threads (ffcv) or processes (torch; 0 loads in this process); None is one for each core of this
            rank. The device loader needs none.

    Raises:
        HarnessError: an unknown kind, ffcv not installed, a deviation of 0, or an augmentation that does not fit
            the image size.
    """
    if kind not in LOADER_KINDS:
        raise HarnessError(f'there is no data loader "{kind}"', hint=nearest(kind, LOADER_KINDS))
    if workers is not None and workers < 0:
        raise HarnessError(
            f"the number of workers must not be negative, it is {workers}",
            hint="Set data.workers to 0 or more, or to null for one for each core.",
        )
    check_normalisation(mean, std)
    augmentation = augmentation or Augmentation(seed=0)
    augmentation.check_image_size(*split.images_BHWC.shape[1:3])
    count = _cores_of_this_rank() if workers is None else workers
    # Imported here: one loader must not need, or wait for, what another one needs.
    if kind == "ffcv":
        from harness.data.ffcv_loader import FfcvLoader

        return FfcvLoader(split, mean=mean, std=std, augmentation=augmentation, device=device, workers=count)
    if kind == "device":
        from harness.data.device_loader import DeviceLoader

        return DeviceLoader(split, mean=mean, std=std, augmentation=augmentation, device=device)
    from harness.data.torch_loader import TorchLoader

    return TorchLoader(split, mean=mean, std=std, augmentation=augmentation, device=device, workers=count)


def _cores_of_this_rank() -> int:
    """The cores that this rank is bound to, or its share of those that all ranks of the machine use; at least 1."""
    if rank_has_its_own_cores():
        return usable_cores()
    return max(1, usable_cores() // whole_number("LOCAL_WORLD_SIZE", 1, at_least=1))


def ffcv_available() -> bool:
    """Whether ffcv is installed, without importing it. Its libraries may still fail to load."""
    return importlib.util.find_spec("ffcv") is not None
