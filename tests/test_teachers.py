"""Teachers: frozen ones from wherever an encoder comes from, what a checkpoint keeps of them, and their students."""

from __future__ import annotations

import json
import logging
import shutil

import pytest
import timm
import torch
from timm.models import save_for_hf
from training import tiny_images, tiny_model, tiny_teacher, tiny_trainer
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model, ViTImageProcessor

from hf_robust.adapters import AdapterModel
from hf_robust.hub import load_encoder, save_encoder
from hf_robust.objectives.acl import ACL
from hf_robust.objectives.deacl import DeACL
from hf_robust.objectives.dynacl import DynACL
from hf_robust.objectives.fare import FARE
from hf_robust.objectives.simclr import SimCLR
from hf_robust.teachers import FrozenTeacher, build_teacher, load_teacher, student_of

CLOSE = {"rtol": 1e-5, "atol": 1e-5}
CLIP = {"img_size": 16, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}


def pixels(size, n=4):
    return torch.rand(n, 3, size, size, generator=torch.Generator().manual_seed(2))


@pytest.fixture(scope="module")
def simclr():
    """A trained teacher: one clean branch, running statistics that have moved."""
    model = tiny_model(SimCLR(), seed=3).train()
    with torch.no_grad():
        model([("clean", torch.rand(32, 3, 8, 8, generator=torch.Generator().manual_seed(4)))])
    return model.eval()


@pytest.fixture(scope="module")
def encoder(simclr, tmp_path_factory):
    return save_encoder(simclr, tmp_path_factory.mktemp("teachers") / "encoder", branch="clean")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A repository as timm writes it, of a vision tower of CLIP with its projection as classifier."""
    torch.manual_seed(0)
    tower = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=6, **CLIP).eval()
    folder = tmp_path_factory.mktemp("clip")
    save_for_hf(tower, folder, model_args=CLIP, safe_serialization=True)
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == 6 and config["pretrained_cfg"]["input_size"] == [3, 16, 16]
    config["model_args"].pop("num_classes", None)  # which transformers would hand on a second time
    (folder / "config.json").write_text(json.dumps(config))
    return folder, tower


def answers(tower, x):
    """Pooled features of a timm network of pixels."""
    cfg = tower.pretrained_cfg
    mean, std = (torch.tensor(cfg[key]).view(-1, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        return tower.forward_head(tower.forward_features((x - mean) / std), pre_logits=True)


# ---------------------------------------------------------------------- where they come from
def test_an_encoder_pretrained_here_answers_with_its_own_normalisation(simclr, encoder):
    teacher = load_teacher(encoder)
    with torch.no_grad():
        expected = simclr.features(pixels(8), "clean")
    torch.testing.assert_close(teacher(pixels(8)), expected, **CLOSE)
    assert teacher.name == str(encoder) and expected.abs().max() > 0.1
    for network in (simclr, load_encoder(encoder)):  # in Python also the networks themselves
        torch.testing.assert_close(load_teacher(network)(pixels(8)), expected, **CLOSE)


def test_a_repository_of_timm(clip):
    folder, tower = clip
    x = pixels(16)
    torch.testing.assert_close(load_teacher(folder)(x), answers(tower, x), **CLOSE)


def test_a_timm_name_is_built_by_timm(clip, monkeypatch):
    """As timm names it: a tower with quick GELU shares its weights' repository with one that has the exact GELU."""
    create, seen = timm.create_model, []

    def with_weights(name, pretrained=False, **kwargs):
        if not pretrained:
            return create(name, **{**kwargs, **CLIP})
        seen.append(name)
        tower = create(name, **{**kwargs, **CLIP})
        tower.load_state_dict({k: v for k, v in clip[1].state_dict().items() if not k.startswith("head.")})
        return tower

    monkeypatch.setattr(timm, "create_model", with_weights)
    name = "vit_base_patch16_clip_quickgelu_224.openai"
    teacher = load_teacher(name)
    assert seen == [name] and teacher.name == name
    torch.testing.assert_close(teacher(pixels(16)), answers(clip[1], pixels(16)), **CLOSE)


def test_an_encoder_of_transformers_is_normalised_by_its_image_processor(tmp_path):
    torch.manual_seed(0)
    config = Dinov2Config(image_size=16, patch_size=8, hidden_size=12, num_hidden_layers=1, num_attention_heads=2)
    network = Dinov2Model(config).eval()
    network.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6]).save_pretrained(tmp_path)
    mean, std = (torch.tensor(v).view(-1, 1, 1) for v in ([0.1, 0.2, 0.3], [0.4, 0.5, 0.6]))
    with torch.no_grad():
        expected = network((pixels(16) - mean) / std).pooler_output
    torch.testing.assert_close(load_teacher(tmp_path)(pixels(16)), expected, **CLOSE)


