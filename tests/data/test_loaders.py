"""All loaders give the same ids and the same pixels, whoever asks and however."""

import errno
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch

from harness.data import loaders
from harness.data.augment import Augmentation, normalisation_table
from harness.data.loaders import Batch, Loader, build_loader, explained
from harness.data.order import BatchPlan
from harness.data.prepare import Split, open_beton, write_beton
from harness.errors import HarnessError
from tests.conftest import run_limited

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
COUNT, HEIGHT, WIDTH = 75, 20, 28  # not square, so that a mix-up of height and width shows
CPU = torch.device("cpu")
FFCV = pytest.param("ffcv", marks=pytest.mark.ffcv)
KINDS = [FFCV, "device", "torch"]
AUGMENTATIONS = {
    "none": None,
    "crop": Augmentation(seed=1, crop_padding_px=4),
    "reflected crop": Augmentation(seed=1, crop_padding_px=5, crop_padding_mode="reflect"),
    "largest reflected crop": Augmentation(seed=1, crop_padding_px=19, crop_padding_mode="reflect", flip="random"),
    "crop beyond the image": Augmentation(seed=1, crop_padding_px=40, flip="random"),
    "even cutout": Augmentation(seed=1, cutout_size_px=8),
    "odd cutout, flip": Augmentation(seed=1, flip="random", cutout_size_px=7),
    "cutout beyond the image": Augmentation(seed=1, cutout_size_px=60),
    "all": Augmentation(seed=2, crop_padding_px=4, flip="alternating", cutout_size_px=6),
}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    path, generator = tmp_path_factory.mktemp("loaders") / "train.beton", np.random.default_rng(0)
    images_BHWC = generator.integers(0, 256, (COUNT, HEIGHT, WIDTH, 3), dtype=np.uint8)
    write_beton(path, images_BHWC, generator.integers(0, 10, COUNT))
    return open_beton(path)


Build = Callable[..., Loader]


@pytest.fixture
def build(split: Split) -> Iterator[Build]:
    """Loaders that are closed after the test."""
    with ExitStack() as stack:

        def build(
            kind: str,
            augmentation: Augmentation | None = None,
            workers: int | None = 1,
            device: torch.device = CPU,
            std: Sequence[float] = STD,
        ) -> Loader:
            how: Any = {"augmentation": augmentation, "device": device, "workers": workers}
            loader = build_loader(kind, split, mean=MEAN, std=std, **how)
            stack.callback(loader.close)
            return loader

        yield build


def collect(loader: Loader, ids_per_batch: Sequence[np.ndarray], epoch: int = 0) -> list[Batch]:
    """Copies: a batch's tensors are only valid until the next is asked for."""
    return [
        Batch(batch.images_BCHW.cpu().clone(), batch.labels_B.cpu().clone(), batch.ids_B)
        for batch in loader.batches(ids_per_batch, epoch=epoch)
    ]


