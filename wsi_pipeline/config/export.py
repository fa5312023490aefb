"""Settings of exports."""

from pydantic import Field

from wsi_pipeline.config.section import Fraction, Section


class ExportConfig(Section):
    """Exports of heatmaps, regions and detections for other people's viewers."""

    thresholds: tuple[Fraction, ...] | None = Field(
        None,
        min_length=1,
        description="regions are outlined where the probability is >= each of these; null: the"
        " model's patch threshold",
    )
    min_tile_probability: Fraction = Field(
        0.0, description="geojson: heatmap pixels with a lower probability are left out"
    )
    picture_mpp: float | None = Field(
        None,
        gt=0,
        description="png: resolution of the picture, um per px; null: about 2000 px on the longer"
        " side, not finer than the slide",
    )