def test_of_clip_the_image_tower_answers_and_timms_form_is_named_to_those_who_want_to_train_it(tmp_path):
    torch.manual_seed(0)
    tower = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sides = {"image_size": 16, "patch_size": 8}
    words = {"vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
    network = CLIPModel(CLIPConfig(text_config={**tower, **words}, vision_config={**tower, **sides})).eval()
    network.save_pretrained(tmp_path)
    ViTImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path)
    with torch.no_grad():
        expected = network.vision_model((pixels(16) - 0.5) / 0.25).pooler_output
    torch.testing.assert_close(load_teacher(tmp_path)(pixels(16)), expected, **CLOSE)
    with pytest.raises(ValueError, match=r"'clip'\) does not say .* take timm's form, such as 'vit_base_patch16_clip"):
        student_of(tmp_path, FARE())


def test_any_module_from_pixels_to_features():
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(0.5), torch.nn.Linear(192, 8))
    teacher = load_teacher(network)
    torch.testing.assert_close(teacher(pixels(8)), network.eval()(pixels(8)))
    assert all(p.requires_grad for p in network.parameters())  # a copy is frozen


def test_what_is_no_teacher_says_so(tmp_path):
    with pytest.raises(FileNotFoundError, match="no encoder 'nobody/nothing'"):
        load_teacher("nobody/nothing")
    with pytest.raises(ValueError, match=r"no pre-trained weights of the name 'resnet18_cifar': give the folder"):
        load_teacher("resnet18_cifar")
    with pytest.raises(ValueError, match=r"of the name 'resnet18.mine': write one of resnet18.a1_in1k, "):
        load_teacher("resnet18.mine")
    tiny_model(SimCLR()).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a training checkpoint"):
        load_teacher(tmp_path)


# ---------------------------------------------------------------------- what it does not do
def test_it_never_moves_whatever_is_asked_of_it(encoder):
    teacher = load_teacher(encoder)
    before = {name: t.clone() for name, t in teacher.state_dict().items()}
    teacher.train()
    torch.nn.ModuleList([teacher]).train()
    z = teacher(pixels(8).requires_grad_())
    assert not z.requires_grad and z.grad_fn is None
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(t, before[name]) for name, t in teacher.state_dict().items())


# ---------------------------------------------------------------------- what a method asks for
def test_a_missing_and_an_unwanted_teacher_are_refused(tmp_path, encoder):
    model = tiny_model(DeACL())
    with pytest.raises(ValueError, match=r"DeACL learns from a frozen teacher and none is given: .*--teacher"):
        build_teacher(DeACL(), model, None, "cpu")
    for method in (ACL(), DynACL(ema_decay=0.9)):
        with pytest.raises(ValueError, match=r"learns from no frozen teacher, got teacher='.*encoder': leave it out"):
            tiny_trainer(tmp_path, method, teacher=str(encoder))


def test_a_teacher_of_another_width_or_image_size_is_refused(clip):
    with pytest.raises(ValueError, match=r"has features \(8,\), those of the model are \(6,\): .*as wide as"):
        narrow = tiny_model(FARE(), model_args={"channels": [8, 8, 8, 6], "stem_stride": 2})
        build_teacher(FARE(), narrow, tiny_teacher(FARE()), "cpu")
    with pytest.raises(ValueError, match=r"cannot see images of 8 pixels \(.*\): train at the teacher's own size"):
        build_teacher(FARE(), tiny_model(FARE()), str(clip[0]), "cpu")


def test_a_model_that_is_not_a_copy_of_its_teacher_is_remarked_on(encoder, caplog):
    with caplog.at_level(logging.WARNING, logger="hf_robust"):
        build_teacher(DeACL(), student_of(encoder, DeACL()), encoder, "cpu")
        build_teacher(DeACL(student_scratch=True), tiny_model(DeACL()), encoder, "cpu")
        assert caplog.text == ""
        build_teacher(FARE(), tiny_model(FARE()), encoder, "cpu")
    assert "FARE starts from its teacher, and this model is another network" in caplog.text


def test_other_kinds_are_as_before():
    model = tiny_model(DynACL(ema_decay=0.9))
    assert build_teacher(ACL(), model, None, "cpu") is None
    momentum = build_teacher(DynACL(ema_decay=0.9), model, None, "cpu")
    assert type(momentum) is type(model) and momentum is not model and momentum.training
    assert not any(p.requires_grad for p in momentum.parameters())


