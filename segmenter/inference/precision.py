"""The type that a network computes in: what the `dtype` argument of everything that makes labels means."""

import contextlib

import torch

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def compute_dtype(model: torch.nn.Module, dtype: str | torch.dtype | None) -> contextlib.AbstractContextManager:
    """Autocast for the `dtype` argument of `segment_image`; nothing where the model already has that type.

    Raises:
        ValueError: an unknown name, or another type than that of a model that is not float32.
    """
    parameter = next(model.parameters())
    dtype = resolve_dtype(dtype, parameter.device, parameter.dtype)
    if dtype == parameter.dtype:
        return contextlib.nullcontext()
    if parameter.dtype != torch.float32:
        raise ValueError(
            f"the model holds {parameter.dtype} weights and cannot run in {dtype}; call model.float() first"
        )
    return torch.autocast(parameter.device.type, dtype=dtype)


def resolve_dtype(dtype: str | torch.dtype | None, device: torch.device, default: torch.dtype) -> torch.dtype:
    """The compute type that a `dtype` argument means on `device`.

    Raises:
        ValueError: an unknown name.
    """
    if dtype is None:
        return default
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":  # a model that was converted stays what it is
        return (_fastest_dtype(device) if default == torch.float32 else None) or default
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is unknown; choose one of auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]


def cpu_has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 (AVX512-BF16 or AMX)."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")  # private, so absence counts as no
    return any(getattr(torch.cpu, name, lambda: False)() for name in checks)


def _fastest_dtype(device: torch.device) -> torch.dtype | None:
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and cpu_has_bfloat16() else None
