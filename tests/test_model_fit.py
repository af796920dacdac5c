"""A model or a training set that does not suit a method is refused in words."""

from __future__ import annotations

import pytest
from training import tiny_images, tiny_model

from hf_robust.model_fit import check_fit
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.advcl import AdvCL
from hf_robust.objectives.sat import SAT

FEW = AdvCL(clusters=[2, 3])


@pytest.mark.parametrize("objective", [ACL(), SAT(), FEW], ids=["acl", "sat", "advcl"])
def test_what_suits_passes(objective):
    check_fit(objective, tiny_model(objective))
    check_fit(objective, tiny_model(objective), tiny_images())


@pytest.mark.parametrize(
    ("objective", "config", "message"),
    [
        (ACL(), {"norm_branches": ("adv",)}, r"through the norm branches \['clean', 'adv'\], the model has \['adv'\]"),
        (ACL(), {"head": "none"}, "ACL trains a projector, the model has no head: build .* head='projector'"),
        (SAT(), {"head": "projector", "num_classes": None}, "SAT trains a classifier, the model has a projector"),
        (FEW, {"branch_heads": None}, r"ends its branches in .*\{'adv_ce': \[2, 3\]\}, the model has \{\}: build"),
        (ACL(), {"branch_heads": {"adv": [2]}}, r"in the classifiers \{\}, the model has \{'adv': \[2\]\}"),
    ],
)
def test_another_model_is_refused(objective, config, message):
    with pytest.raises(ValueError, match=message):
        check_fit(objective, tiny_model(objective, **config))


@pytest.mark.parametrize(("images", "fitting"), [(24, "2 10"), (9, "2"), (100, "2 10 50 100")])
def test_more_clusters_than_images_are_refused_with_those_that_fit(images, fitting):
    model = tiny_model(AdvCL())
    data = tiny_images(images)
    with pytest.raises(
        ValueError, match=rf"AdvCL learns 500 clusters, more than the {images} .*--clusters {fitting}$"
    ):
        check_fit(AdvCL(), model, data)
