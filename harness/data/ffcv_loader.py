"""FFCV's loader with one operation of our own: crop, flip, cutout and normalisation in one pass over memory.

FFCV reads the file and runs the pipeline in a thread, some batches ahead. Three things are ours:

- the operation, a decoder that reads FFCV's map of the file, is compiled once a machine, not in every process as
  FFCV's own are. An array tells it what to do with each sample, so no epoch is frozen into compiled code and no
  generator decides a pixel;
- the batches are those that were asked for, of any lengths: nothing is padded, dropped or sharded here;
- the thread ends when it is told to, and an error in it is raised where the batch was asked for (FFCV's own
  would leave the reader waiting for ever).

Nothing else in the package imports ffcv. Importing this file raises HarnessError where that is not possible.

Shapes: B batch, C = 3 channels, H height, W width.
"""

from __future__ import annotations

import atexit
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from queue import Empty, Full
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from harness.data.augment import Augmentation, normalisation_table
from harness.data.batches import Batch, checked_batches, to_device
from harness.errors import HarnessError

if TYPE_CHECKING:
    from harness.data.store import Split


_threads = torch.get_num_threads()
try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ffcv 1.0.2 still imports distutils
        import numba

        from harness.data.compiling import plain_dictionaries

        with plain_dictionaries():
            import ffcv  # noqa: F401
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader as StockLoader
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.pipeline.allocation_query import AllocationQuery
        from ffcv.pipeline.compiler import Compiler
        from ffcv.pipeline.state import State

        from harness.data.fused import fuse_batch
except (ImportError, OSError) as error:
    raise HarnessError(
        f"the ffcv data loader cannot be used, ffcv cannot be imported: {error}",
        hint="Install libopencv-dev libturbojpeg0-dev pkg-config g++ (Debian's names), "
        "then pip install '.[ffcv]'; or set data.loader=device",
    ) from error
finally:
    torch.set_num_threads(_threads)  # importing ffcv sets PyTorch to one thread

BATCHES_AHEAD = 3

# Numba's simplest threading layer ends the process when two threads run parallel code at once, as the loaders
# of training and evaluation may. They would only share the same cores anyway.
_PIPELINE_LOCK = threading.Lock()


class FusedDecoder(SimpleRGBImageDecoder):
    """Bytes of the file → normalised float32 (B, C, H, W), channels_last.

    `how_NF` and `table_CV` are as in `fuse_batch`; `how_NF` is replaced for each epoch.
    """

    def __init__(self, augmentation: Augmentation, table_CV: np.ndarray, how_NF: np.ndarray) -> None:
        super().__init__()
        self.table_CV, self.how_NF = table_CV, how_NF
        self.reflect = augmentation.crop_padding_mode == "reflect"
        self.cutout_size = augmentation.cutout_size_px

    def declare_state_and_memory(self, previous_state: State) -> tuple[State, AllocationQuery]:
        """What the batches are, and the memory for them."""
        state, _ = super().declare_state_and_memory(previous_state)
        height, width, channels = state.shape
        state = replace(state, jit_mode=False, shape=(channels, height, width), dtype=torch.float32)
        return state, AllocationQuery((height, width, channels), np.dtype(np.float32))

    def generate_code(self) -> Callable[..., torch.Tensor]:
        """The function FFCV calls with sample ids, the memory for its result, and what it knows of the file."""
        starts_N = self.metadata["data_ptr"].astype(np.int64)

        def fuse(ids_B: np.ndarray, out_BHWC: np.ndarray, metadata: np.ndarray, file: tuple[Any, ...]) -> torch.Tensor:
            how = self.how_NF, self.table_CV, self.reflect, self.cutout_size
            fuse_batch(file[0], starts_N, ids_B, *how, out_BHWC)
            return torch.from_numpy(out_BHWC).permute(0, 3, 1, 2)

        return fuse


