"""The plain published selection and the library's choose the same minibatches."""

from __future__ import annotations

import argparse
import dataclasses

import pytest
import torch

from benchmarks import bench_rcs_reference as bench
from benchmarks.reference import interleave
from benchmarks.reference_selection import min_max_distance, select
from hf_robust.attacks import PGD, frozen
from hf_robust.losses import representational_distance

OPTIONS = argparse.Namespace(model="tiny", device="cpu", training_args=None, mode=None, batch_size=4)


def lived_in(model):
    """Norm statistics of their own, as after a training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.BatchNorm1d | torch.nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.3, generator=generator)
                module.running_var.uniform_(0.5, 2, generator=generator)
                module.weight.uniform_(0.5, 1.5, generator=generator)
    return model


def in_float64(task):
    """The same task with network and pixels in double precision."""
    draw, originals = task.views, task.originals
    return dataclasses.replace(
        task,
        model=task.model.double(),
        views=lambda inputs, generator: {name: x.double() for name, x in draw(inputs, generator).items()},
        originals=lambda images: originals(images).double(),
    )


def noise_of(task):
    """The starts that the library draws, by the names it gives them; validation batches one after the other."""
    validation = task.generator("validation attack")

    def noise(name, x):
        if name == "validation":
            return PGD().first(x, validation)
        return interleave(*PGD().first(x, task.generator(f"attack {name.removeprefix('candidate ')}")).chunk(2))

    return noise


@pytest.mark.parametrize("fresh", [True, False])
def test_both_choose_the_same_in_the_same_order(fresh):
    """Both in float64: in float32 the released distance loses a tenth of a gain to rounding."""
    task = in_float64(bench.selection_task(OPTIONS, "fp32"))
    if not fresh:
        lived_in(task.model)
    with frozen(task.model), torch.no_grad():
        chosen = bench.PUBLISHED.select(task)
    rows, views, validation = bench.reference_inputs(task)
    model = task.model
    before = {name: value.clone() for name, value in model.state_dict().items()}
    picks, gains = select(model, views, validation, bench.PICKS, noise_of(task))
    assert torch.cat([rows[k] for k in picks]).tolist() == chosen.indices.tolist()
    assert gains == pytest.approx(chosen.gains, rel=1e-7)
    assert len(set(picks)) == bench.PICKS
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_distance_is_the_librarys():
    z, z_adv = (torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(2))
    torch.testing.assert_close(min_max_distance(z, z_adv), representational_distance(z, z_adv, "kl_minmax"))
