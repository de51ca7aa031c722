"""Pixels to anomaly maps: images, views, memory banks, regions."""
