"""FFCV's loader with one operation of our own: crop, flip, cutout and normalisation in one pass over memory.

FFCV reads the file and runs the pipeline in a thread, some batches ahead. The operation is compiled once a machine, not
in every process as FFCV's own are, and an array says what it does with each sample. The batches are those that were
asked for, of any lengths. An error in the thread is raised where the batch was asked for (FFCV's own would leave the
reader waiting for ever).

Nothing else in the package imports ffcv. Importing this file raises HarnessError where that is not possible.

Shapes: B batch, C = 3 channels, H height, W width, V = 256 pixel values, N samples of the split, P bytes.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from queue import Empty, Full
from typing import Any

import numpy as np
import torch

from harness.data.augment import Augmentation, normalisation_table
from harness.data.loaders import Batch, Loader, to_device
from harness.errors import HarnessError
from harness.files import cache_directory, private_directory


@contextmanager
def _setting(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute with another value for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextmanager
def _torch_threads_kept() -> Iterator[None]:
    """FFCV sets PyTorch's number of threads, at its import to one."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


try:
    with _torch_threads_kept(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ffcv 1.0.2 still imports distutils
        import numba
        import numba.typed
        from numba import types

        # ffcv 1.0.2 puts the names of its two image modes in a typed dictionary, which is compiled at each import for
        # seconds, and which Python code alone reads.
        with _setting(numba.typed, "Dict", dict):
            import ffcv  # noqa: F401
        from ffcv.fields.rgb_image import SimpleRGBImageDecoder
        from ffcv.loader import Loader as StockLoader
        from ffcv.loader.epoch_iterator import EpochIterator
        from ffcv.pipeline.compiler import Compiler
except (ImportError, OSError) as error:
    raise HarnessError(
        f"the ffcv data loader cannot be used, ffcv cannot be imported: {error}",
        hint="Install libopencv-dev libturbojpeg0-dev pkg-config g++ (Debian's names), "
        "then pip install '.[ffcv]'; or set data.loader=device",
    ) from error

_BATCHES_AHEAD = 3
_SLOTS = _BATCHES_AHEAD + 2  # batches that FFCV has memory for
# Numba's simplest threading layer ends the process when two threads run parallel code at once, as the loaders
# of training and evaluation may. They would only share the same cores anyway.
_PIPELINE_LOCK = threading.Lock()
_SIGNATURE = types.void(
    types.Array(types.uint8, 1, "C", readonly=True),
    *(types.int64[::1], types.int64[::1], types.int32[:, ::1], types.float32[:, ::1]),
    *(types.boolean, types.int64, types.float32[:, :, :, ::1]),
)


@numba.njit(nogil=True)
def _fill_black(out_WC: np.ndarray, start: int, stop: int, table_CV: np.ndarray) -> None:
    for x in range(start, stop):
        for channel in range(3):
            out_WC[x, channel] = table_CV[channel, 0]


@numba.njit(nogil=True)
def _fill_mirrored(
    out_WC: np.ndarray, start: int, stop: int, row_P: np.ndarray, first: int, step: int, table_CV: np.ndarray
) -> None:
    last = len(out_WC) - 1
    for x in range(start, stop):
        column = last - abs(last - abs(first + step * x))
        for channel in range(3):
            out_WC[x, channel] = table_CV[channel, row_P[3 * column + channel]]


def _fuse_batch(
    file_P: np.ndarray,
    starts_N: np.ndarray,
    ids_B: np.ndarray,
    how_NF: np.ndarray,
    table_CV: np.ndarray,
    reflect: bool,
    cutout_size: int,
    out_BHWC: np.ndarray,
) -> None:
    """Read, crop, flip, normalise and cut out the samples `ids_B` of the file into `out_BHWC`.

    The pixels of sample n begin at starts_N[n]. `how_NF` says by id the shift down and to the right of what is read,
    whether to flip, the first row and the first column to cut out. What lies outside the image is mirrored or black.
    """
    height, width = out_BHWC.shape[1], out_BHWC.shape[2]
    for index in numba.prange(len(ids_B)):
        shift_y, shift_x, flip, cut_y, cut_x = how_NF[ids_B[index]]
        # The flip comes after the crop, so a flipped image is read from the crop's right end. What stands at x is
        # read at first + step * x, which lies in the image from `start` to before `stop`.
        if flip:
            first, step, start, stop = width - 1 + shift_x, -1, shift_x, width + shift_x
        else:
            first, step, start, stop = shift_x, 1, -shift_x, width - shift_x
        start, stop = min(max(start, 0), width), max(min(stop, width), 0)
        for y in range(height):
            row = y + shift_y
            if reflect:
                row = height - 1 - abs(height - 1 - abs(row))
            out_WC = out_BHWC[index, y]
            if not 0 <= row < height:
                _fill_black(out_WC, 0, width, table_CV)
                continue
            row_start = starts_N[ids_B[index]] + row * width * 3
            row_P = file_P[row_start : row_start + width * 3]
            for x in range(start, stop):
                column = first + step * x
                for channel in range(3):
                    out_WC[x, channel] = table_CV[channel, row_P[3 * column + channel]]
            if reflect:
                _fill_mirrored(out_WC, 0, start, row_P, first, step, table_CV)
                _fill_mirrored(out_WC, stop, width, row_P, first, step, table_CV)
            else:
                _fill_black(out_WC, 0, start, table_CV)
                _fill_black(out_WC, stop, width, table_CV)
        for y in range(max(cut_y, 0), min(cut_y + cutout_size, height)):
            for x in range(max(cut_x, 0), min(cut_x + cutout_size, width)):
                for channel in range(3):
                    out_BHWC[index, y, x, channel] = 0.0


def compiled(function: Callable[..., None], signature: Any, *, parallel: bool) -> Callable[..., None]:
    """The function's machine code, compiled now or loaded from what an earlier process compiled.

    numba unpickles it. So its folder in the cache must be this user's own and nobody else's to write in. Without one,
    each process compiles for itself.
    """
    for _ in range(2):
        folder = private_directory(cache_directory("numba", str(os.getuid())))
        if folder is None:
            break
        try:
            with _setting(numba.config, "CACHE_DIR", str(folder)):  # read when a function is decorated
                return numba.njit(signature, parallel=parallel, nogil=True, cache=True)(function)
        except Exception:  # unpickling damaged files raises anything; what is wrong with the code is raised below
            shutil.rmtree(folder, ignore_errors=True)
    return numba.njit(signature, parallel=parallel, nogil=True)(function)


_fused_pass = functools.cache(lambda: compiled(_fuse_batch, _SIGNATURE, parallel=True))


class FusedDecoder(SimpleRGBImageDecoder):
    """Bytes of the file → normalised float32 (B, C, H, W), channels_last; `how_NF` is replaced for each epoch."""

    def __init__(self, augmentation: Augmentation, table_CV: np.ndarray, how_NF: np.ndarray) -> None:
        super().__init__()
        self.table_CV, self.how_NF = table_CV, how_NF
        self.reflect = augmentation.crop_padding_mode == "reflect"
        self.cutout_size = augmentation.cutout_size_px

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, Any]:
        """What the batches are, and the memory for them."""
        state, memory = super().declare_state_and_memory(previous_state)
        height, width, channels = state.shape
        state = replace(state, jit_mode=False, shape=(channels, height, width), dtype=torch.float32)
        return state, replace(memory, dtype=np.dtype(np.float32))

    def generate_code(self) -> Callable[..., torch.Tensor]:
        """The function FFCV calls with sample ids, the memory for its result, and what it knows of the file."""
        starts_N, fuse_batch = self.metadata["data_ptr"].astype(np.int64), _fused_pass()

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
        on_cuda = device.type == "cuda"
        self.copy_stream = torch.cuda.Stream(device) if on_cuda else None
        self.copied = [torch.cuda.Event() for _ in range(_SLOTS)] if on_cuda else []
        order = _GivenBatches(batches)
        loader.batch_size = order.size  # decides the size of the memory
        super().__init__(loader, order)  # starts the thread
        atexit.register(self.close)  # a thread in compiled code must not outlive the interpreter

    def run(self) -> None:
        try:
            numba.set_num_threads(self.workers)  # holds for this thread
            for index, ids_B in enumerate(self.iter_ixes):
                slot = index % _SLOTS
                if self.copied:
                    self.copied[slot].synchronize()  # the slot's last batch has left it
                with _PIPELINE_LOCK:
                    (images_BCHW,) = self.run_pipeline(index, ids_B, slot, None)
                if not self._put((slot, self._on_device(images_BCHW, slot))):
                    return
        except BaseException as error:
            self._put(error)

    def _on_device(self, images_BCHW: torch.Tensor, slot: int) -> torch.Tensor:
        if self.copy_stream is None:
            return images_BCHW.to(self.device)
        with torch.cuda.stream(self.copy_stream):
            images_BCHW = images_BCHW.to(self.device, non_blocking=True)
            self.copied[slot].record(self.copy_stream)
        return images_BCHW

    def _put(self, item: tuple[int, torch.Tensor] | BaseException) -> bool:
        """Hand over one batch; False once the epoch is closed."""
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
                self.output_queue.get_nowait()  # wakes a thread that waits for room
            except Empty:
                self.join(timeout=0.01)
        for event in self.copied:
            event.synchronize()
        super().close()
        atexit.unregister(self.close)


