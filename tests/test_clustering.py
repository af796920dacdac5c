from __future__ import annotations

import pytest
import torch

from hf_robust.clustering import cluster_features, of_first_process


def blobs(clusters: int = 4, each: int = 6) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    truth = torch.arange(clusters).repeat(each)
    return 10 * torch.eye(clusters)[truth] + 0.1 * torch.randn(len(truth), clusters, generator=generator), truth


@pytest.mark.parametrize("starts", [3, 10])
def test_finds_well_separated_groups(starts):
    features, truth = blobs()
    found = cluster_features(features, 4, seed=0, starts=starts)
    assert found.dtype == torch.int64 and sorted(found.unique().tolist()) == [0, 1, 2, 3]
    assert len({(a, b) for a, b in zip(found.tolist(), truth.tolist(), strict=True)}) == 4
    assert torch.equal(found, cluster_features(features, 4, seed=0, starts=starts))


def test_too_many_clusters_are_refused():
    features, _ = blobs(2, 3)
    with pytest.raises(ValueError, match="7 clusters are more than the 6 images: lower --clusters"):
        cluster_features(features, 7, seed=0)
    with pytest.raises(ValueError, match="features of 6 images fall into 1 clusters where 2 were asked for: lower"):
        cluster_features(torch.ones(6, 3), 2, seed=0)


def test_the_first_process_alone_keeps_its_labels():
    labels = torch.arange(3)
    assert of_first_process(labels) is labels
