"""The area under the receiver operating characteristic."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def area_under_curve(scores: Tensor, labels: Tensor) -> float:
    """How often a positive example has the higher score of a pair with a negative one; a tie counts one half.

    From ranks (Mann and Whitney): tied scores share the mean of their ranks. Not a number if one class is missing.
    """
    positive = labels > 0.5
    positives, negatives = int(positive.sum()), int((~positive).sum())
    if not positives or not negatives:
        return math.nan
    _, place, sizes = torch.unique(scores, return_inverse=True, return_counts=True)
    ends = sizes.cumsum(0).double()
    ranks = ends - (sizes.double() - 1) / 2
    above = float(ranks[place[positive]].sum()) - positives * (positives + 1) / 2
    return above / (positives * negatives)
