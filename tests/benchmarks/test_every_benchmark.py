"""Every measurement runs, on networks of a few channels, and its results, table, file and picture are whole."""

from __future__ import annotations

import json
import math

import pytest
import torch

import benchmarks.__main__ as command
from benchmarks import bench_augmentation, bench_finetune, bench_roofline, bench_scaling
from benchmarks.ceilings import Convolutions, gemm_peak
from benchmarks.harness import Reading
from benchmarks.report import plot, table
from benchmarks.setting import build_model
from hf_robust.objectives.acl import ACL

TINY = ["--model", "tiny", "--batch_size", "4", "--rounds", "1", "--gemm", "32", "--quiet"]


def run(*arguments):
    return {result["name"]: result for result in command.main([*TINY, *arguments])}


def test_files_are_found_by_their_name():
    found = command.modules()
    assert {"acl", "air", "rcs", "finetune", "aff", "autolora", "augmentation", "optim", "evaluation"} <= set(found)
    assert [m.__name__ for m in found["rcs"]] == ["benchmarks.bench_rcs", "benchmarks.bench_rcs_reference"]
    assert found["acl"] == found["air"]


def test_steps_against_the_reference(tmp_path, capsys):
    results = run("--only", "acl", "air", "--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png"))
    assert set(results) == {"acl/fp32/eager", "acl/bf16/eager", "air/fp32/eager", "air/bf16/eager"}
    for result in results.values():
        assert 0 < result["ratio_min"] <= result["ratio"] <= result["ratio_max"]
        assert result["extrapolated_hours_of_1000_epochs"] == pytest.approx(
            50_000_000 / result["images_per_second"] / 3600
        )
        assert 0 < result["utilisation"] == result["flop_per_second"] / result["gemm_flop_per_second"]
    assert results["acl/fp32/eager"]["flop_ratio"] == pytest.approx(21 / 16, rel=0.05)
    assert results["air/fp32/eager"]["flop_ratio"] == pytest.approx(22.5 / 17.5, rel=0.05)
    stored = json.loads((tmp_path / "r.json").read_text())
    assert [r["name"] for r in stored["results"]] == list(results)
    assert {"torch", "python"} <= set(stored["environment"]["versions"]) and "commit" in stored["environment"]
    assert stored["settings"]["rounds"] == 1
    assert (tmp_path / "r.png").stat().st_size > 10_000
    assert "acl/bf16/eager" in capsys.readouterr().out


def test_fine_tuning():
    results = run("--only", "finetune", "--dtype", "fp32")
    assert list(results) == [f"{method}/fp32/eager" for method in ("slf", "alf", "aff", "autolora")]
    assert results["aff/fp32/eager"]["flop_ratio"] == pytest.approx(36 / 27, rel=0.05)


def test_one_method_of_a_group_can_be_asked_for():
    options = command.parse([*TINY, "--only", "aff"], list(command.modules()))
    cases = bench_finetune.comparisons(options)
    assert [case.name for case in cases["aff"]] == ["aff/fp32/reference", "aff/fp32/eager", "aff/bf16/eager"]
    assert list(cases) == ["aff"]


def test_selection_optimiser_and_evaluation():
    results = run("--only", "optim", "evaluation", "--dtype", "fp32")
    assert set(results) == {"optim/lars/foreach", "evaluation/fp32/eager", "evaluation/fp32/folded"}
    options = command.parse([*TINY, "--only", "rcs", "--dtype", "bf16"], list(command.modules()))
    found = command.modules()["rcs"][1].measure(options)
    assert [r["name"] for r in found] == ["rcs/bf16/eager", "rcs/bf16/cheap"]
    assert found[1]["flop_ratio"] > 1.5 * found[0]["flop_ratio"]  # one attack step instead of five
    options.short = True
    assert command.modules()["rcs"][1].measure(options) == []


def test_two_processes_take_a_step_and_count_what_they_send():
    pair = bench_scaling.Processes(command.parse([*TINY], list(command.modules())), 2, 4)
    try:
        found, reading = pair.ready(), pair.step()
    finally:
        pair.close()
    # five losses of the attack and two of the training: both views of all 8 images, 8 values of 4 bytes each
    assert found["gathered_bytes"] == 7 * 2 * 8 * 8 * 4 and found["images_per_process"] == 4
    assert found["reduced_bytes"] > found["gathered_bytes"] and found["gradient_bytes"] == 22784
    assert reading.wall > 0 and reading.cpu > 0


def test_scaling_is_throughput_over_that_of_one_process(monkeypatch):
    class Pretended:
        def __init__(self, options, world, images):
            self.images, self.seconds = world * images, images * (1.0 if world == 1 else 1.25)

        ready = staticmethod(lambda: {"gathered_bytes": 1})
        close = staticmethod(lambda: None)

        def step(self):
            return Reading(self.seconds, self.seconds)

    monkeypatch.setattr(bench_scaling, "Processes", Pretended)
    results = run("--only", "scaling", "--batch_size", "8")
    assert list(results) == ["scaling/strong/2", "scaling/weak/2"]
    assert [r["ratio"] for r in results.values()] == pytest.approx([1.6, 1.6])  # 8 s to 5 s; 8 s to 10 s of twice more
    assert [r["efficiency"] for r in results.values()] == pytest.approx([0.8, 0.8])


