"""One rank of test_kernels.py: the last one has no compiler. Prints what became of its kernels."""

from __future__ import annotations

import os
from pathlib import Path

import torch.distributed as dist

from harness.files import writable_cache_directory
from harness.models.build import build_model
from harness.models.fast_paths import adopt_compiled_kernels
from harness.models.kernels import compiled

if __name__ == "__main__":
    dist.init_process_group("gloo")
    if dist.get_rank() == dist.get_world_size() - 1:
        os.environ["CXX"] = str(Path("/nowhere/c++"))
    told = adopt_compiled_kernels(
        build_model("dual_branch_seed", num_classes=10, image_size_px=32, args={}), writable_cache_directory()
    )
    print(f"rank {dist.get_rank()}: {told}; open: {bool(compiled._libraries)}", flush=True)
    dist.destroy_process_group()
