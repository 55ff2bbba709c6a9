"""What inference is about: scores, segmentations, and what is known of them, checked."""
