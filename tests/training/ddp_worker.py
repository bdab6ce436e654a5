"""The same training without the harness's loop, step, optimizer or Accelerate: torch's DDP, as its tutorial has it.

Run by torchrun: ddp_worker.py RECIPE OUT writes OUT with the losses of all steps, each over all ranks.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from harness.data.order import BatchPlan
from harness.models.build import build_model
from harness.recipe import load
from harness.training.build import open_data, open_loader


def main() -> None:
    recipe = load(sys.argv[1], sys.argv[3:])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    store = open_data(recipe)
    loader = open_loader(recipe, store, "train", torch.device("cpu"))
    plan = BatchPlan(store.split("train").count, recipe.training.global_batch_size, rank=rank, world_size=world)
    torch.manual_seed(recipe.seed)
    network = build_model(recipe.model.name, num_classes=4, image_size_px=32, args=recipe.model.args)
    model = DistributedDataParallel(network)
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.optimizer.lr, momentum=recipe.optimizer.momentum)
    losses = []
    for epoch in range(recipe.training.epochs or 0):
        for batch in loader.batches([ids_B for step in plan.micro_batches(epoch) for ids_B in step], epoch=epoch):
            loss = torch.nn.functional.cross_entropy(model(batch.images_BCHW), batch.labels_B)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            losses.append(mean.item() / world)
    loader.close()
    if rank == 0:
        Path(sys.argv[2]).write_text(json.dumps(losses))
    dist.destroy_process_group()


main()
