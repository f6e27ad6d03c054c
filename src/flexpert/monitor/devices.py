"""What a device can compute at most: the denominator of model FLOPs utilisation (MFU)."""

import torch

#: Part of a CUDA device's name → peak FLOP/s of dense bf16 matrix products, which is what training computes in. Of two
#: that fit, the first counts. NVIDIA's data sheets state most figures with 2:4 sparsity, which are twice these.
PEAK_BF16_FLOPS = {
    # A100 data sheet: 312 TFLOPS, SXM and PCIe alike. https://www.nvidia.com/en-us/data-center/a100/
    "A100": 312e12,
    # H100 data sheet: SXM 1,979, PCIe 1,513 and NVL 1,671 TFLOPS with sparsity; SXM's device name is "H100 80GB HBM3".
    # https://www.nvidia.com/en-us/data-center/h100/
    "H100 PCIe": 756.5e12,
    "H100 NVL": 835.5e12,
    "H100": 989.5e12,
    # H200 data sheet: SXM 1,979 and NVL 1,671 TFLOPS with sparsity. https://www.nvidia.com/en-us/data-center/h200/
    "H200 NVL": 835.5e12,
    "H200": 989.5e12,
    # GH200 data sheet: 1,979 TFLOPS with sparsity. https://www.nvidia.com/en-us/data-center/grace-hopper-superchip/
    "GH200": 989.5e12,
    # GB200 NVL72 data sheet: 360 PFLOPS with sparsity for 72 GPUs. https://www.nvidia.com/en-us/data-center/gb200-nvl72/
    "GB200": 2.5e15,
    # HGX B200 data sheet: 36 PFLOPS with sparsity for 8 GPUs. https://www.nvidia.com/en-us/data-center/hgx/
    "B200": 2.25e15,
    # L40S data sheet: 362.05 TFLOPS dense. https://www.nvidia.com/en-us/data-center/l40s/
    "L40S": 362.05e12,
    # L4 data sheet: 242 TFLOPS with sparsity. https://www.nvidia.com/en-us/data-center/l4/
    "L4": 121e12,
}


def peak_flops(device: torch.device) -> float | None:
    """Peak FLOP/s of a device in the type that training computes in; None where it is not known, as for every CPU."""
    return peak_of(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def peak_of(name: str) -> float | None:
    """`peak_flops` by the name that CUDA gives; a slice of a GPU (MIG) has only part of its peak."""
    words = f" {name.replace('-', ' ')} "
    if " MIG " in words:
        return None
    return next((peak for part, peak in PEAK_BF16_FLOPS.items() if f" {part} " in words), None)
