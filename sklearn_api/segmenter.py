"""`SemiCRFSegmenter`: a semi-Markov CRF as a scikit-learn classifier of positions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.metrics import accuracy_score
from sklearn.utils import Tags, check_random_state
from sklearn.utils.metaestimators import available_if
from sklearn.utils.validation import check_is_fitted
from skorch.callbacks import Callback
from skorch.history import History
from torch import nn

from flash_semicrf.duration import DURATION_DISTRIBUTIONS
from flash_semicrf.nn.objectives import LOSSES, Loss
from flash_semicrf.problem.potentials import Potentials
from flash_semicrf.problem.segments import (
    LongSegments,
    Segment,
    Segments,
    SegmentTable,
    limit_durations,
)
from flash_semicrf.problem.validation import check_choice, check_positive_int
from flash_semicrf.streaming.compilation import told
from sklearn_api._inputs.labels import read_classes
from sklearn_api._inputs.sequences import Sequences, check_X
from sklearn_api._inputs.targets import GoldSegments, check_y, encode_labels
from sklearn_api._lbfgs import fitting as lbfgs
from sklearn_api._model.building import Durations, build_head, check_allowed, resolve_device
from sklearn_api._model.module import SegmentationModule
from sklearn_api._model.precision import cast_features, warn_of_lost_spread
from sklearn_api._model.rng import PrivateRNG
from sklearn_api._model.single_positions import single_classes, split_singles
from sklearn_api._parameters import (
    check_parameters,
    check_routed,
    check_solver,
    encoder_params,
    is_routed,
    net_params,
)
from sklearn_api._persistence import (
    defaults_of,
    missing_from_head,
    split_version,
    warn_of_version,
    with_version,
)
from sklearn_api._posterior import (
    best_segmentations,
    entropies,
    log_likelihoods,
    sampled_segmentations,
)
from sklearn_api._prediction import (
    DECODINGS,
    Decoding,
    accurate_labels,
    best_segments,
    boundary_probabilities,
    decoded_segments,
    label_probabilities,
    name_segments,
    problems_of,
    tags_of,
)
from sklearn_api._sklearn import Interval, StrOptions, fit_context
from sklearn_api._training import building as training
from sklearn_api._training.convergence import warn_unconverged
from sklearn_api._training.interrupts import in_a_loop, warn_of_interrupt
from sklearn_api._training.objective import Objective
from sklearn_api._training.splitting import training_datasets
from sklearn_api._training.weights import check_sample_weight, training_weights
from sklearn_api.encoders import ENCODERS, Standardize, make_encoder

__all__ = ["SemiCRFSegmenter"]


def _has_mini_batches(segmenter: SemiCRFSegmenter) -> bool:
    """True for solvers of mini-batches; for the other, raise AttributeError with what to do."""
    if segmenter.solver == "lbfgs":
        raise AttributeError(
            '`partial_fit` needs a solver of mini-batches; solver="lbfgs" minimises over all '
            "sequences that it is given. To go on from the last solution, set `warm_start=True` "
            "and call `fit`."
        )
    return True


class SemiCRFSegmenter(ClassifierMixin, BaseEstimator):
    """Segment sequences with a semi-Markov CRF on top of a neural or linear encoder.

    The model scores whole segments: an encoder scores every label at every position, and the CRF
    adds the scores of durations and of transitions between labels. Training maximises the exact
    likelihood of the gold segmentations; prediction is the most probable segmentation.

    Parameters come in five groups, in this order:

    - model: `encoder` to `dropout`;
    - durations of segments: `max_duration` to `min_duration`;
    - labels: `transition_constraints` to `tagging`;
    - training: `loss` to `tol`; of these, `window_length` is about prediction;
    - device, and how a fit runs on it: `device` to `callbacks`.

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
    boundary_scores : bool, default=False
        Also score, from the hidden states, where segments of each label start and end.
    single_position_labels : None, label or list of labels, default=None
        Labels whose segments all have duration 1, such as "O" of words outside every chunk: their
        runs are read, and predicted, as one segment per position.
    tagging : None or "bio", default=None
        "bio": `y` holds BIO tags ("B-x", "I-x", "O"), and so does what `predict` returns. The
        classes are "O" and the x.
    loss : str, default="likelihood"
        What training minimises: "likelihood", minus the log-probability of whole segmentations;
        "marginal", of the label of every position, each with its own weight; "boundary", of what
        starts, or that nothing does, at every position; "softmax_margin", the likelihood among
        segmentations preferred by their errors; "focal", the marginal loss with less regard for
        positions that are right. All but "likelihood" need a solver of mini-batches.
    margin_cost : float, default=1.0
        Cost of a wrong position, in nats, in ``loss="softmax_margin"``.
    focus : float, default=2.0
        Power of the probability of an error that multiplies the loss of a position in
        ``loss="focal"``.
    alpha : float, default=1.0
        Strength of the penalty: ``alpha / 2 * ||w||**2`` is added to the summed negative
        log-likelihood. Weights and transitions are drawn towards 0, durations towards
        their initial values.
    l1_ratio : float, default=0.0
        Part of the penalty that is L1: ``alpha * ((1 - l1_ratio) / 2 * ||w||**2 + l1_ratio *
        ||w||_1)``. Above 0 it needs ``solver="lbfgs"``.
    class_weight : None, "balanced" or dict, default=None
        Weights of positions by their label, times `sample_weight`. ``loss="likelihood"`` is of
        whole sequences, so weights act through their mean over a sequence, or crop: those with more
        of a heavy label count for more, and nothing changes between labels within one. In the other
        losses each position has its own. "balanced" is
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
        Least decrease of the loss that counts as an improvement: in nats per position; with
        ``solver="lbfgs"`` as a part of the loss, which may be small.
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
        1 prints a line per epoch or iteration, and one before when kernels have to be compiled.
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

    _parameter_constraints: dict[str, list[Any] | str] = {
        # Model
        "encoder": [StrOptions(set(ENCODERS)), nn.Module, callable],
        "hidden_size": [Interval(Integral, 1, None, closed="left")],
        "num_layers": [Interval(Integral, 1, None, closed="left")],
        "kernel_size": [Interval(Integral, 1, None, closed="left")],
        "dropout": [Interval(Real, 0, 1, closed="left")],
        # Durations
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
        # Labels
        "transition_constraints": [None, StrOptions({"observed"}), "array-like"],
        "boundary_scores": ["boolean"],
        "single_position_labels": "no_validation",
        "tagging": [None, StrOptions({"bio"})],
        # Training
        "loss": [StrOptions(set(LOSSES))],
        "margin_cost": [Interval(Real, 0, None, closed="left")],
        "focus": [Interval(Real, 0, None, closed="left")],
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
        # Device
        "device": [str],
        "dtype": [StrOptions({"float32", "float64"})],
        "random_state": ["random_state"],
        "warm_start": ["boolean"],
        "verbose": ["verbose"],
        "callbacks": [None, list, tuple],
    }

    def __init__(
        self,
        encoder: str | type[nn.Module] | nn.Module = "linear",
        *,
        hidden_size: int = 64,
        num_layers: int = 4,
        kernel_size: int = 5,
        dropout: float = 0.0,
        # Durations
        max_duration: int | str = "auto",
        long_segments: LongSegments = "split",
        duration_distribution: str | nn.Module | Callable[..., Any] = "learned",
        duration_init: str = "empirical",
        duration_tail: str | float | None = None,
        min_duration: int | dict[Any, int] = 1,
        # Labels
        transition_constraints: Any = None,
        boundary_scores: bool = False,
        single_position_labels: Any = None,
        tagging: str | None = None,
        # Training
        loss: Loss = "likelihood",
        margin_cost: float = 1.0,
        focus: float = 2.0,
        alpha: float = 1.0,
        l1_ratio: float = 0.0,
        class_weight: str | dict[Any, float] | None = None,
        solver: str = "adam",
        max_iter: int = 500,
        optimizer: Callable[..., torch.optim.Optimizer] | None = None,
        max_epochs: int = 100,
        batch_size: int = 16,
        crop_length: int | None = None,
        window_length: int = 65536,
        learning_rate: float = 0.01,
        early_stopping: bool = False,
        validation_fraction: float = 0.1,
        n_iter_no_change: int = 10,
        tol: float = 1e-4,
        # Device
        device: str = "auto",
        dtype: str = "float32",
        random_state: int | np.random.RandomState | None = None,
        warm_start: bool = False,
        verbose: int = 0,
        callbacks: Sequence[Callback | type[Callback] | tuple[str, Any]] | None = None,
        **skorch_params: Any,
    ) -> None:
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
        self.loss = loss
        self.margin_cost = margin_cost
        self.focus = focus
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

    # Parameters -----------------------------------------------------------------------------------

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Parameters of the constructor, with those routed to skorch.

        Parameters
        ----------
        deep : bool, default=True
            Also those of parameters that are estimators.

        Returns
        -------
        dict of str to value
        """
        return {**super().get_params(deep=deep), **self._extra_params()}

    def set_params(self, **params: Any) -> SemiCRFSegmenter:
        """Set parameters of the constructor and those routed to skorch.

        Parameters
        ----------
        **params
            Values by name.

        Returns
        -------
        self
        """
        for name in [name for name in params if is_routed(name)]:
            setattr(self, name, params.pop(name))
        super().set_params(**params)
        return self

    # Training -------------------------------------------------------------------------------------

    @fit_context(prefer_skip_nested_validation=True)
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
            Where `max_epochs` or `max_iter` ends training while the loss still decreases. On
            Ctrl-C, which ends training and keeps the model so far; inside a search or another loop
            of scikit-learn or joblib the KeyboardInterrupt is raised again.
        """
        start_anew = not (self.warm_start and hasattr(self, "net_"))
        sequences, table = self._prepare(X, y, groups, start_anew)
        weights = self._weights(sample_weight, sequences, table)
        if start_anew:
            self._build(sequences, table)
        else:
            self._rebuild_net()
        check_allowed(self.module_, table, self.classes_)
        self.interrupted_ = False
        try:
            with told(print if self.verbose else None):
                if self.solver == "lbfgs":
                    self._run_lbfgs(sequences, table, weights, start_anew)
                else:
                    self._run_epochs(sequences, table, weights)
        except KeyboardInterrupt:
            self.interrupted_ = True
            if in_a_loop():
                raise
            unit = "iteration" if self.solver == "lbfgs" else "epoch"
            warn_of_interrupt(f"{unit} {self.n_iter_}", best=self.early_stopping)
        return self

    @available_if(_has_mini_batches)  # type: ignore[untyped-decorator]  # scikit-learn's
    @fit_context(prefer_skip_nested_validation=True)
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
        weights = self._weights(sample_weight, sequences, table)
        if first:
            self._build(sequences, table)
        check_allowed(self.module_, table, self.classes_)
        dataset, _ = training_datasets(
            sequences, table, weights, self.module_.encoder, crop_length=self.crop_length
        )
        self.interrupted_ = False
        try:
            with told(print if self.verbose else None):
                self.net_.run(dataset, epochs=1, seed=self._seed + self.n_iter_)
        except KeyboardInterrupt:
            self.interrupted_ = True
            raise
        return self

    # Prediction -----------------------------------------------------------------------------------

    def predict(self, X: Any, groups: Any = None) -> np.ndarray:
        """Most probable label of each position: the labels with the highest expected `score`.

        These are the labels of largest `predict_proba`; where minimum durations or transition
        constraints are set, those of the largest sum among the labellings that obey them. They can
        differ from the most probable segmentation, `predict_segments`, in positions that are
        uncertain. With ``tagging="bio"`` the tags are those of `predict_segments`, as labels chosen
        one by one need not be the tags of any segmentation.

        Parameters
        ----------
        X : sequences
            See Notes of the class.
        groups : array-like of shape (n_rows,), optional
            For 2-D X.

        Returns
        -------
        ndarray of shape (T,), or object array of such for many sequences
        """
        sequences = self._check_input(X, groups)
        return sequences.layout.restore(self._position_labels(sequences))

    def predict_proba(self, X: Any, groups: Any = None) -> np.ndarray:
        """Posterior probability of each label at each position, given the whole sequence.

        Parameters
        ----------
        X, groups
            As for `predict`.

        Returns
        -------
        ndarray of shape (T, C), or object array of such for many sequences
            Columns in the order of ``classes_``; rows sum to 1.
        """
        sequences = self._check_input(X, groups)
        return sequences.layout.restore(label_probabilities(self._problems(sequences)))

    def predict_segments(
        self, X: Any, groups: Any = None, *, decoding: Decoding = "map", tolerance: int = 0
    ) -> list[Segment] | list[list[Segment]]:
        """Segments of the most probable segmentation, or of the one that is expected to be best.

        Parameters
        ----------
        X, groups
            As for `predict`.
        decoding : {"map", "position", "boundary", "segment"}, default="map"
            "map": the most probable segmentation. It misses short segments whose ends are diffuse,
            since each placement of them is improbable. Of those that the model allows, "position":
            the one with most expected positions that have the right label, as `predict`;
            "boundary": with the largest F1 of expected starts; "segment": with the largest expected
            overlap with true segments (`flash_semicrf.consensus`).
        tolerance : int, default=0
            Positions by which a start may be off, with ``decoding="boundary"``.

        Returns
        -------
        list of Segment, or list of such lists with `groups` or many sequences
            Ends are inclusive, labels are those of ``classes_``, as Python objects. The `score` of
            a segment is its part of the score with "map", its expected number of right positions
            with "position", and the probability that its start, or the segment, is right.
        """
        check_choice("decoding", decoding, DECODINGS)
        sequences, names = self._check_input(X, groups), self.classes_.tolist()
        found = decoded_segments(self._problems(sequences), decoding, tolerance)
        return sequences.layout.restore_lists([name_segments(one, names) for one in found])

    def predict_boundary_proba(self, X: Any, groups: Any = None) -> np.ndarray:
        """Posterior probability that a segment starts at each position.

        Parameters
        ----------
        X, groups
            As for `predict`.

        Returns
        -------
        ndarray of shape (T,), or object array of such for many sequences
            1 at the first position of a sequence.
        """
        sequences = self._check_input(X, groups)
        return sequences.layout.restore(boundary_probabilities(self._problems(sequences)))

    def predict_topk(
        self, X: Any, k: int, groups: Any = None
    ) -> list[list[Segment]] | list[list[list[Segment]]]:
        """Segments of the k most probable segmentations, the most probable one first.

        Parameters
        ----------
        X, groups
            As for `predict`.
        k : int
            How many of each sequence.

        Returns
        -------
        list of lists of Segment, or list of such with `groups` or many sequences
            By rank, as `predict_segments` returns the first; fewer than `k` where a sequence has no
            more. The scores of a segmentation's segments sum to its score, and `log_likelihood` of
            it is its log-probability.

        Raises
        ------
        ValueError
            Unless ``k >= 1``.
        """
        k = check_positive_int("k", k)
        sequences = self._check_input(X, groups)
        return self._named(sequences, best_segmentations(self._problems(sequences), k))

    def sample(
        self, X: Any, n_samples: int = 1, random_state: Any = None, groups: Any = None
    ) -> list[list[Segment]] | list[list[list[Segment]]]:
        """Draw segmentations from the distribution given X.

        Parameters
        ----------
        X, groups
            As for `predict`.
        n_samples : int, default=1
            How many of each sequence.
        random_state : int, RandomState instance or None, default=None
            An int gives the same samples for the same X.

        Returns
        -------
        list of lists of Segment, or list of such with `groups` or many sequences
            By sample, each as `predict_segments` returns one.

        Raises
        ------
        ValueError
            Unless ``n_samples >= 1``.
        """
        n_samples = check_positive_int("n_samples", n_samples)
        rng = check_random_state(random_state)
        sequences = self._check_input(X, groups)
        found = sampled_segmentations(self._problems(sequences), n_samples, rng)
        return self._named(sequences, found)

    def entropy(self, X: Any, groups: Any = None) -> np.ndarray | float:
        """Entropy of the distribution over segmentations: how unsure the model is of a sequence.

        Parameters
        ----------
        X, groups
            As for `predict`.

        Returns
        -------
        float for one sequence, ndarray of shape (n_sequences,) otherwise
            In nats, exact: the expectation of minus the log-probability. 0 where one segmentation
            is certain; it grows with the length.
        """
        sequences = self._check_input(X, groups)
        return sequences.layout.restore_numbers(entropies(self._problems(sequences)))

    def log_likelihood(self, X: Any, y: Any, groups: Any = None) -> np.ndarray | float:
        """Log-probability of the given segmentations, in nats.

        Parameters
        ----------
        X, groups
            As for `predict`.
        y : labels or segments, nested as X

        Returns
        -------
        float for one sequence, ndarray of shape (n_sequences,) otherwise
        """
        sequences = self._check_input(X, groups)
        table = self._encode(check_y(y, sequences.layout, self.tagging))
        found = log_likelihoods(self._problems(sequences), table, len(sequences.values))
        return sequences.layout.restore_numbers(found)

    def score(self, X: Any, y: Any, groups: Any = None, sample_weight: Any = None) -> float:
        """Fraction of all positions whose label, or BIO tag, is predicted right.

        Parameters
        ----------
        X, groups
            As for `predict`.
        y : labels or segments, nested as X
        sample_weight : array-like, optional
            As for `fit`; weights of positions count one by one.

        Returns
        -------
        float
        """
        sequences = self._check_input(X, groups)
        gold = check_y(y, sequences.layout, self.tagging)
        labels = gold.position_labels if self.tagging is None else gold.bio_tags
        weights = check_sample_weight(sample_weight, sequences.layout)
        accuracy: float = accuracy_score(
            labels,
            np.concatenate(self._position_labels(sequences)),
            sample_weight=None if weights is None else np.concatenate(weights),
        )
        return accuracy

    # Fitted attributes ----------------------------------------------------------------------------

    @property
    def module_(self) -> SegmentationModule:
        """The fitted encoder and CRF head."""
        check_is_fitted(self, "net_")
        module: SegmentationModule = self.net_.module_
        return module

    @property
    def history_(self) -> History:
        """Losses per epoch."""
        check_is_fitted(self, "net_")
        return self.net_.history

    @property
    def n_iter_(self) -> int:
        """Number of epochs run."""
        return len(self.history_)

    # Protocols of scikit-learn and pickle ---------------------------------------------------------

    def __sklearn_tags__(self) -> Tags:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = self._takes_sparse
        return tags

    def __getstate__(self) -> dict[str, Any]:
        return with_version(super().__getstate__())

    def __setstate__(self, state: dict[str, Any]) -> None:
        state, saved_with = split_version(state)
        # Parameters that are younger than the state get their defaults.
        defaults = defaults_of(type(self).__init__)
        younger = {name: value for name, value in defaults.items() if name not in state}
        super().__setstate__(state | younger)
        missing = list(younger)
        if hasattr(self, "net_"):
            fitted = ("classes_", "max_duration_", "n_features_in_", "_seed", "_single_classes")
            missing += [name for name in fitted if not hasattr(self, name)]
            missing += [f"head.{name}" for name in missing_from_head(self.module_.head)]
        warn_of_version(type(self).__name__, saved_with, missing)

    # Steps of the above ---------------------------------------------------------------------------

    def _extra_params(self) -> dict[str, Any]:
        """Parameters that the constructor took beyond those it names."""
        named = self._get_param_names()
        return {
            name: value
            for name, value in vars(self).items()
            if name not in named and not name.startswith("_") and not name.endswith("_")
        }

    @property
    def _takes_sparse(self) -> bool:
        return isinstance(self.encoder, str) and self.encoder == "linear"

    @property
    def _standardizes(self) -> bool:
        """Whether features stay in float64 until the module has centred and scaled them."""
        named = isinstance(self.encoder, str) and self.encoder != "linear"
        # By name, as a model of a GPU also predicts where there is none. "mps" has no float64.
        return named and not str(self.device).startswith("mps")

    @property
    def _held_out(self) -> float | None:
        """Fraction of the sequences that `fit` holds out, or None."""
        return self.validation_fraction if self.early_stopping else None

    def _prepare(
        self, X: Any, y: Any, groups: Any, start_anew: bool, classes: Any = None
    ) -> tuple[Sequences, SegmentTable]:
        """Checked training data; sets what is learnt from the data alone when starting anew."""
        params = self.get_params(deep=False)
        # Not in the constructor, which by scikit-learn's rules only stores.
        check_routed(self._extra_params(), type(self).__name__)
        check_parameters(params, self._parameter_constraints)
        check_solver(params)
        sequences = check_X(
            self, X, groups, dtype=None, reset=start_anew, accept_sparse=self._takes_sparse
        )
        if not self._standardizes:
            warn_of_lost_spread(sequences, self.dtype)
            sequences = cast_features(sequences, self.dtype)
        gold = check_y(y, sequences.layout, self.tagging)
        classes = None if classes is None else read_classes(classes)
        if start_anew:
            self.classes_ = np.unique(gold.labels) if classes is None else classes
            self._single_classes = single_classes(self.single_position_labels, self.classes_)
            self._seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        elif classes is not None and classes.tolist() != self.classes_.tolist():
            raise ValueError(
                "`classes` must be those of the first call of `partial_fit`, "
                f"{self.classes_.tolist()}; got {classes.tolist()}."
            )
        table = split_singles(encode_labels(gold, self.classes_), self._single_classes)
        if start_anew:
            longest = int((table.stop - table.start).max())
            self.max_duration_ = longest if self.max_duration == "auto" else int(self.max_duration)
        return sequences, self._limit(table)

    def _encode(self, gold: GoldSegments) -> SegmentTable:
        """Gold segments with class indices; without a tail, of at most ``max_duration_``."""
        return self._limit(split_singles(encode_labels(gold, self.classes_), self._single_classes))

    def _limit(self, table: SegmentTable) -> SegmentTable:
        if self.duration_tail is not None:
            return table
        return limit_durations(table, self.max_duration_, self.long_segments)

    def _weights(
        self, sample_weight: Any, sequences: Sequences, table: SegmentTable
    ) -> list[np.ndarray] | None:
        """Weights of the positions of each sequence, with those of their classes."""
        layout = sequences.layout
        return training_weights(
            sample_weight, self.class_weight, self.classes_, table, layout, self.dtype
        )

    def _build(self, sequences: Sequences, table: SegmentTable) -> None:
        """Set ``net_``, around a new module."""
        rng = PrivateRNG(self._seed, resolve_device(self.device))
        with rng.use():
            encoder, hidden_size = make_encoder(
                self.encoder,
                self.n_features_in_,
                {
                    "hidden_size": self.hidden_size,
                    "num_layers": self.num_layers,
                    "kernel_size": self.kernel_size,
                    "dropout": self.dropout,
                },
                encoder_params(self._extra_params()),
            )
            head = build_head(
                table,
                self.classes_,
                self.max_duration_,
                hidden_size,
                Durations(
                    self.duration_distribution,
                    self.duration_init,
                    self.duration_tail,
                    self.min_duration,
                ),
                transition_constraints=self.transition_constraints,
                boundary_scores=self.boundary_scores,
                single_classes=self._single_classes,
            )
        named = isinstance(self.encoder, str) and self.encoder != "linear"
        standardize = Standardize.from_positions(sequences.values) if named else None
        module = SegmentationModule(encoder, head, standardize).to(getattr(torch, self.dtype))
        self._set_net(module, rng)

    def _rebuild_net(self) -> None:
        """Set ``net_`` around the fitted module, as the parameters are now."""
        history = self.net_.history
        rng = PrivateRNG(self._seed + len(history), resolve_device(self.device))
        self._set_net(self.module_, rng)
        self.net_.history = history

    def _set_net(self, module: SegmentationModule, rng: PrivateRNG) -> None:
        # An encoder of the user's may draw random numbers in training; ours do for dropout only.
        stochastic = not isinstance(self.encoder, str) or self.dropout > 0
        self.net_ = training.build_net(
            module,
            training.Options(
                solver=self.solver,
                optimizer=self.optimizer,
                learning_rate=self.learning_rate,
                batch_size=self.batch_size,
                alpha=self.alpha,
                objective=Objective(self.loss, self.margin_cost, self.focus),
                tol=self.tol,
                n_iter_no_change=self.n_iter_no_change,
                early_stopping=self.early_stopping,
                verbose=self.verbose,
            ),
            callbacks=self.callbacks or [],
            device=resolve_device(self.device),
            rng=rng if stochastic else None,
            routed=net_params(self._extra_params()),
        )

    def _run_epochs(
        self, sequences: Sequences, table: SegmentTable, weights: list[np.ndarray] | None
    ) -> None:
        """Train ``net_`` on mini-batches."""
        train, valid = training_datasets(
            sequences,
            table,
            weights,
            self.module_.encoder,
            crop_length=self.crop_length,
            validation_fraction=self._held_out,
            seed=self._seed,
        )
        before = self.n_iter_
        self.net_.run(train, valid, epochs=self.max_epochs, seed=self._seed + before)
        if valid is None:
            self.net_.check_result(train)
        epochs = self.n_iter_ - before
        warn_unconverged(self.net_, epochs, self.max_epochs, self.learning_rate)

    def _run_lbfgs(
        self,
        sequences: Sequences,
        table: SegmentTable,
        weights: list[np.ndarray] | None,
        start_anew: bool,
    ) -> None:
        """Train ``module_`` on all sequences at once."""
        if start_anew:
            lbfgs.zero_weights(self.module_.head)
        options = lbfgs.Options(
            alpha=self.alpha,
            l1_ratio=self.l1_ratio,
            tol=self.tol,
            n_iter_no_change=self.n_iter_no_change,
            max_iter=self.max_iter,
            dtype=self.dtype,
            verbose=self.verbose,
        )
        lbfgs.fit_lbfgs(
            self.module_,
            self.history_,
            sequences,
            table,
            weights,
            options,
            validation_fraction=self._held_out,
            seed=self._seed,
            device=torch.device(self.net_.device),
        )

    def _check_input(self, X: Any, groups: Any) -> Sequences:
        """Checked X of a fitted model."""
        check_is_fitted(self, "net_")
        sequences = check_X(self, X, groups, dtype=None, accept_sparse=self._takes_sparse)
        return sequences if self._standardizes else cast_features(sequences, self.dtype)

    def _problems(self, sequences: Sequences) -> Iterator[tuple[np.ndarray, Potentials]]:
        """Batches: indices of the sequences, and their problem, not centred."""
        device = torch.device(self.net_.device)
        return problems_of(self.module_, sequences, self.window_length, device)

    def _position_labels(self, sequences: Sequences) -> list[np.ndarray]:
        """Labels, or BIO tags, of each sequence."""
        problems = self._problems(sequences)
        if self.tagging == "bio":
            rows = zip(best_segments(problems), sequences.lengths, strict=True)
            return [tags_of(segments, int(n), self.classes_) for segments, n in rows]
        return [self.classes_[index] for index in accurate_labels(problems, self.module_.head)]

    def _named(
        self, sequences: Sequences, found: list[list[Segments]]
    ) -> list[list[Segment]] | list[list[list[Segment]]]:
        """Several segmentations of each sequence, with labels, nested as the caller's X was."""
        names = self.classes_.tolist()
        named = [[name_segments(segments, names) for segments in one] for one in found]
        return sequences.layout.restore_lists(named)
