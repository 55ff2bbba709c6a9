"""Run by .ci/run in an empty venv outside the tree: the installed wheel imports and fits."""

import sys
from importlib.metadata import version
from pathlib import Path

import flash_semicrf
import sklearn_api
from sklearn_api.datasets import load_ecg

for package in (flash_semicrf, sklearn_api):
    location = Path(package.__file__).resolve()
    if Path(sys.prefix).resolve() not in location.parents:
        sys.exit(f"{package.__name__} was imported from {location}, not from the installed wheel")
if flash_semicrf.__version__ != version("flash-semicrf-sklearn"):
    sys.exit("flash_semicrf.__version__ differs from the version of the wheel")

X, y = load_ecg(return_X_y=True)
X, y = X[:4], y[:4]
model = sklearn_api.SemiCRFSegmenter("linear", max_epochs=1, random_state=0).fit(X, y)
if [len(labels) for labels in model.predict(X)] != [len(sequence) for sequence in X]:
    sys.exit("predict does not return one label for each position")
print(f"installed wheel: accuracy on {len(X)} ECGs after one epoch {model.score(X, y):.2f}")
