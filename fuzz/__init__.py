"""Fuzz targets of the wire format: ``make fuzz``."""