# ---------------------------------------------------------------------- students
@pytest.mark.parametrize("method", [DeACL(), FARE(), FARE(adapter_rank=2)], ids=["deacl", "fare", "adapter"])
def test_a_student_begins_as_its_teacher(encoder, clip, method):
    for source, size in ((encoder, 8), (clip[0], 16)):
        student = student_of(source, method)
        assert (student.config.image_size, student.config.head) == (size, "none")
        assert tuple(student.config.norm_branches) == ("adv",)
        assert isinstance(student, AdapterModel) is (method.trains == "adapter")
        with torch.no_grad():
            torch.testing.assert_close(student.embed(pixels(size), "adv"), load_teacher(source)(pixels(size)), **CLOSE)


def test_adapters_that_could_not_be_exported_are_refused_at_once(tmp_path):
    grouped = tiny_model(FARE(), architecture="regnetx_002", model_args={})
    save_encoder(grouped, tmp_path / "encoder")
    with pytest.raises(ValueError, match="grouped convolution .* cannot be merged"):
        student_of(tmp_path / "encoder", FARE(adapter_rank=21))


# ---------------------------------------------------------------------- checkpoints
@pytest.mark.parametrize("method", [DeACL(), FARE(adapter_rank=2)], ids=["deacl", "fare_adapter"])
def test_a_checkpoint_keeps_the_digest_and_a_resumed_run_is_the_uninterrupted_one(tmp_path, encoder, method):
    settings = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optimizer": "sgd", "learning_rate": 0.05}

    def trainer(teacher):
        return tiny_trainer(tmp_path / "run", method, model=student_of(encoder, method), teacher=teacher, **settings)

    straight = trainer(str(encoder))
    straight.train()
    checkpoint = tmp_path / "run" / "checkpoint-2"
    assert json.loads((checkpoint / "teacher.json").read_text()) == {
        "name": str(encoder),
        "fingerprint": straight.teacher.fingerprint,
    }
    assert not (checkpoint / "teacher.safetensors").exists()
    moved = shutil.copytree(encoder, tmp_path / "moved")  # the same weights in another place
    resumed = trainer(str(moved))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = straight.model.state_dict()
    assert [n for n, t in resumed.model.state_dict().items() if not torch.equal(t, expected[n])] == []
    assert resumed.teacher.fingerprint == straight.teacher.fingerprint
    with pytest.raises(ValueError, match=r"was trained with the teacher '.*encoder' \(weights \w+\), got 'tiny'"):
        trainer(tiny_teacher(method)).train(resume_from_checkpoint=str(checkpoint))


def test_training_moves_the_student_towards_robust_features_and_exports_it(tmp_path, encoder):
    method = FARE(adapter_rank=2)
    trainer = tiny_trainer(
        tmp_path,
        method,
        data=tiny_images(24),
        model=student_of(encoder, method),
        teacher=encoder,
        optimizer="adamw",
        learning_rate=0.02,
        warmup_epochs=0,
        num_train_epochs=4,
    )
    trainer.train()
    losses = [entry["loss_adversarial"] for entry in trainer.state.log_history if "loss_adversarial" in entry]
    assert sum(losses[-6:]) < 0.9 * sum(losses[:6])
    base = [n for n, t in trainer.model.state_dict().items() if "lora_" not in n and "backbone" in n]
    original = student_of(encoder, method).state_dict()
    assert base and all(torch.equal(trainer.model.state_dict()[n], original[n]) for n in base)
    exported = load_teacher(trainer.save_encoder(tmp_path / "encoder"))  # adapters taken in
    with torch.no_grad():
        trained = trainer.model.eval().embed(pixels(8), "adv")
    torch.testing.assert_close(exported(pixels(8)), trained, **CLOSE)
    assert not torch.allclose(exported(pixels(8)), load_teacher(encoder)(pixels(8)), atol=1e-3)
    assert trainer.encoder_branch == "adv" and type(trainer.encoder_model).__name__ == "RobustModelForPreTraining"
    assert trainer.probe(9, 6, progress=False).n_eval == 6


def test_the_teacher_is_asked_once_per_step_and_its_weights_are_not_among_those_that_move(tmp_path):
    trainer = tiny_trainer(tmp_path, DeACL(), max_steps=2)
    assert isinstance(trainer.teacher, FrozenTeacher) and trainer.teacher not in trainer._networks()
    asked = []
    trainer.teacher.register_forward_hook(lambda *_: asked.append(1))
    before = {name: t.clone() for name, t in trainer.teacher.state_dict().items()}
    trainer.train()
    assert len(asked) == 2
    assert all(torch.equal(t, before[name]) for name, t in trainer.teacher.state_dict().items())
    assert trainer.encoder_model is trainer.model
