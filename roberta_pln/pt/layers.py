"""What `torch.nn` has too, and computes more slowly."""

import math

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Zeros in place of a share `p` of the elements, the others divided by 1 - p; in training only.

    PyTorch's own takes a random number for each element on a processor, which takes longer than attention does, and
    keeps a factor in full size for the backward pass. Here each of the four parts of a random number decides on an
    element, so that p is a whole multiple of 2**-16, the nearest one, and a boolean is kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        zeros = round(self.p * 2**16)  # of 2**16
        own = self.training and 0 < zeros < 2**16 and not self.inplace
        if not own or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        numbers = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),)).view(torch.int16)
        kept = (numbers[: x.numel()] >= zeros - 2**15).view(x.shape)
        return (x * kept).mul_(1 / (1 - math.ldexp(zeros, -16)))
