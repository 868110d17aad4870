"""The capacity plan of ResNet-50 on ImageNet: formulas, and the figures that are not measured here, with their sources.

`scale.py` measures the other figures, and writes them into capacity.json and the tables into CAPACITY.md. A second is
the unit of every time, a byte that of every size. It imports the standard library only.
"""

import math
from typing import NamedTuple

from harness import table

SECONDS_PER_YEAR = 365.25 * 24 * 3600
NUM_IMAGES, NUM_EPOCHS = 1_281_167, 90
# The size of ILSVRC2012_img_train.tar, which contains the training images; image-net.org calls it 138 GB.
BYTES_PER_IMAGE = 147_897_477_120 / NUM_IMAGES
# Accuracy is kept up to this batch size by SGD with a linear warm-up. Source: Goyal et al., "Accurate, large minibatch
# SGD: training ImageNet in 1 hour" (2017).
MAX_BATCH_SIZE, MAX_BATCH_SIZE_PER_DEVICE = 8192, 256
NUM_DEVICES = (8, 16, 32, 64, 128, 256, 512)

# 419 unexpected interruptions in 54 days on 16,384 H100 GPUs. Source: Llama Team, "The Llama 3 herd of models" (2024),
# section 3.3.4.
HARDWARE_FAILURES = 419 / 16_384 / (54 / 365.25)  # Per device and year.
# An assumption for machines that are lent until someone pays more: each host is taken away once a day.
PREEMPTIONS_PER_HOST = 365.25  # Per year.
# The time limit after which the other hosts give up a silent one, at most two minutes, and time to schedule a new one.
DETECTION_SECONDS, SCHEDULING_SECONDS = 120.0, 60.0
CHECKPOINT_SECONDS = 60.0  # The default of `train_and_evaluate`.


class Cluster(NamedTuple):
    """Devices of one kind, the same number on each host.

    Attributes:
      peak_flops: per second, of dense products in bfloat16.
      utilization: the part of `peak_flops` that training reaches.
      inside: bytes per second that a device sends to others of its host.
      between: bytes per second that a device sends to other hosts, while all devices of its host do.
      cores: of a host.
    """

    name: str
    peak_flops: float
    utilization: float
    inside: float
    between: float
    devices_per_host: int = 8
    cores: int = 128


class Measured(NamedTuple):
    """What `scale.py` measures.

    Attributes:
      num_params: of ResNet-50.
      norm_channels: the number of means in its batch statistics.
      forward_flops: of an image of 224 by 224 pixels, as `cnnjax summary` prints.
      reduced_bytes: the results of all collectives of a step with data parallelism, in float32.
      num_reductions: the number of these collectives that depend on each other: all except those of gradients.
      images_per_core: images per second that a core reads, decodes and resizes.
      checkpoint_bytes: parameters, momentum, averaged parameters and batch statistics.
      stall_seconds: of a save, in which training waits. The rest is done in the background.
      save_seconds: until a checkpoint is complete on disk, with its checksums.
      restore_seconds: until a checkpoint is verified and loaded.
      start_seconds: from the start of processes to their first all-reduce.
      compile_seconds: of the step.
    """

    num_params: int
    norm_channels: int
    forward_flops: int
    reduced_bytes: int
    num_reductions: int
    images_per_core: float
    checkpoint_bytes: int
    stall_seconds: float
    save_seconds: float
    restore_seconds: float
    start_seconds: float
    compile_seconds: float


def training_flops(forward_flops: float) -> float:
    """Returns the operations of a training step per image: the gradients of images and weights cost as much each."""
    return 3 * forward_flops


def utilization(images_per_second: float, forward_flops: float, peak_flops: float) -> float:
    """Returns the part of the peak that a measured speed of training is."""
    return images_per_second * training_flops(forward_flops) / peak_flops


def compute_seconds(images_per_device: int, forward_flops: float, cluster: Cluster) -> float:
    """Returns the duration of a step without communication."""
    return images_per_device * training_flops(forward_flops) / (cluster.peak_flops * cluster.utilization)


def reduced_bytes(num_params: int, norm_channels: int) -> int:
    """Returns the bytes that a step of data parallelism sums over the devices, in float32.

    These are the gradients, and per channel of a batch normalization over the global batch two sums of the forward pass
    (of values and squares) and one of the backward pass; the other two are the gradients of scale and bias.
    """
    return 4 * (num_params + 3 * norm_channels)


def ring_bytes(num_bytes: float, n: int) -> float:
    """Returns the bytes that each of n devices sends in a ring all-reduce: a reduce-scatter, then an all-gather.

    Source: Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations" (2009).
    """
    return 2 * (n - 1) / n * num_bytes


