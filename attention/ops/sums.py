"""Running sums that are the same in every run."""

from __future__ import annotations

import torch
from torch import Tensor


def running_sum(x: Tensor) -> Tensor:
    """The sums of the first 1, 2, ... N numbers of x [..., N], in the type of x.

    On CUDA torch's ``cumsum`` of floating-point numbers adds in an order that may differ from run to run, so
    that two runs may round differently and select different keys. There this function adds in log2(N) steps,
    each of which adds to every number the one 1, 2, 4, ... places before it: which numbers are added to
    which, and in which order, depends on N alone. On the CPU ``cumsum`` adds from left to right.
    """
    if x.device.type == "cpu":
        return x.cumsum(-1)
    step = 1
    while step < x.shape[-1]:
        x = torch.cat([x[..., :step], x[..., step:] + x[..., :-step]], -1)
        step *= 2
    return x
