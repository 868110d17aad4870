"""The clock of a run, and model FLOPs utilization: how close training comes to the peak of a known device."""

import math
import re
import time
from collections.abc import Sequence
from typing import Any

from cnnjax.network import Network
from cnnjax.runs.schema import Timing
from cnnjax.summary import forward_flops

# Dense FLOP/s in bfloat16 (float16 for V100 and T4, which have no bfloat16) with sums in float32, by `device_kind`. The
# peak in float32 is lower, so a network in float32 stays far from 100%. NVIDIA's data sheets also state twice these
# values, for sparse matrices. The parts of a GPU that is divided by MIG have other names, and are unknown.
PEAKS = {
    r"NVIDIA B200": 2250e12,  # Blackwell architecture technical brief
    r"NVIDIA H200|NVIDIA H100 80GB HBM3|NVIDIA GH200 .*": 989.4e12,  # Data sheets of H200, H100 SXM and GH200
    r"NVIDIA H100 NVL": 835.5e12,  # H100 data sheet
    r"NVIDIA H100 PCIe": 756e12,  # H100 data sheet
    r"NVIDIA A100[- ](SXM4-\d+GB|PCIE-\d+GB|80GB PCIe)": 312e12,  # A100 data sheet
    r"NVIDIA A10": 125e12,  # A10 data sheet
    r"NVIDIA L40S": 362.05e12,  # L40S data sheet
    r"NVIDIA L40": 181.05e12,  # L40 data sheet
    r"NVIDIA L4": 121e12,  # L4 data sheet
    r"NVIDIA GeForce RTX 5090": 209.5e12,  # RTX Blackwell architecture, appendix A
    r"NVIDIA GeForce RTX 4090": 165.2e12,  # Ada architecture, appendix A
    r"NVIDIA GeForce RTX 4080": 97.5e12,  # Ada architecture, appendix A
    r"NVIDIA GeForce RTX 3090": 71e12,  # GA102 architecture, appendix A
    r"Tesla V100-SXM2-\d+GB": 125e12,  # V100 data sheet
    r"Tesla V100-PCIE-\d+GB": 112e12,  # V100 data sheet
    r"Tesla T4": 65e12,  # T4 data sheet
    # cloud.google.com/tpu/docs/v2 and so on; the devices of v2 and v3 are halves of a chip.
    r"TPU v2": 46e12 / 2,
    r"TPU v3": 123e12 / 2,
    r"TPU v4": 275e12,
    r"TPU v5 lite|TPU v5e": 197e12,
    r"TPU v5|TPU v5p": 459e12,
    r"TPU v6 lite|TPU v6e": 918e12,
}


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak of a device in FLOP/s, see `PEAKS`; None if it is not known, as on a CPU."""
    return next((peak for pattern, peak in PEAKS.items() if re.fullmatch(pattern, device_kind)), None)


def seconds_at_peak(model: Network, image_shape: tuple[int, ...], devices: Sequence[Any]) -> float | None:
    """Returns the seconds per training image if all devices computed at their peak; None if that is not known.

    A training image is three times the FLOPs of a forward pass: the backward pass computes the gradients of the
    activations and of the parameters. Source: Chowdhery et al. 2022 (PaLM), appendix B.

    Args:
      devices: those that share a batch.
    """
    peak = peak_flops(devices[0].device_kind)
    return None if peak is None else 3 * forward_flops(model, image_shape) / (peak * len(devices))


class Clock:
    """Measures a run, in all of its sessions, and the steps of its epochs.

    Attributes:
      epoch_seconds: the duration of the steps of the last epoch; infinite before its end.
    """

    def __init__(self, seconds: float) -> None:
        """Starts a session; `seconds` is the duration of earlier ones."""
        self._begin = time.perf_counter() - seconds  # When a run without interruptions would have begun.
        self.epoch_seconds = math.inf

    def seconds(self) -> float:
        """Returns the duration of the run so far."""
        return time.perf_counter() - self._begin

    def start_epoch(self, num_examples: int = 0) -> None:
        """Starts an epoch; `num_examples` of it were trained in earlier sessions."""
        self._start, self._before = time.perf_counter(), num_examples

    def end_steps(self, num_examples: int) -> float:
        """Ends the steps of an epoch of `num_examples` examples; returns the images per second in this session."""
        self.epoch_seconds = time.perf_counter() - self._start
        return (num_examples - self._before) / self.epoch_seconds


def make_timing(epoch: int, images_per_second: float, seconds: float, at_peak: float | None) -> Timing:
    """Returns a line of timing.jsonl; `at_peak`: see `seconds_at_peak`."""
    timing: Timing = {"epoch": epoch, "images_per_second": images_per_second, "seconds": seconds}
    return timing if at_peak is None else {**timing, "flops_utilization": images_per_second * at_peak}
