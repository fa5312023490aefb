"""Settings of heatmaps and fine heatmaps."""

from typing import Literal

from pydantic import Field

from wsi_pipeline.config.section import (
    KEEPS_RESULT,
    MODEL_NAME,
    NULL_PRECISION,
    Fraction,
    Precision,
    Section,
    SplitName,
)


class HeatmapConfig(Section):
    """The model over every indexed patch."""

    splits: tuple[SplitName, ...] = Field(
        ("validation", "test"),
        description="splits whose slides are predicted",
        json_schema_extra=KEEPS_RESULT,
    )
    batch_size: int | None = Field(
        None,
        gt=0,
        description="patches a forward pass; null: 32 on a GPU; 4 on a CPU, where more are no"
        " faster and take 150 MB each at 512 px; more where patches are smaller",
        json_schema_extra=KEEPS_RESULT,
    )
    precision: Precision | None = Field(
        None,
        description="float32, or bfloat16: faster where the processor supports it, less exact;"
        " null: bfloat16 if all workers support it, else float32" + NULL_PRECISION,
    )
    chunk: int = Field(
        16,
        gt=0,
        description="side of a chunk, heatmap px: the slab that a task reads at once; with 32 fewer"
        " tiles lie on edges and are decoded twice, and a killed task loses four times the work",
    )
    ngff: Literal["0.5", "0.4"] = Field(
        "0.5", description="OME-Zarr version; 0.4 for programs that do not read Zarr 3"
    )


class FineConfig(Section):
    """PatchNet's fine heatmap, of the slides, precision and OME-Zarr version that heatmap has."""

    stride_px: int = Field(8, gt=0, description="step between heatmap pixels, working px")
    coarse: str | None = Field(
        None,
        pattern=MODEL_NAME,
        description="model whose heatmap says where to look, vgg16 say; null: at every indexed"
        " patch",
    )
    min_probability: Fraction = Field(
        0.5, description="a pixel of the coarse heatmap is suspicious from here on"
    )
    chunk: int = Field(
        128, gt=0, description="side of a chunk, heatmap px: the slab that a task reads at once"
    )
