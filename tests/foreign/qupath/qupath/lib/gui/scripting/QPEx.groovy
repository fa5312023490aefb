package qupath.lib.gui.scripting

import groovy.json.JsonOutput
import groovy.json.JsonSlurper
import javax.imageio.ImageIO

/** Stands for QuPath with an open slide, which the property `slide` describes as JSON. */
class QPEx {
    static final SLIDE = new JsonSlurper().parseText(System.getProperty('slide'))

    static File promptForFile(String... extensions) { new File(System.getProperty('file')) }

    static String getCurrentImageName() { 'open slide' }

    static getCurrentServer() {
        SLIDE.kind == 'RotatedImageServer' ? new RotatedImageServer() : new OpenslideImageServer()
    }

    static getCurrentViewer() { new Viewer() }
}

class OpenslideImageServer {
    int width = QPEx.SLIDE.width
    int height = QPEx.SLIDE.height
    def pixelCalibration = [averagedPixelSizeMicrons: QPEx.SLIDE.mpp as double]

    String dumpMetadata() { JsonOutput.prettyPrint(JsonOutput.toJson(QPEx.SLIDE.stated)) }
}

class RotatedImageServer extends OpenslideImageServer {}

class Viewer {
    def overlayOptions = null

    /** Say what would be shown: the place, the text at the place `at`, and the picture as a file. */
    void setCustomPixelLayerOverlay(overlay) {
        def (region, image) = overlay.regions.entrySet().first().with { [it.key, it.value] }
        ImageIO.write(image, 'png', new File(System.getProperty('picture')))
        println JsonOutput.toJson([
            x: region.x, y: region.y, width: region.width, height: region.height,
            text: overlay.location.getLocationString(null, *QPEx.SLIDE.at.collect { it as double }, 0, 0),
        ])
    }
}
