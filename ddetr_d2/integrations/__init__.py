"""Detectors for other libraries, which are imported by these modules alone."""
