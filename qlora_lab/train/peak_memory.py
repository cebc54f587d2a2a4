"""The peak memory of a run on whatever device it has."""

import torch

from qlora_lab.runs.peak_memory import PeakRss


class PeakMemory:
    """Peak memory of a run, section by section, of this run alone also where a process does several."""

    def __init__(self, device: str) -> None:
        self.highest: dict[str, float] = {}  # of all sections so far, by the metric's name
        self._on_gpu = device == "cuda"
        self._resident = PeakRss()
        self._restart()

    def end_section(self) -> dict[str, float]:
        """Return the peaks since the last section ended; what cannot be known is left out."""
        peaks: dict[str, float] = {}
        resident = self._resident.peak_bytes()
        if resident is not None:
            peaks["peak_rss_bytes"] = resident
        if self._on_gpu:
            peaks["peak_cuda_bytes"] = torch.cuda.max_memory_allocated()
        self.highest |= {name: max(peak, self.highest.get(name, 0)) for name, peak in peaks.items()}
        self._restart()
        return peaks

    def _restart(self) -> None:
        self._resident.restart()
        if self._on_gpu:
            torch.cuda.reset_peak_memory_stats()