class FfcvLoader(Loader):
    """One epoch at a time: a new one's first batch ends the one before."""

    def __init__(self, *how: Any, workers: int) -> None:
        super().__init__(*how)
        self._workers = max(1, min(workers, numba.config.NUMBA_NUM_THREADS))
        table_CV = normalisation_table(self._mean, self._std)
        self._fused = FusedDecoder(self._augmentation, table_CV, self._how(0, np.arange(0)))
        pipelines = {"image": [self._fused], "label": None}
        with _setting(Compiler, "is_enabled", False):  # FFCV leaves this pipeline as it is: it is compiled already
            self._stock: StockLoader | None = _stock(self._split.path, pipelines, batch_size=1, workers=self._workers)
        self._epoch: _Epoch | None = None

    def _yield(self, batches: list[np.ndarray], epoch: int) -> Iterator[Batch]:
        if self._epoch is not None:
            self._epoch.close()
        ids = np.concatenate(batches)
        self._fused.how_NF = self._how(epoch, ids)
        labels = to_device(self._split.labels_B[ids], self._device).split([len(ids_B) for ids_B in batches])
        running = self._epoch = _Epoch(self._stock, batches, workers=self._workers, device=self._device)
        try:
            for ids_B, labels_B in zip(batches, labels, strict=True):
                if self._epoch is not running:
                    raise RuntimeError("this epoch was ended: its loader was closed or began another one")
                yield Batch(next(running), labels_B, ids_B)
        finally:
            running.close()

    def _how(self, epoch: int, ids: np.ndarray) -> np.ndarray:
        """What happens to each sample, filled in for these ids: `how_NF` of `_fuse_batch`."""
        how, padding = self._parameters(epoch, ids), self._augmentation.crop_padding_px
        how_NF = np.zeros((self._count, 5), dtype=np.int32)
        how_NF[ids] = np.stack([how.crop_y_B - padding, how.crop_x_B - padding, *how[2:]], axis=1)
        return how_NF

    def close(self) -> None:
        super().close()
        if self._epoch is not None:
            self._epoch.close()
        self._epoch = self._stock = None  # releases the file


