"""Pictures of segmented sequences; they need matplotlib."""

from sklearn_api.display._segmentation import SegmentationDisplay

__all__ = ["SegmentationDisplay"]
