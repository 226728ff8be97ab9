"""The frequencies of Llama 3's rotary embedding, which GGUF files hold as divisors and configs as four numbers.

Source: the release of Llama 3.1. Wavelengths up to `original / high` stay, those beyond `original / low` are
stretched by `factor`, and between the two the change is gradual.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
"""The numbers that all published Llama 3 models have in common."""


def divisors(
    *, head_dim: int, theta: float, factor: float, low: float, high: float, original: int
) -> npt.NDArray[np.float32]:
    """By what each of the `head_dim / 2` frequencies is divided."""
    frequencies = theta ** -(np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    turns = original * frequencies / (2 * math.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)  # of the frequency that stays as it is
    return (1.0 / (share + (1.0 - share) / factor)).astype(np.float32)


def llama_3_parameters(found: npt.NDArray[np.float32], *, head_dim: int, theta: float) -> dict[str, float | str] | None:
    """The config's numbers for these divisors, where they are those of Llama 3 with some factor; else None."""
    factor = float(found.max())
    wanted = divisors(
        head_dim=head_dim,
        theta=theta,
        factor=factor,
        low=LLAMA_3["low_freq_factor"],
        high=LLAMA_3["high_freq_factor"],
        original=int(LLAMA_3["original_max_position_embeddings"]),
    )
    if found.shape != wanted.shape or factor <= 1.0 or not np.allclose(found, wanted, rtol=1e-4):
        return None
    return {"rope_type": "llama3", "rope_theta": theta, "factor": factor, **LLAMA_3}
