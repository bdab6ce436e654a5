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
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

PATCH_PX = 2  # of the whitening convolution's kernel
EVALUATION_BATCH = 1000


@dataclass(frozen=True)
class Settings:
    """The published settings (section 3 and listing 4 of the paper).

    Attributes:
        epochs: length; 9.9 in the paper. The last epoch may be a part of one.
        batch_size: images a step; what is left of an epoch is dropped.
        lr, weight_decay: for each 1024 images and in units that do not depend on momentum; decay is decoupled from lr.
        momentum: Nesterov's.
        bias_scaler: factor of the learning rate of the normalisations' biases.
        label_smoothing: share of the label spread over all classes.
        whiten_bias_epochs: how long the whitening convolution's bias is trained.
        translate_px: largest shift up, down, left and right.
        widths: channels of the three blocks.
        lr_start, lr_peak_at, lr_end: of the triangle, as shares of `lr`, of the training and of `lr`.
        lookahead_steps: between updates of the average of the weights.
        seed: of weights, order and augmentation.
    """

    epochs: float = 8.0
    batch_size: int = 1024
    lr: float = 11.5
    momentum: float = 0.85
    weight_decay: float = 0.0153
    bias_scaler: float = 64.0
    label_smoothing: float = 0.2
    whiten_bias_epochs: int = 3
    translate_px: int = 2
    widths: tuple[int, int, int] = (64, 256, 256)
    lr_start: float = 0.2
    lr_peak_at: float = 0.23
    lr_end: float = 0.07
    lookahead_steps: int = 5
    seed: int = 0


def whitening_filters(images_BCHW: Tensor, *, eps: float = 5e-4) -> Tensor:
    """Filters whose outputs on the images' patches are uncorrelated and of mean square 1, and their negatives.

    Eigenvectors of the second moments of all 2×2 patches, divided by the square roots of the eigenvalues + eps.

    Args:
        images_BCHW: normalised images, float.
        eps: keeps directions that hardly occur from being blown up.

    Returns:
        float (2·4·C, C, 2, 2), the largest eigenvalue first.
    """
    channels = images_BCHW.shape[1]
    patches = images_BCHW.unfold(2, PATCH_PX, 1).unfold(3, PATCH_PX, 1)  # (B, C, H-1, W-1, 2, 2)
    patches = patches.permute(0, 2, 3, 1, 4, 5).reshape(-1, channels * PATCH_PX**2).double()
    eigenvalues, eigenvectors = torch.linalg.eigh(patches.T @ patches / len(patches))  # ascending
    filters = (eigenvectors / (eigenvalues + eps).sqrt()).T.flip(0)
    filters = filters.reshape(-1, channels, PATCH_PX, PATCH_PX).to(images_BCHW.dtype)
    return torch.cat([filters, -filters])


class _Norm(nn.BatchNorm2d):
    """Batch normalisation with a bias and no scale. Of the running statistics 0.6 is kept at each step."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-12, momentum=1 - 0.6)
        self.weight.requires_grad_(False)


class _Block(nn.Sequential):
    """Convolution, pooling, normalisation, GELU; convolution, normalisation, GELU: height and width are halved."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__(
            _conv(channels, width), nn.MaxPool2d(2), _Norm(width), nn.GELU(),
            _conv(width, width), _Norm(width), nn.GELU(),
        )  # fmt: skip


def _conv(channels: int, width: int) -> nn.Conv2d:
    """3×3 without bias; its first filters hand the channels on as they are (Dirac initialisation)."""
    conv = nn.Conv2d(channels, width, kernel_size=3, padding=1, bias=False)
    nn.init.dirac_(conv.weight[:channels].data)
    return conv