def all_reduce_seconds(num_bytes: float, num_devices: int, cluster: Cluster) -> float:
    """Returns the duration of a large all-reduce, limited by bandwidth.

    First a reduce-scatter inside each host, then an all-reduce of each device's part between hosts, then an all-gather
    inside.
    """
    inside = min(num_devices, cluster.devices_per_host)
    hosts = num_devices // inside
    return ring_bytes(num_bytes, inside) / cluster.inside + ring_bytes(num_bytes / inside, hosts) / cluster.between


def latency_seconds(num_devices: int, devices_per_host: int) -> float:
    """Returns the duration of a small all-reduce on NVLink and InfiniBand, limited by latency.

    Source: NCCL's own estimate for trees and its protocol LL, `ncclTopoTuneModel` in src/graph/tuning.cc (01afd20).
    """
    inside = min(num_devices, devices_per_host)
    hosts = num_devices // inside
    inside_us = 0.52 if hosts == 1 else 0.52 * 1.8
    return (4.4 + 2 * ((inside - 1) * inside_us + math.log2(hosts) * 5.0)) * 1e-6


def batch_per_device(num_devices: int) -> int:
    """Returns the number of images per device and step, limited by memory and by the global batch."""
    return min(MAX_BATCH_SIZE_PER_DEVICE, MAX_BATCH_SIZE // num_devices)


def seconds_between_failures(num_devices: int, failures_per_device_year: float) -> float:
    """Returns the mean time between failures of any device, each of which ends the step on all."""
    return SECONDS_PER_YEAR / (num_devices * failures_per_device_year)


def optimal_interval(stall_seconds: float, between_failures: float) -> float:
    """Returns the time of training between two checkpoints that loses least, to first order.

    Source: Young, "A first order approximation to the optimum checkpoint interval" (1974).
    """
    return math.sqrt(2 * stall_seconds * between_failures)


def goodput(interval: float, stall_seconds: float, restart_seconds: float, between_failures: float) -> float:
    """Returns the part of the time that is spent on steps that are kept, if failures are independent.

    Source: Daly, "A higher order estimate of the optimum checkpoint interval for restart dumps" (2006).

    Args:
      interval: the time of training between two checkpoints.
      restart_seconds: from a failure until the last checkpoint is reached again; another failure starts this anew.
    """
    per_interval = math.expm1((interval + stall_seconds) / between_failures)
    return interval / (between_failures * math.exp(restart_seconds / between_failures) * per_interval)


class Scaling(NamedTuple):
    """The steps of a run on a number of devices.

    Attributes:
      images_per_device: per step.
      compute_seconds, gradient_seconds, statistics_seconds: the parts of a step.
      sent_bytes: by each device per step, in one ring.
      images_per_host: per second.
      cores: of a host, that decode as fast as its devices train.
      run_seconds: of `NUM_EPOCHS` epochs, without evaluation, if no step waits for images.
      run_seconds_on_cores: the same, if all cores of the hosts decode, even if there are not enough of them.
    """

    images_per_device: int
    compute_seconds: float
    gradient_seconds: float
    statistics_seconds: float
    sent_bytes: float
    images_per_host: float
    cores: float
    run_seconds: float
    run_seconds_on_cores: float

    @property
    def step_seconds(self) -> float:
        """The duration of a step, if no communication overlaps with computation."""
        return self.compute_seconds + self.gradient_seconds + self.statistics_seconds

    @property
    def efficiency(self) -> float:
        """The speed per device, relative to a single one with the same number of images per step."""
        return self.compute_seconds / self.step_seconds


def scaling(num_devices: int, cluster: Cluster, measured: Measured) -> Scaling:
    """Returns the plan for a number of devices.

    The gradients are summed after the backward pass, as in the program that XLA compiles for a CPU: no overlap is
    assumed. The small all-reduces of the batch statistics depend on each other.
    """
    images = batch_per_device(num_devices)
    compute = compute_seconds(images, measured.forward_flops, cluster)
    gradients = all_reduce_seconds(measured.reduced_bytes, num_devices, cluster)
    statistics = measured.num_reductions * latency_seconds(num_devices, cluster.devices_per_host)
    step = compute + gradients + statistics
    per_host = min(num_devices, cluster.devices_per_host) * images / step
    cores = per_host / measured.images_per_core
    run = NUM_EPOCHS * math.ceil(NUM_IMAGES / (images * num_devices)) * step
    sent = ring_bytes(measured.reduced_bytes, num_devices)
    bound = max(1.0, cores / cluster.cores)
    return Scaling(images, compute, gradients, statistics, sent, per_host, cores, run, run * bound)


def restart_seconds(measured: Measured) -> float:
    """Returns the time from a failure until the last step before it that could have been saved is reached again.

    This is the sum of detection, scheduling, start, compilation, loading, and the steps that were taken while the last
    checkpoint was written.
    """
    starts = measured.start_seconds + measured.compile_seconds + measured.restore_seconds
    return DETECTION_SECONDS + SCHEDULING_SECONDS + starts + measured.save_seconds


def state_bytes(num_params: int, norm_channels: int, copies: int = 3) -> int:
    """Returns the size of a checkpoint in float32, without counters.

    Args:
      copies: of the parameters: themselves, momentum, moving average.
    """
    return 4 * (copies * num_params + 2 * norm_channels)


def clusters(forward_flops: float) -> list[Cluster]:
    """Returns the clusters of the plan.

    Sources: NVIDIA's data sheets of A100 80 GB SXM, DGX A100, H100 SXM and DGX H100: operations per second in bfloat16
    without sparsity; memory of 2,039 and 3,350 GB/s; NVLink of 600 and 900 GB/s in both directions together; eight
    network cards of 200 and 400 Gb/s and 128 and 112 cores per host. The speed of an A100 is that of NVIDIA's
    DeepLearningExamples, PyTorch/Classification/ConvNets/resnet50v1.5: 2,470 images/s on one, mixed precision. That of
    an H100 is an assumption: as much faster as its memory, which limits ResNet-50.
    """
    a100, h100 = 2470, 2470 * 3350 / 2039
    return [
        Cluster("A100", 312e12, utilization(a100, forward_flops, 312e12), 300e9, 25e9, cores=128),
        Cluster("H100", 989e12, utilization(h100, forward_flops, 989e12), 450e9, 50e9, cores=112),
    ]


def plan(measured: Measured) -> str:
    """Returns the tables of the plan: the steps on each cluster, and the cost of failures on the last one."""
    known = clusters(measured.forward_flops)
    tables = [scaling_table(cluster, measured) for cluster in known]
    return "\n\n".join([*tables, failure_table(known[-1], measured)])


def scaling_table(cluster: Cluster, measured: Measured) -> str:
    """Returns the steps, and what they need, for each number of devices."""
    rows = []
    for n in NUM_DEVICES:
        x = scaling(n, cluster, measured)
        parts = x.compute_seconds, x.gradient_seconds, x.statistics_seconds, x.step_seconds
        cores = f"**{x.cores:,.0f}**" if x.cores > cluster.cores else f"{x.cores:,.0f}"
        row = [n, x.images_per_device, *(f"{1e3 * part:.1f}" for part in parts), f"{x.efficiency:.0%}"]
        row += [f"{x.sent_bytes / 1e6:.0f}", f"{x.images_per_host:,.0f}", cores]
        row += [f"{x.images_per_host * BYTES_PER_IMAGE / 1e6:,.0f}"]
        rows.append([*row, f"{x.run_seconds / 60:,.1f}", f"{x.run_seconds_on_cores / 60:,.1f}"])
    head = [cluster.name, "images each", "compute, ms", "gradients, ms", "statistics, ms", "step, ms", "efficiency"]
    head += ["MB sent each", "images/s per host", f"cores per host, of {cluster.cores}", "MB/s read per host"]
    return table([*head, f"{NUM_EPOCHS} epochs, minutes", "with those cores"], rows)


def failure_table(cluster: Cluster, measured: Measured) -> str:
    """Returns the cost of failures for each number of devices."""
    rows = []
    for n in NUM_DEVICES:
        row = [f"{n}"]
        for rate in (HARDWARE_FAILURES, PREEMPTIONS_PER_HOST / cluster.devices_per_host):
            between = seconds_between_failures(n, rate)
            # A save waits for the one before.
            best = max(measured.save_seconds, optimal_interval(measured.stall_seconds, between))
            kept = [
                goodput(interval, measured.stall_seconds, restart_seconds(measured), between)
                for interval in (best, CHECKPOINT_SECONDS)
            ]
            row += [f"{between / 3600:,.1f}", f"{best:,.0f}", *(f"{x:.1%}" for x in kept)]
        rows.append(row)
    each = ["hours between", "best interval, s", "goodput", f"goodput at {CHECKPOINT_SECONDS:.0f} s"]
    return table([cluster.name, *(f"{kind}: {name}" for kind in ("failures", "preemptions") for name in each)], rows)
