"""Augmentation of a whole batch at once, each image by random numbers of its own."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class Augment:
    """Batched augmentation, drawn anew for each image.

    Args:
        crop: shift each way by up to this many pixels (the border is padded with zeros).
        flip: mirror half of the images.
        rotate: rotate by up to this many degrees either way.
        scale: stretch each axis by a factor of up to ``1 + scale``, or shrink it by as much.
        elastic: deform: points on a grid, 7 pixels apart, are displaced by this many pixels (the standard deviation
            along each axis), and the pixels between them by smooth interpolation. After P. Y. Simard, D. Steinkraus &
            J. C. Platt (2003), *Best practices for convolutional neural networks applied to visual document analysis*,
            whose best setting corresponds to 1.4.
        views: predictions are averaged over this many augmented views of each test image; 1: the test image itself.
            Rotated, stretched and deformed images are interpolated, and therefore slightly blurred: a network that was
            trained on them is better on blurred test images.
        frames: each training image becomes a sequence of this many frames, in which it moves evenly from one random
            position within ``crop`` pixels to another, for costs that compare the steps of a sequence.
    """

    crop: int = 0
    flip: bool = False
    rotate: float = 0
    scale: float = 0
    elastic: float = 0
    views: int = 1
    frames: int = 1

    def __post_init__(self) -> None:
        for name, minimum in {"crop": 0, "rotate": 0, "scale": 0, "elastic": 0, "views": 1, "frames": 1}.items():
            value, integer = getattr(self, name), name in ("crop", "views", "frames")
            kind = "an integer" if integer else "a number"
            fits = isinstance(value, int if integer else int | float) and not isinstance(value, bool)
            if not fits or not minimum <= value < math.inf:
                raise ValueError(f"data.augment.{name}={value} must be {kind} >= {minimum}")
        if self.views > 1 and not (self.crop or self.flip or self.rotate or self.scale or self.elastic):
            raise ValueError(
                f"data.augment.views={self.views}, but without another augmentation all views are the same"
            )
        if self.frames > 1 and not self.crop:
            raise ValueError(
                f"data.augment.frames={self.frames}, but with data.augment.crop=0 an image has nowhere to move"
            )

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment a batch by random numbers drawn on the CPU, so that they are the same on every device."""
        n, _, height, width = images.shape
        device = images.device
        if self.flip:
            flipped = torch.rand(n, generator=generator).to(device) < 0.5
            images = torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)
        if self.rotate or self.scale or self.elastic:
            images = self._warp(images, generator)
        if self.crop:
            dy, dx = torch.randint(0, 2 * self.crop + 1, (2, n), generator=generator).to(device)
            if self.frames > 1:
                last = torch.randint(0, 2 * self.crop + 1, (2, n), generator=generator).to(device)
                start, end = (shift.unsqueeze(2).float() for shift in (torch.stack([dy, dx]), last))
                time = torch.linspace(0, 1, self.frames, device=device)
                dy, dx = torch.lerp(start, end, time).round().long().flatten(1)
                images = images.repeat_interleave(self.frames, 0)
                n *= self.frames
            rows = (dy[:, None] + torch.arange(height, device=device))[:, None, :, None]
            columns = (dx[:, None] + torch.arange(width, device=device))[:, None, None, :]
            padded = F.pad(images, [self.crop] * 4)
            sample = torch.arange(n, device=device).view(-1, 1, 1, 1)
            channel = torch.arange(images.shape[1], device=device).view(1, -1, 1, 1)
            images = padded[sample, channel, rows, columns]
        return images

    def _warp(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Rotate and stretch about the centre, and deform."""
        n, _, height, width = images.shape
        draws = (2 * torch.rand(3, n, generator=generator) - 1).to(images.device)
        angle, stretch = draws[0] * math.radians(self.rotate), (1 + self.scale) ** draws[1:]
        rotation = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], 1).view(-1, 2, 2)
        matrix = F.pad(rotation * stretch.T[:, None, :], (0, 1))
        grid = F.affine_grid(matrix, list(images.shape), align_corners=False)
        if self.elastic:
            knots = torch.randn(n, 2, height // 7 + 1, width // 7 + 1, generator=generator).to(images.device)
            shift = F.interpolate(knots, (height, width), mode="bicubic", align_corners=True).permute(0, 2, 3, 1)
            grid += shift * (2 * self.elastic / torch.tensor([width, height], device=images.device))
        return F.grid_sample(images.float(), grid, align_corners=False).round().to(torch.uint8)