def test_augmentation_agrees_with_pil():
    (result,) = run("--only", "augmentation").values()
    assert result["microseconds_per_view"] == pytest.approx(1e6 / result["images_per_second"])
    options = command.parse(["--model", "resnet18"], list(command.modules()))
    equal, close = bench_augmentation.agreement(bench_augmentation.levels(options, 48), 32)
    assert equal >= 0.995 and close >= 0.999


def test_roofline_adds_up():
    def seconds(*values):
        return [Reading(v, 2 * v) for v in values]

    readings = {
        "forward": seconds(1.0, 2.0, 1.0),
        "input gradient": seconds(1.0, 2.0, 1.0),
        "weight gradient": seconds(2.0, 4.0, 2.0),
        "eager": seconds(20.0, 45.0, 36.0),
        "compiled": seconds(36.0, 72.0, 36.0),
    }
    found = bench_roofline.summary(readings, "eager", 3e9, "fp32", 1e10)
    assert (found["ratio"], found["ratio_min"], found["ratio_max"]) == (0.8, 0.5, 0.9)  # floors 18, 36, 18
    assert bench_roofline.summary(readings, "compiled", 3e9, "fp32", 1e10)["ratio"] == 0.5
    assert found["floor_seconds"] == 18.0 and found["convolution_flop_per_second"]["weight gradient"] == 1.5e9


def test_convolutions_are_those_of_the_network():
    options = command.parse(["--model", "thin16"], list(command.modules()))
    model = build_model(options, ACL())
    convolutions = Convolutions(model, 2, torch.float32)
    seen = []
    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d):
            module.register_forward_hook(lambda m, x, y: seen.append(2 * y.numel() * m.weight[0].numel()))
    with torch.no_grad():
        model.features(torch.zeros(2, 3, 32, 32), "adv")
    assert convolutions.flop == sum(seen) > 0
    for kind in ("forward", "input gradient", "weight gradient"):
        convolutions.action(kind)()
    with pytest.raises(ValueError, match="kind must be one of"):
        convolutions.action("backward")


def test_roofline_runs():
    found = run("--only", "roofline", "--dtype", "bf16", "--mode", "eager", "no_fold")
    assert set(found) == {"roofline/bf16/eager", "roofline/bf16/no_fold"}
    assert gemm_peak(torch.float32, "cpu", 32) > 0


@pytest.mark.parametrize("name", ["roofline", "acl"])
def test_a_mode_that_is_refused_is_left_out_and_the_others_go_on(name, capsys):
    refused = ["--mode", "eager", "compiled", "--training_args", '{"gradient_checkpointing": true}']
    assert set(run("--only", name, "--dtype", "fp32", *refused)) == {f"{name}/fp32/eager"}
    assert f"{name}/fp32/compiled: left out: gradient_checkpointing=True" in capsys.readouterr().err


def test_a_preset_gives_way_to_flags():
    known = list(command.modules())
    options = command.parse(["--preset", "gpu_short", "--device", "cpu", "--batch_size", "4"], known)
    assert (options.device, options.batch_size, options.model) == ("cpu", 4, "resnet18")
    assert options.memory and options.seconds <= 540 and set(options.only) <= set(known)
    assert command.parse([], known).only == sorted(known)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_refused(capsys):
    with pytest.raises(SystemExit):
        command.parse(["--preset", "gpu_short"], list(command.modules()))
    assert "write --device cpu" in capsys.readouterr().err


def test_what_the_library_refuses_is_left_out_with_its_reason(capsys):
    results = run("--only", "acl", "--dtype", "fp32", "--training_args", '{"optimizer": "adagrad"}')
    assert results == {}
    assert "acl/fp32/eager: left out" in capsys.readouterr().err


def test_a_run_whose_time_is_over_stops(capsys):
    assert run("--only", "acl", "optim", "--seconds", "0") == {}
    assert capsys.readouterr().err.count("the time of this run is over") == 2


def test_peak_of_one_variant_in_a_child(capsys):
    assert command.main([*TINY, "--peak_of", "optim/lars/foreach"]) == []
    assert int(capsys.readouterr().out.removeprefix("peak bytes: ")) >= 0
    with pytest.raises(SystemExit, match="no variant"):
        command.main([*TINY, "--peak_of", "optim/nothing"])


def test_table_and_picture_of_made_up_results(tmp_path):
    results = [
        {"name": "a/fp32/eager", "ratio": 2.0, "ratio_min": 1.8, "ratio_max": 2.1, "seconds": 1.0, "disturbed": True},
        {"name": "b/bf16/eager", "ratio": 30.0, "ratio_min": 29.0, "ratio_max": 31.0, "seconds": 2.0},
        {"name": "share", "ratio": 0.7, "ratio_min": 0.7, "ratio_max": 0.7, "seconds": 2.0, "ratio_of": "an epoch"},
    ]
    lines = table(results).splitlines()
    assert len(lines) == 5 and "True" in lines[2] and len({len(line.rstrip()) <= len(lines[0]) for line in lines}) == 1
    plot(tmp_path / "deep" / "p.png", results)
    assert (tmp_path / "deep" / "p.png").exists() and not math.isnan(results[0]["ratio"])
