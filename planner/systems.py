"""Devices that are known by name: memory, bandwidth and peak of each, with where the numbers are from.

memory     what torch reports as total memory, as out-of-memory messages in public reports have it ("total capacity of 79.11 GiB");
           less than the nominal size by what ECC and the driver keep, and some hundredths of a GiB apart between drivers
bandwidth  of the memory, from the maker's data sheet; what a kernel reaches is less (cost/roofline.py)
flops      dense 16-bit tensor operations a second, from the data sheet: half of what is printed "with sparsity"
"""

from typing import NamedTuple

from planner.units import GIB

GB, TERA = 10**9, 10**12


class Known(NamedTuple):
    memory_bytes: int
    bandwidth_bytes_per_s: float
    flops_per_s: float
    source: str


SYSTEMS: dict[str, Known] = {
    "h100_sxm": Known(int(79.11 * GIB), 3350 * GB, 989.4 * TERA, "NVIDIA H100 data sheet, SXM5"),
    "h100_pcie": Known(int(79.11 * GIB), 2000 * GB, 756.5 * TERA, "NVIDIA H100 data sheet, PCIe"),
    "h200_sxm": Known(int(139.8 * GIB), 4800 * GB, 989.4 * TERA, "NVIDIA H200 data sheet, SXM"),
    "b200": Known(int(178.35 * GIB), 8000 * GB, 2250 * TERA, "NVIDIA DGX B200 data sheet, an eighth of it"),
    "a100_sxm_80gb": Known(int(79.25 * GIB), 2039 * GB, 312 * TERA, "NVIDIA A100 data sheet, 80GB SXM"),
    "a100_pcie_80gb": Known(int(79.25 * GIB), 1935 * GB, 312 * TERA, "NVIDIA A100 data sheet, 80GB PCIe"),
    "a100_sxm_40gb": Known(int(39.39 * GIB), 1555 * GB, 312 * TERA, "NVIDIA A100 data sheet, 40GB"),
    "l40s": Known(int(44.39 * GIB), 864 * GB, 362.05 * TERA, "NVIDIA L40S data sheet"),
    "l4": Known(int(22.03 * GIB), 300 * GB, 121 * TERA, "NVIDIA L4 data sheet"),
    "a10g": Known(int(22.06 * GIB), 600 * GB, 70 * TERA, "NVIDIA A10G data sheet"),
    "rtx4090": Known(25_250_627_584, 1008 * GB, 165.2 * TERA, "NVIDIA Ada architecture paper; memory from a vLLM run's record"),
    "rtx5090": Known(int(31.36 * GIB), 1792 * GB, 209.5 * TERA, "NVIDIA RTX Blackwell architecture paper"),
    "rtx_pro_6000": Known(int(94.97 * GIB), 1792 * GB, 503.8 * TERA, "NVIDIA RTX PRO Blackwell architecture paper"),
    "mi300x": Known(int(191.98 * GIB), 5300 * GB, 1307.4 * TERA, "AMD Instinct MI300X data sheet"),
}
