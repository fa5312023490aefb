"""Settings: one frozen section for each stage.

Every field carries its own description, from which `wsi init` writes the commented YAML: there
is no second place where a setting is explained.
"""

from pathlib import Path

from pydantic import Field, model_validator

from wsi_pipeline.config.catalog import AnnotationConfig, CatalogConfig
from wsi_pipeline.config.evaluate import DetectionConfig, EvaluateConfig, ExplainConfig, MineConfig
from wsi_pipeline.config.export import ExportConfig
from wsi_pipeline.config.heatmap import FineConfig, HeatmapConfig
from wsi_pipeline.config.section import Section
from wsi_pipeline.config.tile import TileConfig, TissueConfig
from wsi_pipeline.config.train import AugmentConfig, PatchNetConfig, TrainConfig

__all__ = [
    "AnnotationConfig",
    "AugmentConfig",
    "CatalogConfig",
    "Config",
    "DetectionConfig",
    "EvaluateConfig",
    "ExplainConfig",
    "ExportConfig",
    "FineConfig",
    "HeatmapConfig",
    "JobsConfig",
    "MineConfig",
    "PatchNetConfig",
    "Section",
    "TileConfig",
    "TissueConfig",
    "TrainConfig",
]


class JobsConfig(Section):
    """Dask."""

    scheduler: str | None = Field(
        None, description="tcp://host:port of a running scheduler; null: a LocalCluster"
    )
    workers: int | None = Field(None, gt=0, description="local processes; null: one for each core")
    retries: int = Field(2, ge=0, description="new tries of a unit that kills its worker")
    window: int = Field(4, gt=0, description="units in flight, for each worker thread")


class Config(Section):
    """A run: where it goes, its seed, and a section for each stage."""

    out: Path = Field(description="the run directory; made when missing")
    seed: int = Field(0, ge=0, description="everything random derives from it")
    catalog: CatalogConfig
    tile: TileConfig = TileConfig()
    train: TrainConfig = TrainConfig()
    heatmap: HeatmapConfig = HeatmapConfig()
    fine: FineConfig = FineConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mine: MineConfig = MineConfig()
    explain: ExplainConfig = ExplainConfig()
    export: ExportConfig = ExportConfig()
    jobs: JobsConfig = JobsConfig()

    @model_validator(mode="after")
    def _patches_within_patches(self):
        inner = self.train.patchnet.patch_px
        if self.train.model == "patchnet" and inner > self.tile.patch_px:
            raise ValueError(
                f"train.patchnet.patch_px is {inner} and tile.patch_px {self.tile.patch_px}:"
                " PatchNet's patches must fit into a patch"
            )
        return self
