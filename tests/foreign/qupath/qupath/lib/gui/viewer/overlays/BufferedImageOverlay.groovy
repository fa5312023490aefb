package qupath.lib.gui.viewer.overlays

import java.awt.image.BufferedImage
import qupath.lib.regions.ImageRegion

/** Stands for QuPath's class. */
class BufferedImageOverlay {
    interface LocationStringFunction {
        String getLocationString(imageData, double x, double y, int z, int t)
    }

    Map<ImageRegion, BufferedImage> regions
    LocationStringFunction location

    BufferedImageOverlay(viewer, options, Map<ImageRegion, BufferedImage> regions) { this.regions = regions }

    void setLocationStringFunction(LocationStringFunction location) { this.location = location }
}
