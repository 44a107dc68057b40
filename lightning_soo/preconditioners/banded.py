"""SONew's statistics of one run of elements, and the direction they give (Devvrit et al. 2023, arXiv 2311.10085).

A parameter is a run of row-major elements; chains are the rows of its matrix view (``chain_length`` = last dimension)
or the whole tensor (``chain_length = numel``). A rank holds ``n`` consecutive elements from flat index ``start`` on,
with a halo (:func:`lightning_soo.linalg.banded.halo`) where a cut falls inside a chain. Pure tensors: no process group.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_soo.linalg import banded
from lightning_soo.linalg.norms import power_of_two_scale

# Outside this range squares of float32 gradients start to overflow or to vanish, and statistics are kept scaled.
_SMALLEST, _LARGEST = 1e-10, 1e12
# Elements treated at a time on a CPU: small enough for every intermediate of a chunk to stay in the second-level cache,
# large enough for the calls (1 us each, and as much for a slice) not to count.
CHUNK = 1 << 16
_INT64 = 1 << 63


@dataclass
class BandedStatistics:
    """Running second moments between neighbours, of one run; a rank keeps those of its halo too.

    ``bands`` may be float32, float64, or bfloat16 with stochastic rounding (plain rounding would stop the running mean
    at a decay of 0.99). The rounding is a function of the seed, the number of observations, the distance and the global
    flat index alone: the same in any run that holds the element, hence at any number of ranks, and after a restart. It
    is unbiased but leaves a noise of some percent in each band on its own, so where neighbours are strongly correlated
    ``1/D`` drowns in it: float32 is the default for a reason.

    Attributes:
        bands: ``(b + 1, n)``, ``bands[k, j]`` the mean of ``scale^2 g_j g_{j+k}``; zero where ``j + k`` leaves its
            chain; what would leave the run is never read.
        start: flat index of the run's first element.
        chain_length: elements per chain.
        scale: a power of two, 1 unless gradients are extreme (1e+20, 1e-20).
        peak: decayed largest magnitude seen, which decides the scale.
        observations: gradients seen.
        seed: of the stochastic rounding.
    """

    bands: Tensor
    start: int
    chain_length: int
    scale: float = 1.0
    peak: float = 0.0
    observations: int = 0
    seed: int = 0

    @classmethod
    def zeros(
        cls,
        n: int,
        bandwidth: int,
        *,
        chain_length: int,
        start: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        seed: int = 0,
    ) -> BandedStatistics:
        bands = torch.zeros(bandwidth + 1, n, dtype=dtype, device=device)
        return cls(bands, start=start, chain_length=chain_length, seed=seed)

    def rescale(self, *, decay: float, magnitude: float) -> None:
        """Keep ``scale * gradient`` where its square fits float32; :meth:`observe` does it."""
        self.peak = max(self.peak * math.sqrt(decay), magnitude)
        if self.peak > 0.0 and not _SMALLEST <= self.peak * self.scale <= _LARGEST:
            scale = power_of_two_scale(self.peak)
            # two exact steps: the square of the ratio may not fit the dtype
            self.bands.mul_(scale / self.scale).mul_(scale / self.scale)
            self.scale = scale

    def observe(self, gradient: Tensor, *, decay: float, weight: float, magnitude: float) -> None:
        """Add one gradient: ``bands[k, j] <- decay bands[k, j] + weight g_j g_{j+k}``.

        Args:
            gradient: ``(n,)``, any floating dtype; finite.
            magnitude: largest absolute element of the whole parameter's gradient.
        """
        self.rescale(decay=decay, magnitude=magnitude)
        self.observations += 1
        n = self.bands.shape[1]
        distances = range(min(self.bands.shape[0], n))
        for first, last in chunks(n, gradient.device):
            values = gradient[first : min(last + distances[-1], n)].to(self.compute_dtype) if n else gradient
            if self.scale != 1.0:
                values = values * self.scale
            for distance in distances:
                size = min(last, n - distance) - first
                if size > 0:
                    self._add(distance, first, values[:size], values[distance : distance + size], decay, weight)
        banded.separate_chains(self.bands, self.start, self.chain_length)

    def _add(self, distance: int, first: int, left: Tensor, right: Tensor, decay: float, weight: float) -> None:
        band = self.bands[distance, first : first + left.shape[0]]
        if band.dtype == self.compute_dtype:
            band.mul_(decay).addcmul_(left, right, value=weight)
            return
        mean = band.to(self.compute_dtype).mul_(decay).addcmul_(left, right, value=weight)
        # one stream of random bits per seed, observation and distance
        stream = (self.seed * 1_000_003 + self.observations) * 1_009 + distance
        band.copy_(round_stochastically(mean, self.start + first, stream))

    @property
    def compute_dtype(self) -> torch.dtype:
        """float64 for float64 statistics, else float32."""
        return torch.float64 if self.bands.dtype == torch.float64 else torch.float32

    def ridge(self, eps: Tensor | float, *, correction: float = 1.0) -> Tensor | float:
        """An absolute ``eps`` on bias-corrected statistics, in the units of :attr:`bands`.

        Args:
            correction: ``1 - b2^t``, by which the statistics would be divided.
        """
        return eps * (correction * self.scale) * self.scale

    def relative_ridge(self, eps: float, *, out: Tensor | None = None) -> Tensor:
        """``eps`` times the largest diagonal element of each element's chain, ``(n,)``, in the units of :attr:`bands`.

        ``out``, ``(n,)``, saves an allocation that takes longer than the rest of the step on a CPU. For a run that
        begins or ends inside a chain, call :func:`~lightning_soo.linalg.banded.chain_peaks`, reduce its
        ends with the ranks that hold the rest, and :func:`~lightning_soo.linalg.banded.expand_chains` instead.
        """
        peaks = banded.chain_peaks(self.bands, self.start, self.chain_length).to(self.compute_dtype) * eps
        return banded.expand_chains(peaks, self.bands.shape[1], self.start, self.chain_length, out=out)

    def state_dict(self) -> dict[str, Any]:
        return {"bands": self.bands, "scale": self.scale, "peak": self.peak, "observations": self.observations}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.bands.copy_(state["bands"])
        self.scale, self.peak = float(state["scale"]), float(state["peak"])
        self.observations = int(state["observations"])


def direction(
    bands: Tensor, vector: Tensor, *, ridge: Tensor | float, gamma: float, out: Tensor | None = None
) -> Tensor:
    """Return ``X vector`` with ``X`` the banded LogDet solution of ``bands + ridge I``.

    Exact for elements at least :func:`~lightning_soo.linalg.banded.halo` from a cut end of the run. On a CPU the run is
    treated in chunks that overlap by that halo, so the factors never leave the cache: ``b + 2`` arrays are read, one is
    written. A compiler and a device see one piece without data-dependent control flow for ``b <= 1``.

    Args:
        bands: ``(b + 1, n)``; float32, float64 or bfloat16.
        vector: ``(n,)``, any floating dtype.
        ridge: as in :func:`~lightning_soo.linalg.banded.factor`.
        gamma: relative threshold of the edge removal.
        out: ``(n,)``, receives the result; not ``vector``.

    Returns:
        ``(n,)`` in ``out``'s dtype; without ``out``, float64 for float64 bands, else float32.
    """
    n, bandwidth = vector.shape[0], bands.shape[0] - 1
    dtype = torch.float64 if bands.dtype == torch.float64 else torch.float32
    left, right = banded.halo(bandwidth)
    result = torch.empty(n, dtype=dtype, device=vector.device) if out is None else out
    longest = max((last - first for first, last in chunks(n, vector.device)), default=0) + left + right
    rows = banded.buffer_rows(bandwidth)
    buffer = torch.empty(rows + 2, min(longest, n), dtype=dtype, device=vector.device)
    for first, last in chunks(n, vector.device):
        begin, end = max(first - left, 0), min(last + right, n)
        work = buffer[:, : end - begin]
        part = ridge[begin:end] if isinstance(ridge, Tensor) and ridge.ndim else ridge
        factors = banded.factor(bands[:, begin:end].to(dtype), part, gamma, buffer=work[:rows])
        piece = banded.apply(*factors, vector[begin:end].to(dtype), out=work[rows], spare=work[rows + 1])
        result[first:last] = piece[first - begin : last - begin]
    return result


def chunks(n: int, device: torch.device) -> Iterator[tuple[int, int]]:
    """Ranges that cover ``n`` elements: :data:`CHUNK` each on a CPU, else one (a compiler fuses instead)."""
    size = CHUNK if device.type == "cpu" and not torch.compiler.is_compiling() else max(n, 1)
    for first in range(0, n, size):
        yield first, min(first + size, n)


def round_stochastically(values: Tensor, start: int, stream: int) -> Tensor:
    """Round float32 ``values``, elements ``start ...`` of ``stream``, to bfloat16 without bias.

    The lower half of the bits is dropped after adding 16 random bits: a hash of ``(stream, flat index)``, as
    splitmix64 mixes a counter (Steele et al. 2014).
    """
    offset = (stream * 0xD1B54A32D192ED03) % (2 * _INT64) - _INT64
    mixed = torch.arange(start, start + values.shape[0], dtype=torch.int64, device=values.device)
    mixed = mixed * (0x9E3779B97F4A7C15 - 2 * _INT64) + offset
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        mixed = (mixed ^ (mixed >> shift)) * (factor - 2 * _INT64)
    noise = ((mixed >> 32) & 0xFFFF).to(torch.int32)
    return ((values.view(torch.int32) + noise) & -65536).view(torch.float32).to(torch.bfloat16)
