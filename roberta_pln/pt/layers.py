"""What `torch.nn` has too, and computes more slowly."""

import torch
from torch import Tensor, nn


class Dropout(nn.Dropout):
    """Zeros in place of a share `p` of the elements, the others divided by 1 - p; in training only.

    PyTorch's own takes a random number for each element on a processor, which takes longer than attention does, and
    keeps a factor in full size for the backward pass. Here 16 bits decide on an element, so that the share of a call is
    a multiple of 2**-16, below or above p so often that each element's probability is p; and a boolean is kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        own = self.training and 2**-8 <= self.p <= 1 - 2**-8 and not self.inplace
        if not own or x.device.type != "cpu" or torch.compiler.is_compiling():
            return super().forward(x)
        numbers = torch.randint(-(2**63), 2**63 - 1, (1 + -(-x.numel() // 4),))
        rounding = numbers[-1].double() * 2**-64 + 0.5  # in [0, 1]
        zeros = (self.p * 2**16 + rounding).floor() - 2**15  # those of the 2**16 numbers that are smaller
        kept = (numbers.view(torch.int16)[: x.numel()] >= zeros.short()).view(x.shape)
        return (x * kept).mul_(1 / (1 - self.p))
