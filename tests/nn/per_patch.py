"""Layers on tiles written out: every patch has the kernel of its tile, in double precision, under autograd."""

import torch
import torch.nn.functional as F

from rapa_dist.streams import Purpose


def tile_of_patches(layer, array, geometry, images, *, seed, place, purpose=Purpose.ASSIGN_TRAIN):
    """Return (images · n_p,) the tile of every patch, −1 for one that is dropped, and the mask of the assignment."""
    from rapa_dist.router import Router

    (assignment,) = Router(seed).assign(array, geometry, purpose, place, (images,))
    tiles = torch.full((images * geometry.n_patches,), -1)
    for tile in range(array.n_tiles):
        rows = slice(assignment.offsets[tile], assignment.offsets[tile + 1])
        tiles[torch.from_numpy(assignment.order[rows])] = tile
    return tiles, assignment.mask


def convolve(planes, kernels, tiles, mask, *, kernel, stride, dilation, padding, bias):
    """Return the outputs (images, c_out, h, w) of planes (images, c_in, h, w); kernels (n_t, k + 1, c_out)."""
    images, c_in = planes.shape[:2]
    if padding == "same":
        total = [d * (side - 1) for d, side in zip(dilation, kernel, strict=True)]
        top, left = total[0] // 2, total[1] // 2
        padded = F.pad(planes, (left, total[1] - left, top, total[0] - top))
    else:
        padded = F.pad(planes, (padding[1], padding[1], padding[0], padding[0]))
    columns = F.unfold(padded, kernel, dilation=dilation, stride=stride)  # (images, c_in · kh · kw, n_p)
    n_patches = columns.shape[2]
    patches = columns.view(images, c_in, -1, n_patches).permute(0, 3, 2, 1)  # (images, n_p, kh · kw, c_in)
    if mask is not None:
        patches = patches * torch.from_numpy(mask)[None, :, :, None]
    patches = patches.reshape(images * n_patches, 1, -1)
    of_patch = kernels[tiles.clamp(min=0)]
    k = patches.shape[2]
    outputs = (patches @ of_patch[:, :k]).squeeze(1)
    if bias:
        outputs = outputs + of_patch[:, k]
    outputs = outputs * (tiles >= 0)[:, None]
    height = (padded.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
    return outputs.view(images, height, -1, kernels.shape[2]).permute(0, 3, 1, 2)


class Explicit(torch.nn.Module):
    """A layer on tiles written out, with the assignments that a session draws for training."""

    def __init__(self, layer, array, seed):
        super().__init__()
        self.layer, self.array, self.seed = [layer], array, seed  # in a list, so that it is no part of this one
        self.kernels = torch.nn.Parameter(layer.kernels.detach().double().clone())
        self.step, self.calls = 0, 0

    def forward(self, planes):
        layer, array = self.layer[0], self.array
        geometry = array.passages[self.calls % len(array.passages)]
        place = (self.step, self.calls) if self.calls else (self.step,)
        self.calls += 1
        tiles, mask = tile_of_patches(layer, array, geometry, len(planes), seed=self.seed, place=place)
        return convolve(
            planes,
            self.kernels,
            tiles,
            mask,
            kernel=layer.kernel_size,
            stride=layer.stride,
            dilation=layer.dilation,
            padding=layer.padding,
            bias=layer.has_bias,
        )

    def end_step(self):
        self.step, self.calls = self.step + 1, 0
