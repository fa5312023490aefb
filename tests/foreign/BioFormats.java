import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.util.Locale;
import loci.common.DebugTools;
import loci.common.services.ServiceFactory;
import loci.formats.ImageReader;
import loci.formats.meta.IMetadata;
import loci.formats.services.OMEXMLService;
import ome.xml.model.primitives.Color;

/** Prints, as a line of JSON for each file, what Bio-Formats reads of an OME-TIFF. */
public class BioFormats {
  public static void main(String[] paths) throws Exception {
    DebugTools.setRootLevel("ERROR");
    OMEXMLService service = new ServiceFactory().getInstance(OMEXMLService.class);
    for (String path : paths) {
      ImageReader reader = new ImageReader();
      reader.setFlattenedResolutions(false);
      IMetadata metadata = service.createOMEXMLMetadata();
      reader.setMetadataStore(metadata);
      reader.setId(path);
      boolean valid = service.validateOMEXML(service.getOMEXML(metadata));
      StringBuilder levels = new StringBuilder();
      for (int level = 0; level < reader.getResolutionCount(); level++) {
        reader.setResolution(level);
        ByteOrder order =
            reader.isLittleEndian() ? ByteOrder.LITTLE_ENDIAN : ByteOrder.BIG_ENDIAN;
        ByteBuffer pixels = ByteBuffer.wrap(reader.openBytes(0)).order(order);
        StringBuilder values = new StringBuilder();
        for (int i = 0; i < reader.getSizeX() * reader.getSizeY(); i++) {
          float value = pixels.getFloat();
          values.append(i > 0 ? "," : "").append(Float.isNaN(value) ? "null" : "" + value);
        }
        levels.append(level > 0 ? "," : "").append(String.format(
            Locale.ROOT, "{\"width\":%d,\"height\":%d,\"values\":[%s]}",
            reader.getSizeX(), reader.getSizeY(), values));
      }
      System.out.printf(Locale.ROOT,
          "{\"format\":\"%s\",\"series\":%d,\"valid\":%b,\"type\":%d,\"name\":\"%s\","
              + "\"channel\":\"%s\",\"colour\":\"%s\",\"spacing_um\":[%s,%s],\"position_um\":[%s,%s],\"levels\":[%s]}%n",
          reader.getFormat(), reader.getSeriesCount(), valid, reader.getPixelType(),
          metadata.getImageName(0), metadata.getChannelName(0, 0), colour(metadata),
          metadata.getPixelsPhysicalSizeX(0).value(ome.units.UNITS.MICROMETER),
          metadata.getPixelsPhysicalSizeY(0).value(ome.units.UNITS.MICROMETER),
          metadata.getPlanePositionX(0, 0).value(ome.units.UNITS.MICROMETER),
          metadata.getPlanePositionY(0, 0).value(ome.units.UNITS.MICROMETER), levels);
      reader.close();
    }
  }

  private static String colour(IMetadata metadata) {
    Color colour = metadata.getChannelColor(0, 0);
    return colour.getRed() + "," + colour.getGreen() + "," + colour.getBlue() + ","
        + colour.getAlpha();
  }
}
