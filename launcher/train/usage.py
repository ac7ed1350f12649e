"""How much memory a process has used, and whether an error says that there was none left."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SAYS_NO_MEMORY = (
    "DefaultCPUAllocator",
    "out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "Cannot allocate memory",
)


@dataclass(frozen=True, slots=True)
class Usage:
    """Bytes at the peak: on the device, None without a GPU; in the host's memory, without what was there before."""

    device: int | None
    host: int


class Watch:
    """Sees the peak of this process's memory from when it is made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        # Linux begins a new peak on this; where it may not, the peak is that of the whole process.
        with contextlib.suppress(OSError):
            CLEAR_REFS.write_text("5")
        self.host_before = _status("VmRSS")

    def usage(self) -> Usage:
        """Return the peak so far."""
        device = torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None
        return Usage(device, max(0, _status("VmHWM") - self.host_before))

    def room(self) -> int:
        """Return the bytes of the device that ran out, or of the host."""
        if self.device.type == "cuda":
            return int(torch.cuda.mem_get_info(self.device)[1])
        return int(psutil.virtual_memory().total)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that no memory was left, on the device or the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _SAYS_NO_MEMORY)


def _status(key: str) -> int:
    """Return a value of this process's status in bytes; 0 where the system does not tell."""
    try:
        lines = STATUS.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), 0)
