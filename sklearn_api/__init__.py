"""scikit-learn estimators, metrics, displays and data sets for segmentation."""
