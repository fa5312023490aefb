"""Settings of the tissue mask and the patch grid."""

from pydantic import Field, model_validator

from wsi_pipeline.config.section import (
    Fraction,
    Section,
)
from wsi_pipeline.errors import ConfigError
from wsi_pipeline.geometry import Bounds, PatchGrid


class TissueConfig(Section):
    """Tissue mask: what is more coloured than the slide's own glass, then morphology."""

    mpp: float = Field(8.0, gt=0, description="resolution of the mask, um per px")
    min_chroma: Fraction = Field(
        0.045,
        description="tissue passes the colours of light at least this differently, as a share of"
        " the light through the glass; lower finds paler tissue, and dirtier glass",
    )
    drop_ink: bool = Field(
        True,
        description="leave out blue and green ink; false for blue or green stains, such as Masson's"
        " trichrome or Alcian blue",
    )
    closing_um: float = Field(24.0, ge=0, description="radius of the morphological closing")
    min_area_um2: float = Field(10_000.0, ge=0, description="smaller pieces are dropped")
    max_hole_um2: float = Field(40_000.0, ge=0, description="smaller holes are filled")


class TileConfig(Section):
    """The patch grid and the inner-square label."""

    level: int | None = Field(0, ge=0, description="working resolution: a pyramid level, or null")
    mpp: float | None = Field(None, gt=0, description="... or um per px (then level: null)")
    patch_px: int = Field(512, ge=32, description="side of a patch, working px")
    stride_px: int = Field(256, gt=0, description="step between patches, working px")
    inner_px: int = Field(256, gt=0, description="side of the centred square that gives the label")
    gaps: bool = Field(
        False,
        description="whether stride_px may be larger than inner_px: what lies between the inner"
        " squares then gives no patch its label, and lesions there are lost",
    )
    min_tissue: Fraction = Field(
        0.05, description="a patch is indexed if more than this share of its inner square is tissue"
    )
    tissue: TissueConfig = TissueConfig()

    @model_validator(mode="after")
    def _consistent(self):
        if (self.level is None) == (self.mpp is None):
            raise ValueError("give either level or mpp and set the other to null")
        if self.stride_px > self.inner_px and not self.gaps:
            raise ValueError(
                f"stride_px is {self.stride_px} and inner_px {self.inner_px}: annotated pixels"
                " between the inner squares would give no label. Set stride_px to inner_px or less,"
                " or gaps to true"
            )
        try:
            PatchGrid(Bounds(0, 0, 1, 1), 1.0, 1.0, self.patch_px, self.stride_px, self.inner_px)
        except ConfigError as error:
            raise ValueError(str(error)) from None
        return self
