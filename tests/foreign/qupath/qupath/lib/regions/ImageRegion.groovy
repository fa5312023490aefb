package qupath.lib.regions

/** Stands for QuPath's class, whose places are whole pixels. */
class ImageRegion {
    int x, y, width, height

    static ImageRegion createInstance(final int x, final int y, final int width, final int height, final int z, final int t) {
        new ImageRegion(x: x, y: y, width: width, height: height)
    }
}
