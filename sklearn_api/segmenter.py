"""`SemiCRFSegmenter`: a semi-Markov CRF as a scikit-learn classifier of positions."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, _fit_context
from sklearn.utils import check_random_state
from sklearn.utils._param_validation import Interval, StrOptions
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from skorch.history import History
from torch import nn

from flash_semicrf.duration import DURATION_DISTRIBUTIONS
from flash_semicrf.nn import SemiMarkovCRFHead
from flash_semicrf.problem.segments import SegmentTable, limit_durations
from sklearn_api._inputs.annotations import as_labels
from sklearn_api._inputs.sequences import GoldSegments, LabelCodec, Sequences, check_X, check_y
from sklearn_api._lbfgs.fitting import check_solver, fit_lbfgs, offers_partial_fit
from sklearn_api._model.building import build_module, check_allowed, resolve_device
from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.precision import cast_features, warn_of_lost_spread
from sklearn_api._model.rng import PrivateRNG
from sklearn_api._model.single_positions import single_labels, split_singles
from sklearn_api._parameters import check_parameters
from sklearn_api._persistence import VersionedMixin, missing_attributes
from sklearn_api._posterior import PosteriorMixin
from sklearn_api._prediction import PredictionMixin
from sklearn_api._routed_params import RoutedParamsMixin
from sklearn_api._training.building import build_net
from sklearn_api._training.datasets import training_datasets
from sklearn_api._training.interrupts import interruptible
from sklearn_api._training.weights import with_class_weight
from sklearn_api.encoders import ENCODERS

__all__ = ["SemiCRFSegmenter"]


class SemiCRFSegmenter(
    PredictionMixin,
    PosteriorMixin,
    RoutedParamsMixin,
    VersionedMixin,
    ClassifierMixin,
    BaseEstimator,
):
    """Segment sequences with a semi-Markov CRF on top of a neural or linear encoder.

    The model scores whole segments: an encoder scores every label at every position, and the CRF
    adds the scores of durations and of transitions between labels. Training maximises the exact
    likelihood of the gold segmentations; prediction is the most probable segmentation.

    Parameters
    ----------
    encoder : {"linear", "mlp", "cnn", "gru"}, nn.Module class or instance, default="linear"
        Maps features to hidden states. "linear" uses the features as they are; the other names
        standardise them first by the statistics of the training positions. A class is called as
        ``encoder(n_features, **module__params)``; an instance is copied. See
        `sklearn_api.encoders`.
    hidden_size : int, default=64
        Width of the "mlp", "cnn" and "gru" encoders.
    num_layers : int, default=4
        Layers of the "mlp", "cnn" and "gru" encoders.
    kernel_size : int, default=5
        Odd width of the convolutions of the "cnn" encoder.
    dropout : float, default=0.0
        Dropout of the "mlp", "cnn" and "gru" encoders, in [0, 1).
    max_duration : int or "auto", default="auto"
        Longest duration of a segment, in positions; "auto" is the longest training segment. Where
        it is more than the longest sequence at hand, the rest costs next to nothing.
    long_segments : {"split", "error"}, default="split"
        What becomes of gold segments longer than `max_duration`, where there is no `duration_tail`:
        cut into near-equal pieces, with a warning, or refused.
    duration_distribution : str, DurationDistribution or callable, default="learned"
        Scores of the durations: a key of `flash_semicrf.duration.DURATION_DISTRIBUTIONS`.
    duration_init : {"empirical", "default"}, default="empirical"
        Start from values fitted to the durations of the training segments, or from the
        distribution's own defaults.
    duration_tail : None, "geometric" or float, default=None
        Let segments be longer than `max_duration`: every further position adds a log-rate to the
        score of the longest duration. "geometric" learns one for each label, and starts from the
        training segments if durations do; a number is a fixed rate.
    min_duration : int or dict, default=1
        Shortest duration of a segment, in positions, for all labels or by label.
    transition_constraints : None, "observed" or boolean array of shape (C, C), default=None
        Which labels may follow which: all, those that do in training, or where
        ``[source, destination]`` is True, in the order of ``classes_``.
    single_position_labels : None, label or list of labels, default=None
        Labels whose segments all have duration 1, such as "O" of words outside every chunk: their
        runs are read, and predicted, as one segment per position.
    tagging : None or "bio", default=None
        "bio": `y` holds BIO tags ("B-x", "I-x", "O"), and so does what `predict` returns. The
        classes are "O" and the x.
    boundary_scores : bool, default=False
        Also score, from the hidden states, where segments of each label start and end.
    alpha : float, default=1.0
        Strength of the penalty: ``alpha / 2 * ||w||**2`` is added to the summed negative
        log-likelihood. Weights and transitions are drawn towards 0, durations towards
        their initial values.
    l1_ratio : float, default=0.0
        Part of the penalty that is L1: ``alpha * ((1 - l1_ratio) / 2 * ||w||**2 + l1_ratio *
        ||w||_1)``. Above 0 it needs ``solver="lbfgs"``.
    class_weight : None, "balanced" or dict, default=None
        Weights of positions by their label, times `sample_weight`. As the weights of positions do,
        they act through their mean over a sequence, or crop: sequences with more of a heavy label
        count for more. They change nothing between labels within a sequence. "balanced" is
        ``n_positions / (n_classes * counts)``; labels that a dict leaves out have weight 1.
    solver : {"adam", "adamw", "sgd", "lbfgs"}, default="adam"
        Optimiser of the mini-batches; or L-BFGS on all sequences at once, for
        ``encoder="linear"``: deterministic, without a learning rate, to the minimum of what, with
        "learned" durations, is a convex loss. It runs on the CPU.
    max_iter : int, default=500
        Most iterations of ``solver="lbfgs"``.
    optimizer : torch.optim.Optimizer class, default=None
        Used in place of the optimiser that `solver` names.
    max_epochs : int, default=100
        Most passes over the training sequences.
    batch_size : int, default=16
        Sequences, or crops of them, in a mini-batch.
    crop_length : int, default=None
        Train on random crops of sequences longer than this, cut anew each epoch, with what a crop's
        ends leave unknown conditioned on. Should be a few times the longest segment.
    window_length : int, default=65536
        In prediction, positions that an encoder runs on at once; longer sequences pass it by
        windows that overlap by its receptive field. The CRF always sees the whole sequence.
    learning_rate : float, default=0.01
        Step size. The loss is per position, so it carries over between lengths.
    early_stopping : bool, default=False
        Hold out `validation_fraction` of the sequences, stop when the validation loss no longer
        improves, and keep the best epoch or iteration. Otherwise the training loss decides when
        to stop.
    validation_fraction : float, default=0.1
        Fraction of the sequences held out with ``early_stopping=True``.
    n_iter_no_change : int, default=10
        Epochs without improvement before training stops. L-BFGS stops when the loss has decreased
        by no more than `tol` over as many iterations.
    tol : float, default=1e-4
        Least decrease of the loss, in nats per position, that counts as an improvement.
    device : str, default="auto"
        "cpu", "cuda", "cuda:1", ...; "auto" is CUDA where available.
    dtype : {"float32", "float64"}, default="float32"
        Type of features and parameters. Inference accumulates in float64 either way on a CPU.
    random_state : int, RandomState instance or None, default=None
        Initial weights, batches, dropout and the validation split. An int makes two fits on the
        CPU bitwise equal.
    warm_start : bool, default=False
        Continue from the current parameters when `fit` is called again.
    verbose : int, default=0
        1 prints a line per epoch or iteration.
    callbacks : list of skorch callbacks, default=None
        Copied, then added to the net. One that ends training raises
        `sklearn_api.StopTraining`; a KeyboardInterrupt counts as Ctrl-C.
    **skorch_params
        ``module__*`` go to the encoder, ``optimizer__*``, ``iterator_train__*``,
        ``iterator_valid__*`` and ``callbacks__*`` to the skorch net.

    Attributes
    ----------
    classes_ : ndarray of shape (C,)
    n_features_in_ : int
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Only where X had column names.
    max_duration_ : int
    net_ : skorch.NeuralNet
    module_ : nn.Module
        ``encoder`` and CRF ``head``.
    history_ : skorch.history.History
        ``train_loss`` and ``valid_loss`` per epoch or iteration, in nats per position, with the
        penalty.
    n_iter_ : int
        Epochs or iterations run.
    interrupted_ : bool
        Whether Ctrl-C cut the last call of `fit` or `partial_fit` short.

    Notes
    -----
    X may be a list, or another ordered collection, of (T_i, D) arrays, frames, tensors or nested
    lists; a 3-D array; or a 2-D array, which is **one** sequence, or with `groups` one sequence per
    id. A 1-D signal ``x`` is the sequence ``x.reshape(-1, 1)``. Frames must agree in the names of
    their columns. y is nested in the same way: labels per position, all strings, whole numbers or
    bools, or a list of segments, which can also show two adjacent ones of one label: half-open
    ``(start, stop, label)`` tuples, lists or rows, or `Segment` objects as `predict_segments`
    returns them, with inclusive ends. ``encoder="linear"`` takes X of scipy's sparse formats, and
    never makes it dense. Outputs mirror X: rows for 2-D X, a 1-D object array otherwise.

    The encoders that standardise take the statistics of X, and its differences from the mean, in
    float64, whatever `dtype` is. The others see X as `dtype`: centre features with a large offset,
    such as times, first.

    Cross-validation that splits the rows of a 2-D X glues pieces of one sequence together and so
    changes the durations; pass a list of sequences (`sklearn_api.as_sequences`) to split by
    sequence.

    References
    ----------
    S. Sarawagi and W. W. Cohen, "Semi-Markov conditional random fields for information extraction",
    NeurIPS 17, 2004.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_api import SemiCRFSegmenter
    >>> y = [np.repeat(["rest", "wave", "rest"], [20, 10, n]) for n in (15, 25, 30)]
    >>> rng = np.random.default_rng(0)
    >>> X = [(labels == "wave")[:, None] + 0.3 * rng.normal(size=(len(labels), 1)) for labels in y]
    >>> segmenter = SemiCRFSegmenter(random_state=0).fit(X, y)
    >>> [(s.start, s.end, s.label) for s in segmenter.predict_segments(X)[0]]
    [(0, 19, 'rest'), (20, 29, 'wave'), (30, 44, 'rest')]
    """

    _parameter_constraints: dict = {
        "encoder": [StrOptions(set(ENCODERS)), nn.Module, callable],
        "hidden_size": [Interval(Integral, 1, None, closed="left")],
        "num_layers": [Interval(Integral, 1, None, closed="left")],
        "kernel_size": [Interval(Integral, 1, None, closed="left")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        "max_duration": [Interval(Integral, 1, None, closed="left"), StrOptions({"auto"})],
        "long_segments": [StrOptions({"split", "error"})],
        "duration_distribution": [
            StrOptions(set(DURATION_DISTRIBUTIONS) - {"callable"}),
            nn.Module,
            callable,
        ],
        "duration_init": [StrOptions({"empirical", "default"})],
        "duration_tail": [
            None,
            StrOptions({"geometric"}),
            Interval(Real, -np.inf, None, closed="left"),
        ],
        "min_duration": [Interval(Integral, 1, None, closed="left"), dict],
        "transition_constraints": [None, StrOptions({"observed"}), "array-like"],
        "boundary_scores": ["boolean"],
        "single_position_labels": "no_validation",
        "tagging": [None, StrOptions({"bio"})],
        "alpha": [Interval(Real, 0, None, closed="left")],
        "l1_ratio": [Interval(Real, 0, 1, closed="both")],
        "class_weight": [None, StrOptions({"balanced"}), dict],
        "solver": [StrOptions({"adam", "adamw", "sgd", "lbfgs"})],
        "max_iter": [Interval(Integral, 1, None, closed="left")],
        "optimizer": [None, callable],
        "max_epochs": [Interval(Integral, 1, None, closed="left")],
        "batch_size": [Interval(Integral, 1, None, closed="left")],
        "crop_length": [None, Interval(Integral, 1, None, closed="left")],
        "window_length": [Interval(Integral, 1, None, closed="left")],
        "learning_rate": [Interval(Real, 0, None, closed="neither")],
        "early_stopping": ["boolean"],
        "validation_fraction": [Interval(Real, 0, 1, closed="neither")],
        "n_iter_no_change": [Interval(Integral, 1, None, closed="left")],
        "tol": [Interval(Real, 0, None, closed="left")],
        "device": [str],
        "dtype": [StrOptions({"float32", "float64"})],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
        "callbacks": [None, list, tuple],
    }

    def __init__(
        self,
        encoder="linear",
        *,
        hidden_size=64,
        num_layers=4,
        kernel_size=5,
        dropout=0.0,
        max_duration="auto",
        long_segments="split",
        duration_distribution="learned",
        duration_init="empirical",
        duration_tail=None,
        min_duration=1,
        transition_constraints=None,
        boundary_scores=False,
        single_position_labels=None,
        tagging=None,
        alpha=1.0,
        l1_ratio=0.0,
        class_weight=None,
        solver="adam",
        max_iter=500,
        optimizer=None,
        max_epochs=100,
        batch_size=16,
        crop_length=None,
        window_length=65536,
        learning_rate=0.01,
        early_stopping=False,
        validation_fraction=0.1,
        n_iter_no_change=10,
        tol=1e-4,
        device="auto",
        dtype="float32",
        random_state=None,
        warm_start=False,
        verbose=0,
        callbacks=None,
        **skorch_params,
    ):
        self.encoder = encoder
        self.hidden_size = hidden_size
        self.num_layers = num_layers
        self.kernel_size = kernel_size
        self.dropout = dropout
        self.max_duration = max_duration
        self.long_segments = long_segments
        self.duration_distribution = duration_distribution
        self.duration_init = duration_init
        self.duration_tail = duration_tail
        self.min_duration = min_duration
        self.transition_constraints = transition_constraints
        self.boundary_scores = boundary_scores
        self.single_position_labels = single_position_labels
        self.tagging = tagging
        self.alpha = alpha
        self.l1_ratio = l1_ratio
        self.class_weight = class_weight
        self.solver = solver
        self.max_iter = max_iter
        self.optimizer = optimizer
        self.max_epochs = max_epochs
        self.batch_size = batch_size
        self.crop_length = crop_length
        self.window_length = window_length
        self.learning_rate = learning_rate
        self.early_stopping = early_stopping
        self.validation_fraction = validation_fraction
        self.n_iter_no_change = n_iter_no_change
        self.tol = tol
        self.device = device
        self.dtype = dtype
        self.random_state = random_state
        self.warm_start = warm_start
        self.verbose = verbose
        self.callbacks = callbacks
        for name, value in skorch_params.items():
            setattr(self, name, value)

    # Training -------------------------------------------------------------------------------------

    @_fit_context(prefer_skip_nested_validation=True)
    def fit(
        self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None
    ) -> SemiCRFSegmenter:
        """Fit the model.

        Parameters
        ----------
        X, y : sequences and their labels or segments
            See Notes of the class.
        groups : array-like of shape (n_rows,), optional
            For 2-D X: one sequence per id; the rows of an id are contiguous.
        sample_weight : array-like, optional
            One weight per sequence, or one array of weights of positions per sequence; for 2-D X
            one per row. Weights of positions act through their mean over the sequence or crop.

        Returns
        -------
        self

        Warns
        -----
        ConvergenceWarning
            On Ctrl-C, which ends training and keeps the model so far; inside a search or another
            loop of scikit-learn or joblib the KeyboardInterrupt is raised again.
        """
        start_anew = not (self.warm_start and hasattr(self, "net_"))
        sequences, table = self._prepare(X, y, groups, start_anew)
        sample_weight = self._weights(sample_weight, sequences, table)
        if start_anew:
            self._build(sequences, table)
        else:
            self._rebuild_net()
        check_allowed(self.module_, table, self.classes_)
        if self.solver == "lbfgs":
            with interruptible(self, keep=True):
                fit_lbfgs(self, sequences, table, start_anew, sample_weight)
            return self
        hold_out = self.early_stopping
        dataset, valid = training_datasets(self, sequences, table, sample_weight, hold_out)
        with interruptible(self, keep=True):
            self.net_.run(dataset, valid, epochs=self.max_epochs, seed=self._seed + self.n_iter_)
            if valid is None:
                self.net_.check_result(dataset)
        return self

    @available_if(offers_partial_fit)
    @_fit_context(prefer_skip_nested_validation=True)
    def partial_fit(
        self,
        X: Any,
        y: Any,
        classes: Any = None,
        groups: Any = None,
        sample_weight: Any = None,
    ) -> SemiCRFSegmenter:
        """Run one epoch over the given sequences, from the current parameters.

        Ctrl-C raises KeyboardInterrupt, so that it ends the caller's loop, too; the model keeps
        what it has learnt so far.

        Parameters
        ----------
        X, y, groups, sample_weight
            As for `fit`. The first call fixes the classes, the values of "auto" and "observed", and
            where the durations start.
        classes : array-like of shape (C,), optional
            All labels that will ever come, for the first call; by default those of `y`. A later
            call may repeat them.

        Returns
        -------
        self
        """
        if self.class_weight == "balanced":
            raise ValueError(
                '`class_weight`="balanced" needs all training positions at once, and `partial_fit` '
                "sees a part of them; pass a dict."
            )
        first = not hasattr(self, "net_")
        sequences, table = self._prepare(X, y, groups, first, classes)
        sample_weight = self._weights(sample_weight, sequences, table)
        if first:
            self._build(sequences, table)
        check_allowed(self.module_, table, self.classes_)
        dataset, _ = training_datasets(self, sequences, table, sample_weight)
        with interruptible(self, keep=False):
            self.net_.run(dataset, epochs=1, seed=self._seed + self.n_iter_)
        return self

    def _prepare(
        self, X: Any, y: Any, groups: Any, start_anew: bool, classes: Any = None
    ) -> tuple[Sequences, SegmentTable]:
        """Checked training data; sets what is learnt from the data alone when starting anew."""
        self._check_extra_params()
        check_parameters(self)
        check_solver(self)
        sequences = check_X(
            self,
            X,
            groups,
            dtype=None,
            reset=start_anew,
            accept_sparse=self._takes_sparse,
        )
        if not self._standardizes:
            warn_of_lost_spread(sequences, self.dtype)
            sequences = cast_features(sequences, self.dtype)
        gold = check_y(y, sequences.layout, self.tagging)
        if classes is not None:
            if isinstance(classes, str) or not isinstance(classes, Iterable):
                raise TypeError(f"`classes` must be an array or list of labels; got {classes!r}.")
            classes = np.unique(as_labels(list(classes), "classes", "index {}".format))
        if start_anew:
            self.classes_ = np.unique(gold.labels) if classes is None else classes
            singles = np.isin(self.classes_, single_labels(self))
            self._single_classes = np.flatnonzero(singles)
            single = np.isin(gold.labels, self.classes_[singles])
            duration = np.where(single, 1, gold.stop - gold.start)
            longest = int(duration.max())
            self.max_duration_ = longest if self.max_duration == "auto" else int(self.max_duration)
            self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        elif classes is not None and classes.tolist() != self.classes_.tolist():
            raise ValueError(
                "`classes` must be those of the first call of `partial_fit`, "
                f"{self.classes_.tolist()}; got {classes.tolist()}."
            )
        return sequences, self._encode(gold)

    def _encode(self, gold: GoldSegments) -> SegmentTable:
        """Gold segments with class indices; without a tail, of at most ``max_duration_``."""
        table = split_singles(LabelCodec(self.classes_).encode(gold), self._single_classes)
        if self.duration_tail is not None:
            return table
        return limit_durations(table, self.max_duration_, self.long_segments)

    def _weights(self, sample_weight: Any, sequences: Sequences, table: SegmentTable) -> Any:
        """Sample weights with those of the classes in them."""
        layout = sequences.layout
        return with_class_weight(sample_weight, self.class_weight, self.classes_, table, layout)

    def _build(self, sequences: Sequences, table: SegmentTable) -> None:
        rng = PrivateRNG(self._seed, resolve_device(self.device))
        module = build_module(self, sequences, table, self.max_duration_, rng)
        self.net_ = build_net(self, module, rng)

    def _rebuild_net(self) -> None:
        """New optimiser and callbacks, as the parameters say now, around the fitted module."""
        history = self.net_.history
        rng = PrivateRNG(self._seed + len(history), resolve_device(self.device))
        self.net_ = build_net(self, self.module_, rng)
        self.net_.history = history

    def _missing_attributes(self) -> list[str]:
        if not hasattr(self, "net_"):
            return []
        fitted = ("classes_", "max_duration_", "n_features_in_", "_seed", "_single_classes")
        with PrivateRNG(0, torch.device("cpu")).use():
            head = SemiMarkovCRFHead(1, 1, 1)
        missing = missing_attributes(self.module_.head, head)
        return [*(n for n in fitted if not hasattr(self, n)), *(f"head.{n}" for n in missing)]

    def __sklearn_tags__(self):
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self._takes_sparse
        return tags

    @property
    def module_(self) -> SegmentationModule:
        """The fitted encoder and CRF head."""
        check_is_fitted(self, "net_")
        return self.net_.module_

    @property
    def history_(self) -> History:
        """Losses per epoch."""
        check_is_fitted(self, "net_")
        return self.net_.history

    @property
    def n_iter_(self) -> int:
        """Number of epochs run."""
        return len(self.history_)