class _GivenBatches:
    """To FFCV one order of ids to cut evenly; its slices are the given batches, whatever their size."""

    def __init__(self, batches: list[np.ndarray]) -> None:
        self.batches, self.size = batches, max(len(ids_B) for ids_B in batches)

    def __len__(self) -> int:
        return len(self.batches) * self.size

    def __getitem__(self, part: slice) -> np.ndarray:
        return self.batches[part.start // self.size]


class _Epoch(EpochIterator):
    """FFCV's thread for one epoch, with an end to wait for, errors that arrive and exact copies."""

    def __init__(self, loader: StockLoader, batches: list[np.ndarray], *, workers: int, device: torch.device) -> None:
        self.workers, self.device = workers, device
        slots = loader.batches_ahead + 2
        on_cuda = device.type == "cuda"
        self.copy_stream = torch.cuda.Stream(device) if on_cuda else None
        self.copied = [torch.cuda.Event() for _ in range(slots)] if on_cuda else []
        order = _GivenBatches(batches)
        loader.batch_size = order.size  # decides the size of the memory
        super().__init__(loader, order)  # starts the thread
        atexit.register(self.close)  # a thread in compiled code must not outlive the interpreter

    def run(self) -> None:
        try:
            numba.set_num_threads(self.workers)  # holds for this thread
            for index, ids_B in enumerate(self.iter_ixes):
                slot = index % (self.loader.batches_ahead + 2)
                if self.copied:
                    self.copied[slot].synchronize()  # the slot's last batch has left it
                with _PIPELINE_LOCK:
                    (images_BCHW,) = self.run_pipeline(index, ids_B, slot, None)
                if not self._put((slot, self._on_device(images_BCHW, slot))):
                    return
        except BaseException as error:  # whatever it is, someone waits for this batch
            self._put(error)

    def _on_device(self, images_BCHW: torch.Tensor, slot: int) -> torch.Tensor:
        if self.copy_stream is None:
            return images_BCHW.to(self.device)
        with torch.cuda.stream(self.copy_stream):
            images_BCHW = images_BCHW.to(self.device, non_blocking=True)
            self.copied[slot].record(self.copy_stream)
        return images_BCHW

    def _put(self, item: tuple[int, torch.Tensor] | BaseException) -> bool:
        """Hand over one batch; False once the epoch is ended."""
        while not self.terminate_event.is_set():
            try:
                self.output_queue.put(item, timeout=0.5)
                return True
            except Full:
                pass
        return False

    def __next__(self) -> torch.Tensor:
        item = self.output_queue.get()
        if isinstance(item, BaseException):
            raise item
        slot, images_BCHW = item
        if self.copied:
            stream = torch.cuda.current_stream(self.device)
            stream.wait_event(self.copied[slot])
            images_BCHW.record_stream(stream)  # its memory is not used again before this stream is done with it
        return images_BCHW

    def close(self) -> None:
        """End the thread and wait for it: a moment, at most one batch's work."""
        self.terminate_event.set()
        while self.is_alive() and threading.current_thread() is not self:
            try:
                self.output_queue.get_nowait()  # a thread that waits for room goes on at once
            except Empty:
                self.join(timeout=0.01)
        for event in self.copied:
            event.synchronize()
        super().close()
        atexit.unregister(self.close)


class FfcvLoader:
    """See `harness.data.loaders.Loader`. One epoch at a time: a new one's first batch ends the one before."""

    def __init__(
        self,
        split: Split,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation,
        device: torch.device,
        workers: int,
    ) -> None:
        self._augmentation, self._device = augmentation, device
        self._count, self._height_px, self._width_px, _ = split.images_BHWC.shape
        self._labels_B = split.labels_B
        self._workers = max(1, min(workers, numba.config.NUMBA_NUM_THREADS))
        self._fused = FusedDecoder(augmentation, normalisation_table(mean, std), self._how(0, np.arange(0)))
        pipelines = {"image": [self._fused], "label": None}
        with _as_python():
            self._loader: StockLoader | None = _stock(split.path, pipelines, batch_size=1, workers=self._workers)
        self._epoch: _Epoch | None = None

    def batches(self, ids_per_batch: Sequence[np.ndarray], *, epoch: int) -> Iterator[Batch]:
        """See `harness.data.loaders.Loader.batches`."""
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        batches = checked_batches(ids_per_batch, self._count)
        return self._yield(batches, epoch) if batches else iter(())

    def _yield(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        self._end_epoch()
        if self._loader is None:
            raise RuntimeError("this loader is closed")
        ids = np.concatenate(batches)
        self._fused.how_NF = self._how(epoch, ids)
        labels = to_device(self._labels_B[ids], self._device)
        running = self._epoch = _Epoch(self._loader, batches, workers=self._workers, device=self._device)
        try:
            start = 0
            for ids_B in batches:
                if self._epoch is not running:
                    raise RuntimeError("this epoch was ended: its loader was closed or began another one")
                yield Batch(next(running), labels.narrow(0, start, len(ids_B)), ids_B)
                start += len(ids_B)
        finally:
            running.close()

    def _how(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """What happens to each sample, int32 (samples of the split, 5), filled in for these ids.

        The columns are those of `harness.data.fused.fuse_batch`.
        """
        how = self._augmentation.parameters(epoch, ids, height_px=self._height_px, width_px=self._width_px)
        padding = self._augmentation.crop_padding_px
        how_NF = np.zeros((self._count, 5), dtype=np.int32)
        how_NF[ids] = np.stack([how.crop_y_B - padding, how.crop_x_B - padding, *how[2:]], axis=1)
        return how_NF

    def _end_epoch(self) -> None:
        running, self._epoch = self._epoch, None
        if running is not None:
            running.close()

    def close(self) -> None:
        """End the thread and release the file."""
        self._end_epoch()
        self._loader = None


@contextmanager
def _as_python() -> Iterator[None]:
    """FFCV compiles nothing of the pipelines that are made meanwhile: ours calls a compiled function of its own."""
    before = Compiler.is_enabled
    Compiler.set_enabled(False)
    try:
        yield
    finally:
        Compiler.set_enabled(before)


def _stock(path: str | os.PathLike[str], pipelines: dict[str, Any], *, batch_size: int, workers: int) -> StockLoader:
    """FFCV's Loader, leaving PyTorch's number of threads and numpy's generator alone."""
    threads = torch.get_num_threads()
    try:
        return StockLoader(
            os.fspath(path),
            batch_size=batch_size,
            num_workers=workers,
            os_cache=True,
            drop_last=False,
            seed=0,  # without one it takes a number from numpy's global generator; nothing here is random
            batches_ahead=BATCHES_AHEAD,
            pipelines=pipelines,
        )
    finally:
        torch.set_num_threads(threads)


def stock_epochs(
    path: str | os.PathLike[str],
    *,
    batch_size: int,
    workers: int,
    mean: Sequence[float],
    std: Sequence[float],
) -> Callable[[], Iterator[torch.Tensor]]:
    """FFCV as its CIFAR-10 example uses it, for comparison: flip, translate, cutout, normalise, one by one.

    Args:
        path: of the `.beton` file.
        batch_size: images in a batch; the last one may be smaller.
        workers: threads.
        mean: of each channel, on the scale [0, 1].
        std: of each channel, on the scale [0, 1].

    Returns:
        A function; each call gives one epoch's float32 (B, C, H, W) batches.
    """
    from ffcv import transforms
    from torchvision.transforms import Normalize

    raw_mean = tuple(round(255 * value) for value in mean)
    pipelines = {
        "image": [
            SimpleRGBImageDecoder(),
            transforms.RandomHorizontalFlip(),
            transforms.RandomTranslate(padding=4, fill=raw_mean),
            transforms.Cutout(8, raw_mean),
            transforms.ToTensor(),
            transforms.ToTorchImage(),
            transforms.Convert(torch.float32),
            Normalize([255 * value for value in mean], [255 * value for value in std]),
        ],
        "label": None,
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it advises against a torch module on the CPU
        loader = _stock(path, pipelines, batch_size=batch_size, workers=workers)

    def epoch() -> Iterator[torch.Tensor]:
        threads = torch.get_num_threads()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                batches = iter(loader)
            for (images_BCHW,) in batches:
                yield images_BCHW
        finally:
            torch.set_num_threads(threads)

    return epoch
