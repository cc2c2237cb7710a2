"""How fast simulated clients compute and send: from bytes and examples to simulated seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from pydantic import Field
from scipy.special import ndtri

from fedrounds.fl_components.arrays import Float64
from fedrounds.fl_components.population.availability import Rows, uniform
from fedrounds.fl_components.randomness import derive_key
from fedrounds.fl_components.rules import Rule

BITS_OF_MBIT: Final = 1e6


class Network(Rule):
    """A client's link and processor stay the same for the whole run: log-normal draws from the seed around these
    medians. A round takes as long as its slowest client: its download, its local work, its upload.

    >>> network = Network(download_mbps=8, upload_mbps=1, latency_s=0.5, log_std=0, seconds_per_example=0.01)
    >>> rows_N, examples_N, upload_N = np.array([0, 1]), np.array([10, 20]), np.array([1000, 125])
    >>> network.seconds(rows_N, seed=0, examples_N=examples_N, upload_bytes_N=upload_N, download_bytes=1_000_000)
    array([2.108, 2.201])
    """

    download_mbps: float = Field(default=10.0, gt=0, description="median, in 10^6 bits a second")
    upload_mbps: float = Field(default=10.0, gt=0, description="median, in 10^6 bits a second")
    latency_s: float = Field(default=0.05, ge=0, description="median, of one way")
    log_std: float = Field(
        default=0.5, ge=0, le=3, description="standard deviation of the logarithms of bandwidths, latencies and speeds"
    )
    seconds_per_example: float = Field(default=0.0, ge=0, description="median time to train on one example once")

    def seconds(
        self,
        rows_N: Rows,
        *,
        seed: int,
        examples_N: Sequence[int] | Rows,
        upload_bytes_N: Sequence[int] | Rows,
        download_bytes: int,
    ) -> Float64:
        """How long a round takes each of the clients in these rows of the table of clients, float64 [N].

        Args:
          seed: of the run; links do not depend on the round.
          examples_N: on how many examples each trains, each pass counted.
          upload_bytes_N, download_bytes: what each sends and gets.
        """
        down_N, up_N, wait_N, speed_N = (
            self._factors(rows_N, seed, what) for what in ("download", "upload", "latency", "speed")
        )
        download_N = 8 * download_bytes / (BITS_OF_MBIT * self.download_mbps * down_N)
        upload_N = 8 * np.asarray(upload_bytes_N) / (BITS_OF_MBIT * self.upload_mbps * up_N)
        return (
            2 * self.latency_s * wait_N
            + download_N
            + np.asarray(examples_N) * self.seconds_per_example / speed_N
            + upload_N
        )

    def _factors(self, rows_N: Rows, seed: int, what: str) -> Float64:
        draws_N = uniform(rows_N, derive_key(seed, 0, f"network {what}"))
        factors_N: Float64 = np.exp(self.log_std * ndtri(np.clip(draws_N, 1e-12, 1 - 1e-12)))
        return factors_N
