"""Plots of segmented sequences and of models; they need matplotlib."""

from sklearn_api.display._boundaries import BoundaryDisplay
from sklearn_api.display._durations import DurationDisplay
from sklearn_api.display._segmentation import SegmentationDisplay

__all__ = ["BoundaryDisplay", "DurationDisplay", "SegmentationDisplay"]
