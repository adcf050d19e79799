"""Metrics of our own, which the server shows beside its own under /metrics."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..volume import Segmentation
from .attention import Outcome
from .tensors import server_module

# name -> (kind, what it counts); each has the labels model and version, and those that are told
_FAMILIES = {
    "segrt_cases_total": ("COUNTER", "Requests answered, by what became of them: done, refused, cancelled, late or failed"),
    "segrt_voxels_total": ("COUNTER", "Voxels of the images segmented, over all channels"),
    "segrt_windows_total": ("COUNTER", "Windows the network ran on"),
    "segrt_windows_shared_total": ("COUNTER", "Windows that were given the result of another one because both are constant"),
    "segrt_windows_per_second": ("GAUGE", "Windows per second of network time in the last case"),
    "segrt_stage_seconds_total": ("COUNTER", "Seconds spent in each stage of the pipeline"),
    "segrt_case_seconds_total": ("COUNTER", "Seconds from a request's start to its answer, its time in the queue not among them"),
    "segrt_window_wait_seconds_total": ("COUNTER", "Seconds that windows took at the patch models, their time in the queue included"),
}


class Meters:
    """The metrics of one model and version; equal ones of several instances are added up by the server."""

    def __init__(self, model: str, version: str) -> None:
        self._labels = {"model": model, "version": version}
        server = server_module()
        # a family must outlive its metrics, and is gone with its last reference
        self._families = {
            name: server.MetricFamily(name=name, description=text, kind=getattr(server.MetricFamily, kind))
            for name, (kind, text) in _FAMILIES.items()
        }
        self._metrics: dict[tuple[str, ...], Any] = {}

    def count_case(self, outcome: Outcome, seconds: float) -> None:
        """Count one request and what became of it."""
        self._metric("segrt_cases_total", outcome=outcome).increment(1)
        self._metric("segrt_case_seconds_total", outcome=outcome).increment(seconds)

    def count_work(self, segmentation: Segmentation, channels: int, seconds: Mapping[str, float]) -> None:
        """Count what one image took."""
        windows, shared = segmentation.windows
        self._metric("segrt_voxels_total").increment(channels * segmentation.labels.size)
        self.count_windows(windows)
        self._metric("segrt_windows_shared_total").increment(shared)
        if seconds.get("network"):
            self._metric("segrt_windows_per_second").set(windows / seconds["network"])
        for stage, took in seconds.items():
            self._metric("segrt_stage_seconds_total", stage=stage).increment(max(0.0, took))

    def count_windows(self, windows: int) -> None:
        """Count windows that a network ran on."""
        self._metric("segrt_windows_total").increment(windows)

    def count_wait(self, seconds: float) -> None:
        """Count the time windows took at a patch model."""
        self._metric("segrt_window_wait_seconds_total").increment(seconds)

    def close(self) -> None:
        """Give the metrics back before their families."""
        self._metrics.clear()
        self._families.clear()

    def _metric(self, name: str, **labels: str) -> Any:
        key = (name, *labels.values())
        if key not in self._metrics:
            self._metrics[key] = self._families[name].Metric(labels=self._labels | labels)
        return self._metrics[key]
