"""Augmentation of a batch of images as tensor operations, its noise a hash like `Dropout`'s."""

# B batch, C channels, H height, W width

from __future__ import annotations

import torch
from torch import Tensor

from hpt_torch.models.noise import hash_bits

_STREAM = 0x3C6EF35F  # the noise key itself is nobody's stream; this makes it ours


def augment(
    x_BCHW: Tensor, noise_key: Tensor, crop_padding: Tensor, flip_probability: Tensor, cutout_size: Tensor
) -> Tensor:
    """Shifts each image by up to `crop_padding` pixels each way (zeros come in), mirrors it with
    `flip_probability`, and blanks a square of side `cutout_size` around a random pixel (Cutout, DeVries &
    Taylor 2017).

    The last four are tensors of shape (): noise_key int32, the others real. Zero is the value of blanks, the
    mean of normalised images.
    """
    B, _, H, W = x_BCHW.shape
    device = x_BCHW.device
    noise_5B = hash_bits(noise_key ^ _STREAM, 5 * B, device).view(5, B).double() / 2**16
    shift_y, shift_x, mirror, centre_y, centre_x = noise_5B.unbind(0)
    rows_H, columns_W = torch.arange(H, device=device), torch.arange(W, device=device)

    reach = torch.floor(crop_padding.double())
    down_BH = rows_H + (torch.floor(shift_y * (2 * reach + 1)) - reach).long().unsqueeze(1)
    right_BW = columns_W + (torch.floor(shift_x * (2 * reach + 1)) - reach).long().unsqueeze(1)
    flipped_B = (mirror < flip_probability).unsqueeze(1)
    right_BW = torch.where(flipped_B, right_BW.flip(1), right_BW)
    inside = ((down_BH >= 0) & (down_BH < H))[:, None, :, None] & ((right_BW >= 0) & (right_BW < W))[
        :, None, None, :
    ]

    half = cutout_size.double() / 2
    cut_y = (rows_H + 0.5 - (centre_y * H).unsqueeze(1)).abs() < half
    cut_x = (columns_W + 0.5 - (centre_x * W).unsqueeze(1)).abs() < half
    keep = inside & ~(cut_y[:, None, :, None] & cut_x[:, None, None, :])

    shifted = x_BCHW.gather(2, down_BH.clamp(0, H - 1)[:, None, :, None].expand_as(x_BCHW))
    shifted = shifted.gather(3, right_BW.clamp(0, W - 1)[:, None, None, :].expand_as(x_BCHW))
    return shifted * keep
