"""CUDA devices: what is there, and what is missing. CuPy is imported only here."""

from __future__ import annotations


def device_names() -> list[str]:
    """CUDA devices that this version can run: none yet, so a host with a GPU serves its CPU."""
    return []


def require_cuda(name: str) -> str:
    """The sentence that tells why CUDA device `name` cannot be opened here, and what to do."""
    try:
        import cupy
    except ImportError:
        return (f"{name}: CuPy is not installed; expected the CUDA runtime and `pip install 'ggmq[cuda]'`. "
                "Without a GPU use --device CPU")  # fmt: skip
    try:
        count = int(cupy.cuda.runtime.getDeviceCount())
    except cupy.cuda.runtime.CUDARuntimeError as e:
        return f"{name}: the CUDA driver does not answer ({e}); expected an NVIDIA driver and a GPU. Use --device CPU"
    if int(name[4:]) >= count:
        return f"{name}: this host shows {count} CUDA device(s); see CUDA_VISIBLE_DEVICES. Use --device CPU"
    return f"{name}: this version of ggmq has no CUDA kernels; use --device CPU"