def assert_same(found: Sequence[Batch], expected: Sequence[Batch]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert np.array_equal(one.ids_B, other.ids_B)
        assert torch.equal(one.labels_B, other.labels_B)
        assert torch.equal(one.images_BCHW, other.images_BCHW)


def epoch_ids(epoch: int, **options: Any) -> list[np.ndarray]:
    plan = BatchPlan(COUNT, 16, seed=9, **options)
    return [ids_B for step in plan.micro_batches(epoch) for ids_B in step]


def expected_image(image_HWC: np.ndarray, sample_id: int, augmentation: Augmentation, epoch: int) -> np.ndarray:
    """float32 (C, H, W), put together by hand with numpy."""
    ids_B = np.array([sample_id])
    how = augmentation.parameters(epoch, ids_B, height_px=HEIGHT, width_px=WIDTH)
    around = [(augmentation.crop_padding_px,) * 2] * 2 + [(0, 0)]
    mode: Any = "reflect" if augmentation.crop_padding_mode == "reflect" else "constant"
    padded_HWC = np.pad(image_HWC, around, mode=mode)
    top, left = how.crop_y_B[0], how.crop_x_B[0]
    image_HWC = padded_HWC[top : top + HEIGHT, left : left + WIDTH]
    if how.flip_B[0]:
        image_HWC = image_HWC[:, ::-1]
    table = normalisation_table(MEAN, STD)
    image_CHW = np.stack([table[channel][image_HWC[..., channel]] for channel in range(3)])
    size = augmentation.cutout_size_px
    for y in range(how.cutout_y_B[0], how.cutout_y_B[0] + size):
        for x in range(how.cutout_x_B[0], how.cutout_x_B[0] + size):
            if 0 <= y < HEIGHT and 0 <= x < WIDTH:
                image_CHW[:, y, x] = 0.0
    return image_CHW


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_the_reference_is_right(name: str, split: Split, build: Build) -> None:
    augmentation = AUGMENTATIONS[name] or Augmentation(seed=0)
    for epoch in (0, 1):
        for batch in collect(build("torch", AUGMENTATIONS[name], workers=0), epoch_ids(epoch), epoch):
            assert torch.equal(batch.labels_B, torch.from_numpy(split.labels_B[batch.ids_B]))
            for image_CHW, sample_id in zip(batch.images_BCHW, batch.ids_B, strict=True):
                stored_HWC = split.images_BHWC[sample_id]
                expected_CHW = expected_image(stored_HWC, int(sample_id), augmentation, epoch)
                assert torch.equal(image_CHW, torch.from_numpy(expected_CHW))


@pytest.mark.parametrize("name", AUGMENTATIONS)
@pytest.mark.parametrize("kind", [FFCV, "device"])
def test_every_loader_gives_the_pixels_of_the_reference(name: str, kind: str, build: Build) -> None:
    reference, loader = build("torch", AUGMENTATIONS[name], workers=0), build(kind, AUGMENTATIONS[name])
    for epoch in range(3):
        ids_per_batch = epoch_ids(epoch)
        assert_same(collect(loader, ids_per_batch, epoch), collect(reference, ids_per_batch, epoch))


@pytest.mark.parametrize("kind", [FFCV, "torch"])
def test_the_number_of_workers_changes_nothing(kind: str, build: Build) -> None:
    augmentation = AUGMENTATIONS["all"]
    loaders = [build(kind, augmentation, workers=workers) for workers in (1, 2)]
    for epoch in range(2):
        one, two = (collect(loader, epoch_ids(epoch, accumulation_steps=4), epoch) for loader in loaders)
        assert_same(two, one)


@pytest.mark.parametrize("kind", KINDS)
def test_batches_of_any_length_in_any_order(kind: str, build: Build) -> None:
    generator = np.random.default_rng(4)
    ids_per_batch = [generator.integers(0, COUNT, length) for length in (1, 9, 3, 3, 75, 2, 8, 1, 1, 30)]
    found = collect(build(kind, AUGMENTATIONS["all"]), ids_per_batch, epoch=1)
    (whole,) = collect(build("torch", AUGMENTATIONS["all"], workers=0), [np.arange(COUNT)], epoch=1)
    for batch, ids_B in zip(found, ids_per_batch, strict=True):
        assert (batch.images_BCHW.dtype, batch.ids_B.dtype) == (torch.float32, np.int64)
        assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
        assert np.array_equal(batch.ids_B, ids_B)
        assert torch.equal(batch.images_BCHW, whole.images_BCHW[ids_B])
        assert torch.equal(batch.labels_B, whole.labels_B[ids_B])


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_stays_until_the_next_is_asked_for(kind: str, build: Build) -> None:
    ids_per_batch = [np.arange(start, start + 5) for start in range(0, COUNT, 5)]
    loader = build(kind, AUGMENTATIONS["all"])
    expected = collect(loader, ids_per_batch)
    for batch, other in zip(loader.batches(ids_per_batch, epoch=0), expected, strict=True):
        time.sleep(0.005)  # a thread that runs ahead has time to do so
        assert torch.equal(batch.images_BCHW, other.images_BCHW)
        assert torch.equal(batch.labels_B, other.labels_B)


@pytest.mark.parametrize("kind", KINDS)
def test_training_and_evaluation_take_turns(kind: str, build: Build) -> None:
    training, evaluation = build(kind, AUGMENTATIONS["all"], workers=2), build(kind, workers=2)
    ids_per_batch = [ids_B for epoch in range(4) for ids_B in epoch_ids(epoch)]
    expected = zip(collect(training, ids_per_batch), collect(evaluation, ids_per_batch), strict=True)
    both = [loader.batches(ids_per_batch, epoch=0) for loader in (training, evaluation)]
    for found, wanted in zip(zip(*both, strict=True), expected, strict=True):
        assert_same(found, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_loading_takes_nothing_from_a_generator_and_changes_no_setting(kind: str, build: Build) -> None:
    def state() -> list[Any]:
        numpy_state = np.random.get_state(legacy=True)
        return [
            torch.random.get_rng_state().tolist(),
            [part.tolist() if isinstance(part, np.ndarray) else part for part in numpy_state],
            random.getstate(),
            torch.get_num_threads(),
        ]

    before = state()
    collect(build(kind, AUGMENTATIONS["all"], workers=1), epoch_ids(0))
    assert state() == before


def new_processes_and_threads(before: Sequence[Any] = ()) -> list[Any]:
    return [one for one in (*psutil.Process().children(), *threading.enumerate()) if one not in before]


@pytest.mark.parametrize("way", ["break", "close the loader", "next epoch", "forget"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_epoch_left_midway_leaves_nothing_behind(kind: str, way: str, build: Build) -> None:
    loader = build(kind, AUGMENTATIONS["all"], workers=2)
    collect(loader, epoch_ids(0)[:1])  # whatever lives as long as the process has been started now
    before = new_processes_and_threads()
    batches = loader.batches([np.arange(8)] * 50, epoch=0)
    next(batches)
    if way == "break":
        batches.close()  # what leaving a for loop and dropping its iterator does
    elif way == "close the loader":
        loader.close()
    elif way == "next epoch":
        assert len(collect(loader, epoch_ids(1), epoch=1)) == 5
    del batches
    deadline = time.monotonic() + 5  # the processes of the torch loader need a moment to be gone
    while new_processes_and_threads(before) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert new_processes_and_threads(before) == []
    if way in ("break", "forget"):
        assert_same(collect(loader, epoch_ids(1), 1), collect(build("torch", AUGMENTATIONS["all"]), epoch_ids(1), 1))


@pytest.mark.parametrize("kind", KINDS)
def test_wrong_batches_and_a_closed_loader(kind: str, build: Build) -> None:
    loader = build(kind)
    assert list(loader.batches([], epoch=0)) == []
    for wrong in (np.array([-1]), np.array([0, COUNT])):
        with pytest.raises(ValueError, match="batch 1 is empty or holds ids outside"):
            loader.batches([np.array([0]), wrong], epoch=0)
    with pytest.raises(ValueError, match="batch 0 is empty"):
        loader.batches([np.array([], dtype=np.int64)], epoch=0)
    loader.close()
    loader.close()
    with pytest.raises(RuntimeError, match="closed"):
        loader.batches([np.array([0])], epoch=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_channel_that_is_constant_in_all_images_is_refused(kind: str, build: Build) -> None:
    with pytest.raises(HarnessError, match="of blue is 0: all pixels of that channel have one value") as caught:
        build(kind, std=(*STD[:2], 0.0))
    assert "data.std=[0.25, 0.25, 0.25]" in str(caught.value.hint)


# Of SLURM: tasks of the step, and CPUs on the node for each CPU that this process may use. Cores that it has shared out
# are not shared out again.
@pytest.mark.parametrize(
    ("cores", "ranks", "slurm", "expected"),
    [
        (8, None, None, 8),
        (8, "1", None, 8),
        (8, "3", None, 2),
        (1, "4", None, 1),
        pytest.param(8, "2", (2, 2), 8, id="each task bound to its half"),
        pytest.param(8, "2", (2, 1), 4, id="tasks that share the cores"),
        pytest.param(8, "2", (1, 2), 4, id="torchrun in one task of half a node"),
    ],
)
def test_the_workers_of_a_rank_are_its_share_of_the_cores(
    cores: int, ranks: str | None, slurm: Any, expected: int, build: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loaders, "usable_cores", lambda: cores)  # stands for machines of all sizes
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if ranks is not None:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
    if slurm is not None:
        monkeypatch.setenv("WORLD_SIZE", "2")
        monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(slurm[0]))
        monkeypatch.setenv("SLURM_CPUS_ON_NODE", str(slurm[1] * len(os.sched_getaffinity(0))))
    loader: Any = build("torch", workers=None)
    assert loader._workers == expected


@pytest.mark.slow
@pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, to mount a small /dev/shm"
)
def test_a_full_shared_memory_is_an_error_with_a_hint(tiny: Path, tmp_path: Path) -> None:
    words = f"{tiny} data.loader=torch data.workers=2 data.image_size_px=128 --run-dir {tmp_path / 'run'}"
    script = f"mount -t tmpfs -o size=64k tmpfs /dev/shm && exec {sys.executable} -m harness train {words}"
    done = run_limited(["unshare", "--mount", "bash", "-c", script], 120, dict(os.environ), tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert all(word in done.stderr for word in ("/dev/shm is full", "--shm-size", "data.workers=0", "data.loader=ffcv"))


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (RuntimeError("unable to open shared memory object </torch_1_1>: Too many open files (24)"), "too many files"),
        (RuntimeError("received 0 items of ancdata"), "too many files"),
        (RuntimeError("unable to write to file </torch_1_1>: No space left on device (28)"), "/dev/shm is full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error."), "/dev/shm is full"),
        (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "probably for memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "/dev/shm is full"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "memory ran out"),
        (RuntimeError("Caught ValueError in DataLoader worker process 0.\nours"), None),
    ],
)
def test_what_lets_a_worker_down_is_said_in_other_words(error: Exception, what: str | None) -> None:
    def breaks() -> Iterator[Any]:
        raise error
        yield

    with pytest.raises(HarnessError if what else type(error), match=what or str(error).splitlines()[0]):
        list(explained(breaks()))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_pixels_on_the_gpu_are_those_on_the_cpu(kind: str, build: Build) -> None:
    cuda = torch.device("cuda")
    reference = build("torch", AUGMENTATIONS["all"], workers=0)
    loader = build(kind, AUGMENTATIONS["all"], workers=2, device=cuda)
    for epoch in range(2):
        ids_per_batch = epoch_ids(epoch) * 8
        found = []
        for batch in loader.batches(ids_per_batch, epoch=epoch):
            assert batch.images_BCHW.device.type == "cuda"
            assert batch.images_BCHW.is_contiguous(memory_format=torch.channels_last)
            torch.cuda._sleep(5_000_000)  # the device falls behind: nothing may be overwritten meanwhile
            found.append(Batch(batch.images_BCHW.clone(), batch.labels_B.clone(), batch.ids_B))
        on_cpu = [Batch(batch.images_BCHW.cpu(), batch.labels_B.cpu(), batch.ids_B) for batch in found]
        assert_same(on_cpu, collect(reference, ids_per_batch, epoch))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [FFCV, "device"])
def test_nothing_waits_for_the_gpu(kind: str, build: Build) -> None:
    loader = build(kind, AUGMENTATIONS["all"], device=torch.device("cuda"))
    collect(loader, epoch_ids(0))
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(loader.batches(epoch_ids(1), epoch=1))) == 5
    finally:
        torch.cuda.set_sync_debug_mode("default")
