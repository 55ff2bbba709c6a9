"""Scores of the linear model for sparse features."""

from __future__ import annotations

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from flash_semicrf.nn import SemiMarkovCRFHead
from sklearn_api._lbfgs.features import stack_rows
from sklearn_api._model.sparse import linear_layers
from sklearn_api._training.data import pad_values

__all__ = ["sparse_scores"]


def sparse_scores(
    head: SemiMarkovCRFHead, values: list[sp.csr_matrix]
) -> tuple[list[Tensor], Tensor]:
    """Apply a head's projections to sparse features.

    Parameters
    ----------
    head : SemiMarkovCRFHead
    values : list of CSR matrices of shape (T_i, D)

    Returns
    -------
    scores : list of Tensor of shape (B, T, C)
        Scores of labels, and with boundary scores those of starts and ends; zero-padded, on the
        head's device.
    lengths : int64 Tensor of shape (B,)
    """
    rows = stack_rows(values)
    layers = linear_layers(head)
    # Only the weights of columns that occur: a sentence has few of many thousands.
    occurring, index = np.unique(rows.indices, return_inverse=True)
    rows = sp.csr_array((rows.data, index, rows.indptr), shape=(rows.shape[0], len(occurring)))
    columns = torch.from_numpy(occurring.astype(np.int64))
    outputs = []
    for layer in layers:
        weight = layer.weight.detach().cpu()[:, columns].T.contiguous().numpy()
        bias = 0.0 if layer.bias is None else layer.bias.detach().cpu().numpy()
        outputs.append(rows @ weight + bias)
    stops = np.cumsum([value.shape[0] for value in values])
    x, lengths = pad_values(np.split(np.concatenate(outputs, axis=1), stops[:-1]))
    parts = x.to(head.transition.device).split(head.num_classes, dim=-1)
    return [part.contiguous() for part in parts], lengths