class AirbenchNet(nn.Module):
    """The network: float (B, 3, 32, 32) -> logits (B, K). 1,972,792 parameters with ten classes.

    A whitening convolution, three blocks, 3×3 max-pooling and a linear classifier, whose logits are scaled by 1/9.
    """

    def __init__(self, num_classes: int = 10, widths: Sequence[int] = (64, 256, 256)) -> None:
        super().__init__()
        filters = 2 * 3 * PATCH_PX**2
        self.whiten = nn.Conv2d(3, filters, kernel_size=PATCH_PX)
        self.whiten.weight.requires_grad_(False)
        channels = [filters, *widths]
        self.blocks = nn.Sequential(*(_Block(a, b) for a, b in pairwise(channels)))
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
        self._slow = {name: value.clone() for name, value in self._floats(net)}

    @torch.no_grad()
    def update(self, net: nn.Module, *, decay: float) -> None:
        """Average the network in, keeping `decay` of the average, and give the network the average."""
        for name, value in self._floats(net):
            value.copy_(self._slow[name].lerp_(value, 1 - decay))

    @staticmethod
    def _floats(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
        return ((name, value) for name, value in net.state_dict().items() if value.is_floating_point())


class TrainingImages:
    """The training split with its augmentation, batch after batch.

    Each image is flipped in every second epoch, beginning by a coin (alternating flip), and cut at random out of itself
    with a border of reflected pixels.

    Args:
        images_NHWC: uint8 (N, H, W, 3).
        labels_N: int64 (N,).
        mean, std: of each channel, on the scale [0, 1].
        translate_px: width of the border.
        seed: of order, coins and shifts.
    """

    def __init__(
        self,
        images_NHWC: np.ndarray,
        labels_N: np.ndarray,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        translate_px: int,
        seed: int,
    ) -> None:
        border, (height, width) = (translate_px, translate_px), images_NHWC.shape[1:3]
        padded = torch.from_numpy(np.pad(images_NHWC, ((0, 0), border, border, (0, 0)), mode="reflect"))
        # A view of all crops: [image, y, x] is one, (H, W, 3).
        self._crops = padded.unfold(1, height, 1).unfold(2, width, 1).permute(0, 1, 2, 4, 5, 3)
        self._labels_N = torch.from_numpy(np.array(labels_N))
        self._mean, self._std, self._shifts = mean, std, 2 * translate_px + 1
        self._generator = torch.Generator().manual_seed(seed)
        self._coins_N = torch.rand(len(labels_N), generator=self._generator) < 0.5

    def batches(self, epoch: int, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images float32 (B, 3, H, W) in channels_last, labels int64 (B,); what is left over is dropped."""
        order_N = torch.randperm(len(self._labels_N), generator=self._generator)
        for ids_B in order_N[: len(order_N) // batch_size * batch_size].split(batch_size):
            y_B, x_B = torch.randint(self._shifts, (2, len(ids_B)), generator=self._generator)
            images_BHWC = self._crops[ids_B, y_B, x_B]
            flipped_B = self._coins_N[ids_B] != bool(epoch % 2)
            images_BHWC[flipped_B] = images_BHWC[flipped_B].flip(2)
            yield normalised(images_BHWC, self._mean, self._std), self._labels_N[ids_B]

    def __len__(self) -> int:
        return len(self._labels_N)


def normalised(images_BHWC: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """uint8 (B, H, W, 3) -> float32 (B, 3, H, W) in channels_last."""
    images = (images_BHWC.float() / 255 - torch.tensor(mean)) / torch.tensor(std)
    return images.permute(0, 3, 1, 2)


class Training:
    """A training under way; each call of `epoch` goes on with it.

    Args:
        images: of the training split.
        whiten_on_BCHW: normalised images that the whitening is taken from; 5,000 in the paper.
        num_classes: K.
        settings: see there.
    """

    def __init__(
        self, images: TrainingImages, whiten_on_BCHW: Tensor, *, num_classes: int = 10, settings: Settings
    ) -> None:
        self._images, self._settings, self._epoch, self._step = images, settings, 0, 0
        self.total_steps = math.ceil(len(images) // settings.batch_size * settings.epochs)
        torch.manual_seed(settings.seed)
        self.net = AirbenchNet(num_classes, settings.widths).to(memory_format=torch.channels_last)
        with torch.no_grad():
            self.net.whiten.weight.copy_(whitening_filters(whiten_on_BCHW))
        self._lookahead, self._optimizer = Lookahead(self.net), _optimizer(self.net, settings)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(
            self._optimizer, lambda step: lr_share(step, self.total_steps, settings)
        )

    def epoch(self) -> int:
        """Train one epoch, or what is left of the training; returns how many images were trained on."""
        settings, before = self._settings, self._step
        self.net.train()
        self.net.whiten.bias.requires_grad_(self._epoch < settings.whiten_bias_epochs)  # type: ignore[union-attr]
        for images_BCHW, labels_B in self._images.batches(self._epoch, settings.batch_size):
            if self._step == self.total_steps:
                break
            with torch.autocast("cpu", torch.bfloat16):
                logits_BK = self.net(images_BCHW)
            loss = F.cross_entropy(
                logits_BK.float(), labels_B, label_smoothing=settings.label_smoothing, reduction="sum"
            )
            self._optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self._optimizer.step()
            self._schedule.step()
            self._step += 1
            if self._step % settings.lookahead_steps == 0:
                self._lookahead.update(self.net, decay=0.95**5 * (self._step / self.total_steps) ** 3)
        if self._step == self.total_steps:
            self._lookahead.update(self.net, decay=1.0)
        self._epoch += 1
        return (self._step - before) * settings.batch_size


def _optimizer(net: AirbenchNet, settings: Settings) -> torch.optim.Optimizer:
    """SGD on the loss summed over a batch, with a faster rate for the normalisations' biases."""
    per_step = 1024 * (1 + 1 / (1 - settings.momentum))
    lr, decay = settings.lr / per_step, settings.weight_decay * settings.batch_size / per_step
    biases = [module.bias for module in net.modules() if isinstance(module, _Norm)]
    others = [p for p in net.parameters() if p.requires_grad and all(p is not bias for bias in biases)]
    groups = [
        {"params": group, "lr": rate, "weight_decay": decay / rate}
        for group, rate in ((biases, lr * settings.bias_scaler), (others, lr))
    ]
    return torch.optim.SGD(groups, momentum=settings.momentum, nesterov=True)


@torch.no_grad()
def evaluate(net: nn.Module, images_NCHW: Tensor, labels_N: Tensor) -> dict[str, int]:
    """Correct answers: "raw", of the network as it is, and "tta", with test-time augmentation.

    The latter adds up logits of the image, of two shifts of it by one pixel (up left and down right, with reflected
    borders, together as much as the image) and of the mirrored images of all of them.

    Args:
        images_NCHW: normalised, float.
        labels_N: int64.
    """
    net.eval()
    correct = {"raw": 0, "tta": 0}

    def logits(images_BCHW: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            logits_BK: Tensor = net(images_BCHW.contiguous(memory_format=torch.channels_last)).float()
        return logits_BK

    for images, labels in zip(images_NCHW.split(EVALUATION_BATCH), labels_N.split(EVALUATION_BATCH), strict=True):
        height, width = images.shape[2:]
        padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
        shifted = [padded[:, :, :height, :width], padded[:, :, 2:, 2:]]
        raw = logits(images)
        # Of the image and its mirror half each, of the shifts a quarter each, of all of it one half: the scale is free.
        tta = 2 * (raw + logits(images.flip(3))) + sum(logits(x) + logits(x.flip(3)) for x in shifted)
        for name, answer in (("raw", raw), ("tta", tta)):
            correct[name] += int((answer.argmax(1) == labels).sum())
    return correct
