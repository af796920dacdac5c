"""Clusters of features, which stand in for classes where nobody has labelled the images."""

from __future__ import annotations

import warnings

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["cluster_features", "of_first_process"]

_TOLERANCE = 1e-5  # of k-means, as released for AIR


def cluster_features(features: Tensor, clusters: int, *, seed: int, starts: int = 10) -> Tensor:
    """Number of the k-means cluster of every row.

    Args:
        features (`torch.Tensor` of shape `(N, D)`): of N images; distances are Euclidean.
        clusters (`int`): at least 2, at most N.
        seed (`int`): of the initial centres.
        starts (`int`, defaults to 10): initial sets of centres, of which the best result counts.

    Returns:
        `torch.Tensor` of shape `(N,)`: int64, in [0, clusters).

    Raises:
        ValueError: if the features have fewer different clusters.

    Source: released AIR, `LP-AFF.py`: scikit-learn's k-means with tolerance 1e-5.
    """
    from sklearn.cluster import KMeans
    from sklearn.exceptions import ConvergenceWarning

    if clusters > len(features):
        raise ValueError(f"{clusters} clusters are more than the {len(features)} images: lower --clusters")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # said below, with what to do
        found = KMeans(clusters, n_init=starts, tol=_TOLERANCE, random_state=seed).fit_predict(features.numpy())
    labels = torch.from_numpy(found).long()
    if (distinct := len(labels.unique())) < clusters:
        raise ValueError(
            f"the features of {len(features)} images fall into {distinct} clusters where {clusters} were asked for: "
            "lower --clusters; with 1 the encoder gives every image the same features and has not learned anything"
        )
    return labels


def of_first_process(labels: Tensor) -> Tensor:
    """Labels of the first process on all of them, whatever the last bit of their features made of the centres.

    Args:
        labels (`torch.Tensor` of shape `(N,)`): on the device of this process; overwritten.

    Returns:
        `torch.Tensor` of shape `(N,)`: the same tensor.
    """
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(labels, src=0)
    return labels