@_torch_threads_kept()
def _stock(path: Path, pipelines: dict[str, Any], *, batch_size: int, workers: int) -> StockLoader:
    return StockLoader(
        os.fspath(path),
        batch_size=batch_size,
        num_workers=workers,
        os_cache=True,
        drop_last=False,
        seed=0,  # without one it takes a number from numpy's global generator; nothing here is random
        batches_ahead=_BATCHES_AHEAD,
        pipelines=pipelines,
    )


def stock_epochs(
    path: Path, *, batch_size: int, workers: int, mean: Sequence[float], std: Sequence[float]
) -> Callable[[], Iterator[torch.Tensor]]:
    """FFCV as its CIFAR-10 example uses it, for comparison; each call of the result gives one epoch's (B, C, H, W)."""
    from ffcv import transforms
    from torchvision.transforms import Normalize

    fill = tuple(round(255 * value) for value in mean)
    operations = [SimpleRGBImageDecoder(), transforms.RandomHorizontalFlip()]
    operations += [transforms.RandomTranslate(padding=4, fill=fill), transforms.Cutout(8, fill)]
    operations += [transforms.ToTensor(), transforms.ToTorchImage(), transforms.Convert(torch.float32)]
    operations += [Normalize([255 * value for value in mean], [255 * value for value in std])]

    def epoch() -> Iterator[torch.Tensor]:
        with _torch_threads_kept():
            for (images_BCHW,) in loader:
                yield images_BCHW

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it advises against a torch module on the CPU
        loader = _stock(path, {"image": operations, "label": None}, batch_size=batch_size, workers=workers)
    return epoch
