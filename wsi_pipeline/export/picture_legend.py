"""What is drawn in a picture, and the legend that says what it means.

Sizes are px of a small picture; `unit` scales them to a larger one.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from wsi_pipeline.report.slide_pictures import OPACITY, SHADES

WHITE, BLACK, YELLOW = (255, 255, 255), (0, 0, 0), (255, 255, 0)
FONT_PX = 15
BAR_PX = (200, 14)
"""Width and height of the colour bar."""
GAP_PX = 12
RADIUS_PX = 7
"""Of the circle of a detection."""


def font(unit: float):
    """Letters in proportion to the picture."""
    return ImageFont.load_default(FONT_PX * unit)


def draw_outlines(draw, lines: Sequence[Sequence[float]], unit: float) -> None:
    """Draw yellow lines with black edges; a line is x, y, x, y, ... in Pillow's coordinates."""
    for colour, width in ((BLACK, 4), (YELLOW, 2)):
        for line in lines:
            draw.line(line, fill=colour, width=round(width * unit), joint="curve")


def draw_circle(draw, x: float, y: float, unit: float) -> None:
    """Draw a white circle with black edges around a place in Pillow's coordinates."""
    for colour, width, radius in ((BLACK, 4, RADIUS_PX + 1), (WHITE, 2, RADIUS_PX)):
        reach = radius * unit
        box = [x - reach, y - reach, x + reach, y + reach]
        draw.ellipse(box, outline=colour, width=round(width * unit))


def with_legend(
    picture: Image.Image, title: str, thresholds: Sequence[float], detections: int, unit: float
) -> Image.Image:
    """A picture with its legend below, both as wide as the wider of the two.

    Parameters
    ----------
    picture : Image
    title : str
    thresholds : sequence of float
        Of the outlined regions; may be empty.
    detections : int
        Number of circles.
    unit : float
        Scale of letters and symbols, 1 or more.
    """
    items = [_text(title, unit), _colour_bar(unit), _text("no colour: no prediction", unit)]
    if thresholds:
        stated = " and ".join(f"{threshold:g}" for threshold in thresholds)
        items.append(_symbol("line", f"probability >= {stated}", unit))
    if detections:
        counted = f"{detections} detection{'s' * (detections > 1)}"
        items.append(_symbol("circle", counted, unit))
    gap = round(GAP_PX * unit)
    width = max(picture.width, *(item.width + 2 * gap for item in items))
    places, bottom = _flow(items, width, gap)
    canvas = Image.new("RGB", (width, picture.height + bottom), WHITE)
    canvas.paste(picture, (0, 0))
    for item, (x, y) in zip(items, places, strict=True):
        canvas.paste(item, (x, picture.height + y))
    return canvas


def _flow(items: Sequence[Image.Image], width: int, gap: int) -> tuple[list[tuple[int, int]], int]:
    """Corners of items in lines as words in a text, the first in a line of its own; the height."""
    places, x, y, line = [], gap, gap, 0
    for number, item in enumerate(items):
        if x > gap and (number == 1 or x + item.width + gap > width):
            x, y, line = gap, y + line + gap, 0
        places.append((x, y))
        x, line = x + item.width + 2 * gap, max(line, item.height)
    return places, y + line + gap


def _text(text: str, unit: float, left: float = 0) -> Image.Image:
    """Text on white, behind room for a symbol."""
    letters = font(unit)
    width = left + letters.getlength(text)
    image = Image.new("RGB", (int(np.ceil(width)) + 1, round(FONT_PX * 1.4 * unit)), WHITE)
    ImageDraw.Draw(image).text((left, 0), text, fill=BLACK, font=letters)
    return image


def _symbol(kind: str, text: str, unit: float) -> Image.Image:
    """A line or a circle as it looks in the picture, and its meaning."""
    image = _text(text, unit, left=34 * unit)
    draw, middle = ImageDraw.Draw(image), image.height / 2
    if kind == "line":
        draw_outlines(draw, [[0, middle, 26 * unit, middle]], unit)
    else:
        draw_circle(draw, 13 * unit, middle, unit)
    return image


def _colour_bar(unit: float) -> Image.Image:
    """The colours as they look on white, from 0 to 1."""
    label, letters = "probability of tumour", font(unit)
    width, height = (round(side * unit) for side in BAR_PX)
    left, line = round(6 * unit), round(FONT_PX * 1.3 * unit)
    room = left + width + round(GAP_PX * unit)
    image = Image.new("RGB", (room + round(letters.getlength(label)) + 1, height + line), WHITE)
    shades = SHADES[np.arange(width) * 256 // width]
    shades = np.round((1 - OPACITY) * 255 + OPACITY * shades).astype(np.uint8)
    image.paste(Image.fromarray(np.repeat(shades[np.newaxis], height, axis=0)), (left, 0))
    draw = ImageDraw.Draw(image)
    for stated in (0, 0.5, 1):
        place = left + stated * width, height
        draw.text(place, f"{stated:g}", fill=BLACK, font=letters, anchor="ma")
    draw.text((room, 0), label, fill=BLACK, font=letters)
    return image
