"""airbench94, a peer in the benchmark of time to accuracy: what it trains, how, and how it is judged.

A reimplementation in our own words, for CPUs, of the method published by Keller Jordan, "94% on CIFAR-10 in 3.29
Seconds on a Single GPU", 2024, https://arxiv.org/abs/2404.00498: its network, initialisation, augmentation, optimizer
and test-time augmentation with their published settings. What differs: bfloat16 by autocast on float32 weights where
the paper has float16 weights; channels_last; 8 epochs rather than 9.9 unless told otherwise.

Legend of shape letters: N images of a split, B of a batch, C channels, H height and W width in pixels, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_PX = 2  # of the whitening convolution's kernel
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Settings:
    """The published settings (section 3 and listing 4 of the paper)."""

    epochs: float = 8.0  # 9.9 in the paper; the last one may be a part of one
    batch_size: int = 1024  # what is left of an epoch is dropped
    lr: float = 11.5  # for each 1024 images, in units that do not depend on momentum
    momentum: float = 0.85  # Nesterov's
    weight_decay: float = 0.0153  # for each 1024 images, decoupled from lr
    bias_scaler: float = 64.0  # of the learning rate of the normalisations' biases
    label_smoothing: float = 0.2  # share of the label spread over all classes
    whiten_bias_epochs: int = 3  # how long the whitening convolution's bias is trained
    translate_px: int = 2  # largest shift up, down, left and right
    widths: tuple[int, int, int] = (64, 256, 256)  # of the three blocks
    lr_start: float = 0.2  # of the triangle, as shares of `lr`, of the training and of `lr`
    lr_peak_at: float = 0.23
    lr_end: float = 0.07
    lookahead_steps: int = 5  # between updates of the average of the weights
    seed: int = 0  # of weights, order and augmentation


def whitening_filters(images_BCHW: Tensor, *, eps: float = 5e-4) -> Tensor:
    """Filters (2·4·C, C, 2, 2) whose outputs on the images' patches are uncorrelated and of mean square 1, the largest
    eigenvalue first, and their negatives.

    Eigenvectors of the second moments of all 2×2 patches, divided by the square roots of the eigenvalues + eps, which
    keeps directions that hardly occur from being blown up.
    """
    channels = images_BCHW.shape[1]
    patches = images_BCHW.unfold(2, PATCH_PX, 1).unfold(3, PATCH_PX, 1)  # (B, C, H-1, W-1, 2, 2)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * PATCH_PX**2).double()
    eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    filters = (eigenvectors / (eigenvalues + eps).sqrt()).T.flip(0)
    filters = filters.reshape(-1, channels, PATCH_PX, PATCH_PX).to(images_BCHW.dtype)
    return torch.cat([filters, -filters])


def _norm(channels: int) -> nn.BatchNorm2d:
    """With a bias and no scale. Of the running statistics 0.6 is kept at each step."""
    norm = nn.BatchNorm2d(channels, eps=1e-12, momentum=1 - 0.6)
    norm.weight.requires_grad_(False)
    return norm


def _conv(channels: int, width: int) -> nn.Conv2d:
    """3×3 without bias; its first filters hand the channels on as they are (Dirac initialisation)."""
    conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:channels].data)
    return conv


class AirbenchNet(nn.Module):
    """The network: float (B, 3, 32, 32) -> logits (B, K). 1,972,792 parameters with ten classes.

    A whitening convolution, three blocks that halve height and width, 3×3 max-pooling and a linear classifier, whose
    logits are scaled by 1/9.
    """

    def __init__(self, num_classes: int = 10, widths: Sequence[int] = (64, 256, 256)) -> None:
        super().__init__()
        channels = [2 * 3 * PATCH_PX**2, *widths]
        self.whiten = nn.Conv2d(3, channels[0], kernel_size=PATCH_PX)
        self.whiten.weight.requires_grad_(False)
        self.blocks = nn.Sequential()
        for before, width in pairwise(channels):
            first = [_conv(before, width), nn.MaxPool2d(2), _norm(width), nn.GELU()]
            self.blocks.append(nn.Sequential(*first, _conv(width, width), _norm(width), nn.GELU()))
        self.pool = nn.MaxPool2d(3)
        self.classifier = nn.Linear(channels[-1], num_classes, bias=False)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        x = F.gelu(self.whiten(x_BCHW))
        logits_BK: Tensor = self.classifier(self.pool(self.blocks(x)).flatten(1)) / 9
        return logits_BK


def lr_share(step: int, total_steps: int, settings: Settings) -> float:
    """The learning rate of a step (0 is the first) as a share of its peak: a triangle."""
    peak = int(settings.lr_peak_at * total_steps)
    return float(np.interp(step, [0, peak, total_steps], [settings.lr_start, 1.0, settings.lr_end]))


class Lookahead:
    """A slow average of weights and statistics, to which the network is set back at each update.

    Zhang et al. 2019, "Lookahead Optimizer: k steps forward, 1 step back", https://arxiv.org/abs/1907.08610.
    """

    def __init__(self, net: nn.Module) -> None:
        self._values = [value for value in net.state_dict().values() if value.is_floating_point()]  # the net's own
        self._slow = [value.clone() for value in self._values]

    @torch.no_grad()
    def update(self, *, decay: float) -> None:
        """Average the network in, keeping `decay` of the average, and give the network the average."""
        for slow, value in zip(self._slow, self._values, strict=True):
            value.copy_(slow.lerp_(value, 1 - decay))


class TrainingImages:
    """The training split, uint8 (N, H, W, 3) and int64 (N,), with its augmentation, batch after batch.

    Each image is flipped in every second epoch, beginning by a coin (alternating flip), and cut at random out of itself
    with a border of reflected pixels. `scale` is mean and std of each channel, on the scale [0, 1].
    """

    def __init__(self, images_NHWC: np.ndarray, labels_N: np.ndarray, *, settings: Settings, **scale: Any) -> None:
        border, (height, width) = (settings.translate_px, settings.translate_px), images_NHWC.shape[1:3]
        padded = torch.from_numpy(np.pad(images_NHWC, ((0, 0), border, border, (0, 0)), mode="reflect"))
        # A view of all crops: [image, y, x] is one, (H, W, 3).
        self._crops = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
        self._labels_N = torch.from_numpy(np.array(labels_N))
        self._scale, self._shifts = scale, 2 * settings.translate_px + 1
        self._generator = torch.Generator().manual_seed(settings.seed)
        self._coins_N = torch.rand(len(labels_N), generator=self._generator) < 0.5

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 (B, 3, H, W) in channels_last, labels int64 (B,); what is left over is dropped."""
        order_N = torch.randperm(len(self._labels_N), generator=self._generator)
        for ids_B in order_N[: len(order_N) // batch_size * batch_size].split(batch_size):
            y_B, x_B = torch.randint(self._shifts, (2, len(ids_B)), generator=self._generator)
            images_BHWC = self._crops[ids_B, y_B, x_B]
            flipped_B = self._coins_N[ids_B] != bool(epoch % 2)
            images_BHWC[flipped_B] = images_BHWC[flipped_B].flip(2)
            yield normalised(images_BHWC, **self._scale), self._labels_N[ids_B]

    def __len__(self) -> int:
        return len(self._labels_N)


def normalised(images_BHWC: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in channels_last."""
    images = (images_BHWC.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return images.permute(0, 3, 1, 2)


class Training:
    """A training in progress; the whitening is taken from normalised images, of which the paper has 5,000."""

    def __init__(
        self, images: TrainingImages, whiten_on_BCHW: Tensor, *, num_classes: int = 10, settings: Settings
    ) -> None:
        self._images, self._settings, self._epoch, self._step = images, settings, 0, 0
        self.total_steps = math.ceil(len(images) // settings.batch_size * settings.epochs)
        torch.manual_seed(settings.seed)
        self.net = AirbenchNet(num_classes, settings.widths).to(memory_format=torch.channels_last)
        with torch.no_grad():
            self.net.whiten.weight.copy_(whitening_filters(whiten_on_BCHW))
        self._lookahead, self.optimizer = Lookahead(self.net), _optimizer(self.net, settings)
        share = partial(lr_share, total_steps=self.total_steps, settings=settings)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)

    def epoch(self) -> int:
        """Train one epoch, or what is left of the training; returns how many images were trained on."""
        settings, before = self._settings, self._step
        self.net.train()
        self.net.whiten.bias.requires_grad_(self._epoch < settings.whiten_bias_epochs)  # type: ignore[union-attr]
        for images_BCHW, labels_B in self._images.batches(self._epoch, settings.batch_size):
            if self._step == self.total_steps:
                break
            logits_BK, smoothing = _logits(self.net, images_BCHW), settings.label_smoothing
            self.optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(logits_BK, labels_B, label_smoothing=smoothing, reduction="sum").backward()
            self.optimizer.step()
            self._schedule.step()
            self._step += 1
            if self._step % settings.lookahead_steps == 0:
                self._lookahead.update(decay=0.95**5 * (self._step / self.total_steps) ** 3)
        if self._step == self.total_steps:
            self._lookahead.update(decay=1.0)
        self._epoch += 1
        return (self._step - before) * settings.batch_size


def _optimizer(net: AirbenchNet, settings: Settings) -> torch.optim.Optimizer:
    """SGD on the loss summed over a batch, with a faster rate for the normalisations' biases."""
    per_step = 1024 * (1 + 1 / (1 - settings.momentum))
    lr, decay = settings.lr / per_step, settings.weight_decay * settings.batch_size / per_step
    biases = [module.bias for module in net.modules() if isinstance(module, nn.BatchNorm2d)]
    others = [p for p in net.parameters() if p.requires_grad and all(p is not bias for bias in biases)]
    rates = ((biases, lr * settings.bias_scaler), (others, lr))
    groups = [{"params": group, "lr": rate, "weight_decay": decay / rate} for group, rate in rates]
    return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=True)


def _logits(net: nn.Module, images_BCHW: Tensor) -> Tensor:
    """float32, computed in bfloat16."""
    with torch.autocast("cpu", torch.bfloat16):
        logits_BK: Tensor = net(images_BCHW.contiguous(memory_format=torch.channels_last))
    return logits_BK.float()


@torch.no_grad()
def evaluate(net: nn.Module, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, int]:
    """Correct answers on normalised images: "raw", of the network as it is, and "tta", with test-time augmentation.

    The latter adds up logits of the image, of two shifts of it by one pixel (up left and down right, with reflected
    borders, together as much as the image) and of the mirrored images of all of them.
    """
    net.eval()
    correct = {"raw": 0, "tta": 0}
    for images, labels in zip(images_NCHW.split(EVALUATION_BATCH), labels_N.split(EVALUATION_BATCH), strict=True):
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        shifted = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
        raw = _logits(net, images)
        # Of the image and its mirror half each, of the shifts a quarter each, of all of it one half: the scale is free.
        tta = 2 * (raw + _logits(net, images.flip(3))) + sum(_logits(net, x) + _logits(net, x.flip(3)) for x in shifted)
        for name, answer in (("raw", raw), ("tta", tta)):
            correct[name] += int((answer.argmax(1) == labels).sum())
    return correct
