"""One rank of a real run: loads its share of two epochs and writes what it saw.

Run by torchrun: loader_rank_worker.py BETON KIND DIRECTORY writes DIRECTORY/rank_<rank>_epoch_<epoch>.npz with
`ids`, `images` and `labels` of the rank's batches, one after the other, and the evaluation ids of the rank.
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch

from harness.data.augment import Augmentation
from harness.data.loaders import build_loader
from harness.data.order import BatchPlan, evaluation_batches
from harness.data.prepare import Split, open_beton

GLOBAL_BATCH_SIZE = 12  # for 1, 2 and 3 ranks of 2 micro-batches
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
AUGMENTATION = Augmentation(seed=3, crop_padding_px=2, flip="random", cutout_size_px=5)


def load_shares(split: Split, kind: str, *, rank: int, world_size: int) -> list[dict[str, np.ndarray]]:
    """What one rank sees of each of two epochs."""
    plan = BatchPlan(split.count, GLOBAL_BATCH_SIZE, rank=rank, world_size=world_size, accumulation_steps=2, seed=3)
    evaluation = evaluation_batches(split.count, batch_size=10, rank=rank, world_size=world_size)
    loader = build_loader(
        kind, split, mean=MEAN, std=STD, augmentation=AUGMENTATION, device=torch.device("cpu"), workers=1
    )
    shares = []
    for epoch in range(2):
        ids_per_batch = [ids_B for step in plan.micro_batches(epoch) for ids_B in step]
        # A batch's tensors are overwritten later on, hence the copies.
        seen = [
            (batch.ids_B, batch.images_BCHW.numpy().copy(), batch.labels_B.numpy().copy())
            for batch in loader.batches(ids_per_batch, epoch=epoch)
        ]
        ids, images, labels = (np.concatenate(part) for part in zip(*seen, strict=True))
        shares.append({"ids": ids, "images": images, "labels": labels, "evaluation_ids": np.concatenate(evaluation)})
    loader.close()
    return shares


def main() -> None:
    beton, kind, directory = sys.argv[1:]
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    shares = load_shares(open_beton(Path(beton)), kind, rank=rank, world_size=world_size)
    for epoch, share in enumerate(shares):
        np.savez(Path(directory) / f"rank_{rank}_epoch_{epoch}.npz", **share)


if __name__ == "__main__":
    main()
