"""The floating-point type that a model computes in: float32, or bfloat16 where layers allow it."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

Precision = Literal["float32", "bfloat16"]
"""float32 is IEEE's, on GPUs too (no TF32). bfloat16 is torch's autocast: convolutions compute in
it, weights, sums of many values and probabilities stay float32."""

WITHOUT_BFLOAT16 = (
    "SSE41", "AVX", "AVX2", "AVX2_VNNI", "AVX2_VNNI_2", "AVX512_CORE", "AVX512_CORE_VNNI",
)  # fmt: skip
"""Values of ``ONEDNN_MAX_CPU_ISA`` that keep oneDNN from a CPU's bfloat16 instructions."""


def native_precision(device: torch.device | str) -> Precision:
    """The precision that a device computes fastest in.

    bfloat16 where the device has instructions for it: GPUs from Ampere on, CPUs with AVX512-BF16 or
    AMX (two cores with AMX: 3.8 times the patches a second, VGG16, 512 px). Other devices emulate
    it: they compute about the same numbers, several times slower than in float32.

    Parameters
    ----------
    device : torch.device or str

    Returns
    -------
    {"bfloat16", "float32"}
    """
    if torch.device(device).type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif os.environ.get("ONEDNN_MAX_CPU_ISA", "").upper() in WITHOUT_BFLOAT16:
        native = False
    else:
        found = torch.cpu.get_capabilities()
        native = found.get("avx512_bf16") or found.get("amx_bf16")
    return "bfloat16" if native else "float32"


@contextmanager
def computing_in(precision: Precision, device: torch.device | str) -> Iterator[None]:
    """Run torch's operations in a precision.

    Gradients may be taken outside: torch computes them in the type of the forward pass.

    Parameters
    ----------
    precision : {"float32", "bfloat16"}
    device : torch.device or str
    """
    kind = torch.device(device).type
    if kind == "cuda":  # torch's default is TF32: 10 bits of mantissa, on some GPUs only
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]  # no stub
    with torch.autocast(kind, torch.bfloat16, enabled=precision == "bfloat16"):
        yield
