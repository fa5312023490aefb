import pytest
import torch

from wsi_pipeline.models.precision import computing_in, native_precision


@pytest.fixture
def capabilities(monkeypatch):
    """Those of a CPU, to be filled in."""
    found = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    return found


def test_a_cpu_without_bfloat16_instructions_is_fastest_in_float32(capabilities):
    capabilities.update(avx2=True, avx512_f=True)
    assert native_precision("cpu") == "float32"


@pytest.mark.parametrize("instructions", ["avx512_bf16", "amx_bf16"])
def test_a_cpu_with_bfloat16_instructions_is_fastest_in_bfloat16(capabilities, instructions):
    capabilities[instructions] = True
    assert native_precision(torch.device("cpu")) == "bfloat16"


@pytest.mark.parametrize(
    ("limit", "expected"),
    [("AVX2", "float32"), ("avx512_core", "float32"), ("AVX512_CORE_AMX", "bfloat16"),
     ("ALL", "bfloat16")],
)  # fmt: skip
def test_a_limit_on_onednn_counts(capabilities, monkeypatch, limit, expected):
    capabilities["amx_bf16"] = True
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", limit)
    assert native_precision("cpu") == expected


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_layers_compute_in_the_precision_and_their_weights_stay_float32(precision):
    layer = torch.nn.Conv2d(3, 2, 3)
    with computing_in(precision, "cpu"):
        found = layer(torch.ones(1, 3, 5, 5))
    assert found.dtype == getattr(torch, precision)
    assert layer.weight.dtype == torch.float32
    assert layer(torch.ones(1, 3, 5, 5)).dtype == torch.float32  # afterwards


def test_float32_on_a_gpu_is_not_tf32():
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "tf32"
    try:
        with computing_in("float32", "cuda"):
            assert convolutions.fp32_precision == "ieee"
    finally:
        convolutions.fp32_precision = before
