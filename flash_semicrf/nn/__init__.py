"""CRF heads: modules from encoder outputs to likelihoods, segmentations and marginals."""

from flash_semicrf.nn.head import SemiMarkovCRFHead
from flash_semicrf.nn.uncertainty import UncertaintySemiMarkovCRFHead

__all__ = ["SemiMarkovCRFHead", "UncertaintySemiMarkovCRFHead"]
