"""One rank of test_kernels.py: the last one has no compiler. Prints what became of its kernels."""

from __future__ import annotations

import os

import torch.distributed as dist

from harness.files import writable_cache_directory
from harness.models.build import build_model
from harness.models.fused_units import adopt_compiled_kernels
from harness.models.kernels import fingerprint

if __name__ == "__main__":
    dist.init_process_group("gloo")
    if dist.get_rank() == dist.get_world_size() - 1:
        os.environ["CXX"] = "/nowhere/c++"
    model = build_model("dual_branch_seed", num_classes=10, image_size_px=32, args={})
    verdict = adopt_compiled_kernels(model, writable_cache_directory())
    print(f"rank {dist.get_rank()}: {verdict}; open: {bool(fingerprint())}", flush=True)
    dist.destroy_process_group()
