/*
 * QuPath: show a heatmap (OME-TIFF of `wsi export`) over the open slide.
 *
 * Open the slide, open this file in Automate > Script editor, click Run, choose SLIDE.ome.tif.
 * View > Show pixel classification (C) hides and shows the heatmap, the opacity slider fades it.
 * To remove it: getCurrentViewer().resetCustomPixelLayerOverlay()
 *
 * For QuPath 0.4 and later with its Bio-Formats extension, which QuPath brings along.
 */
import groovy.transform.CompileStatic
import java.awt.image.BufferedImage
import java.nio.ByteBuffer
import java.nio.ByteOrder
import javafx.application.Platform
import loci.formats.MetadataTools
import loci.formats.in.OMETiffReader
import ome.units.UNITS
import qupath.lib.gui.viewer.overlays.BufferedImageOverlay
import qupath.lib.regions.ImageRegion
import static qupath.lib.gui.scripting.QPEx.*

MAX_PIXELS = 16_000_000L  // of the shown image: a larger heatmap is shown from a coarser level
OPACITY = 0.6
// Blue (0) to red (1): the colours of the pipeline's reports.
COLOURS = [
    0x313695, 0x4575b4, 0x74add1, 0xabd9e9, 0xe0f3f8, 0xffffbf,
    0xfee090, 0xfdae61, 0xf46d43, 0xd73027, 0xa50026,
]

/** Read an image no larger than MAX_PIXELS, and its place: micrometres of the slide's frame. */
def readHeatmap(File file) {
    def reader = new OMETiffReader()
    reader.flattenedResolutions = false
    reader.metadataStore = MetadataTools.createOMEXMLMetadata()
    try {
        reader.id = file.path
        def store = reader.metadataStore
        def found = [
            name  : store.getImageName(0),
            step  : store.getPixelsPhysicalSizeX(0)?.value(UNITS.MICROMETER)?.doubleValue(),
            x     : store.getPlanePositionX(0, 0)?.value(UNITS.MICROMETER)?.doubleValue(),
            y     : store.getPlanePositionY(0, 0)?.value(UNITS.MICROMETER)?.doubleValue(),
        ]
        if (found.step == null || found.x == null || found.y == null)
            throw new IllegalArgumentException("${file} does not state its place. Choose an OME-TIFF of wsi export.")
        def level = 0
        while (level < reader.resolutionCount - 1 && (long) reader.sizeX * reader.sizeY > MAX_PIXELS)
            reader.resolution = ++level
        found.reduction = 1 << level  // heatmap pixels to a pixel of this level
        found.width = reader.sizeX
        found.height = reader.sizeY
        found.values = new float[found.width * found.height]
        def order = reader.littleEndian ? ByteOrder.LITTLE_ENDIAN : ByteOrder.BIG_ENDIAN
        ByteBuffer.wrap(reader.openBytes(0)).order(order).asFloatBuffer().get(found.values)
        return found
    } finally {
        reader.close()
    }
}

/** Colours for all probabilities, the last for 1: opaque red, green, blue. */
int[] colourTable() {
    (0..255).collect { i ->
        double place = i / 255.0d * (COLOURS.size() - 1)
        int first = Math.min((int) place, COLOURS.size() - 2)
        [16, 8, 0].inject(0) { rgb, shift ->
            int a = (COLOURS[first] >> shift) & 0xff, b = (COLOURS[first + 1] >> shift) & 0xff
            rgb | (((int) Math.round(a + (place - first) * (b - a))) << shift)
        }
    } as int[]
}

/** A translucent image; transparent where nothing was predicted (NaN). */
@CompileStatic
BufferedImage paint(float[] values, int width, int height, int[] table, int alpha) {
    int[] argb = new int[values.length]
    for (int i = 0; i < values.length; i++)
        if (!Float.isNaN(values[i]))
            argb[i] = (alpha << 24) | table[Math.max(0, Math.min(255, (int) (values[i] * 256)))]
    def image = new BufferedImage(width, height, BufferedImage.TYPE_INT_ARGB)
    image.setRGB(0, 0, width, height, argb, 0, width)
    return image
}

/** Corner of the part of the slide that QuPath shows, in pixels of the slide's whole frame. */
def shownCorner(server) {
    def kind = server.class.simpleName
    if (kind.contains('Rotated'))
        throw new IllegalArgumentException('QuPath shows the slide rotated. Import it without rotation.')
    if (kind != 'OpenslideImageServer') {
        println "QuPath reads this slide by ${kind}, not by OpenSlide. Check the place of the heatmap."
        return [0, 0]
    }
    def stated = server.dumpMetadata()  // JSON of OpenSlide's properties
    def bounds = ['x', 'y', 'width', 'height'].collect {
        def found = stated =~ /"openslide\.bounds-${it}":\s*"(\d+)"/
        found ? found[0][1] as int : null
    }
    // QuPath crops a slide to its bounds, unless a person told it not to.
    return bounds.every { it != null } && bounds[2..3] == [server.width, server.height] ? bounds[0..1] : [0, 0]
}

/** Where the heatmap lies in the open slide: x, y, width, height in pixels. */
def placeInSlide(heatmap, server) {
    double mpp = server.pixelCalibration.averagedPixelSizeMicrons
    if (!(mpp > 0))
        throw new IllegalArgumentException('QuPath knows no pixel size of the slide. Set it in the Image tab.')
    def corner = shownCorner(server)
    double step = heatmap.step / mpp
    // The position names the first pixel's centre; the slide's first pixel has its centre at 0.
    double x = heatmap.x / mpp + 0.5d - step / 2 - corner[0]
    double y = heatmap.y / mpp + 0.5d - step / 2 - corner[1]
    return [x, y, step * heatmap.reduction * heatmap.width, step * heatmap.reduction * heatmap.height]
}

def server = getCurrentServer()
def viewer = getCurrentViewer()
if (server == null || viewer == null) {
    println 'Open the slide first.'
    return
}
def file = promptForFile()
if (file == null)
    return
def heatmap = readHeatmap(file)
def (double x, double y, double width, double height) = placeInSlide(heatmap, server)
def ends = [x, y, x + width, y + height].collect { Math.round(it) as int }
def region = ImageRegion.createInstance(ends[0], ends[1], ends[2] - ends[0], ends[3] - ends[1], 0, 0)
def image = paint(heatmap.values, heatmap.width, heatmap.height, colourTable(), Math.round(OPACITY * 255) as int)
def overlay = new BufferedImageOverlay(viewer, viewer.overlayOptions, [(region): image])
overlay.setLocationStringFunction { imageData, px, py, z, t ->
    int column = Math.floor((px - x) / width * heatmap.width) as int
    int row = Math.floor((py - y) / height * heatmap.height) as int
    if (column < 0 || row < 0 || column >= heatmap.width || row >= heatmap.height)
        return null
    float value = heatmap.values[row * heatmap.width + column]
    return Float.isNaN(value) ? null : String.format('Probability of tumour: %.3f', value)
}
Platform.runLater { viewer.setCustomPixelLayerOverlay(overlay) }
println "Heatmap of ${heatmap.name} over ${getCurrentImageName()}. Check that both are the same slide."
double margin = 2 * width / heatmap.width
if (x < -margin || y < -margin || x + width > server.width + margin || y + height > server.height + margin)
    println 'Warning: the heatmap reaches beyond the slide. Check that it is of this slide, and the pixel size in the Image tab.'
