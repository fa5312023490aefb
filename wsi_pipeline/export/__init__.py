"""Heatmaps, regions and detections in the formats of other people's software."""
