"""Stage 1 by DINO: the loss is the paper's, the run is repeatable, and it ends in a slice encoder's folder."""

import os
import shutil
import signal

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from sklearn.neighbors import KNeighborsClassifier
from transformers import AutoModel, TrainerCallback, TrainingArguments, ViTConfig, ViTModel, set_seed
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from samf import SamfImageProcessor, pretrain_encoder
from samf.cache.settings import load_image_processor
from samf.cache.slice_cache import SliceCache
from samf.model.ct_volume import CTVolume, VolumeRef
from samf.phantoms.dataset import PhantomSettings, make_phantom, write_dataset, write_nifti
from samf.pretraining.attention_maps import cls_attention
from samf.pretraining.dino import DinoArguments, DinoModel, DinoSchedules, DinoViews, cosine
from samf.pretraining.dino_trainer import ATTENTION, DinoTrainer
from samf.pretraining.labelled_sets import LabelledSet, some_slices
from samf.pretraining.neighbours import knn_accuracy, retrieval_accuracy
from samf.pretraining.scans import find_scans, hold_out
from samf.pretraining.slice_datasets import SLICES, VolumeSlices, slice_sets
from samf.training.checkpoints import last_checkpoint
from samf.training.sample_generation import FOLDER
from samf.training.sampling import EpochSampler
from samf.training.slice_filling import fill_slice_cache
from samf.training.trainer_base import ResumableTrainer
from samf.utils.files import atomic_update

pytest.importorskip("lightly", reason="DINO needs lightly: pip install 'lightly>=1.6'")

SMALL = DinoArguments(
    local_crops=2, local_crop_size=16, head_dim=24, head_hidden_dim=16, head_bottleneck_dim=8, freeze_last_layer=0.5
)


class Noise(torch.utils.data.Dataset):
    """Labelled images, bright and dark."""

    label_names = ("dark", "bright")

    def __init__(self, count: int):
        rng = np.random.default_rng(0)
        self.labels = np.arange(count) % 2
        self.images = rng.integers(0, 100, (count, 3, 32, 32), dtype=np.uint8) + (
            100 * self.labels[:, None, None, None]
        )

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(self.images[index].astype(np.uint8))


def encoder(seed: int = 0) -> ViTModel:
    torch.manual_seed(seed)
    config = ViTConfig(
        image_size=32,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.2,
    )
    return ViTModel(config, add_pooling_layer=False)


def views(seed: int = 0) -> DinoViews:
    return DinoViews(Noise(12), SMALL, 32, [0.5] * 3, [0.25] * 3, seed)


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    items = [views()[0, row] for row in range(rows)]
    return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def trainer(folder, steps: int = 6, **options) -> DinoTrainer:
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": steps,
        "learning_rate": 1e-3,
        "weight_decay": 0.04,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **options,
    }
    set_seed(0)
    noise = Noise(12)
    return DinoTrainer(
        encoder(),
        TrainingArguments(str(folder), **options),
        SMALL,
        slices=noise,
        bank=LabelledSet(noise, np.arange(8)),
        queries=LabelledSet(noise, np.arange(8, 12)),
        image_processor=SamfImageProcessor(size=32, slices_per_plane=2),
        neighbours=3,
        attention_slices=2,
    )


def losses(run: DinoTrainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_loss_is_the_papers_by_plain_loops():
    """Cross-entropy of each teacher view with each other student view; the centre moves after it was used."""
    model = DinoModel(encoder(), SMALL).train()
    with torch.no_grad():  # so that student and teacher differ
        for parameter in model.teacher.parameters():
            parameter.mul_(1.1)
        model.loss.center.copy_(torch.linspace(-0.1, 0.1, 24))
    model.teacher_temp = 0.05
    data = batch()
    center = model.loss.center.flatten().double().numpy().copy()
    crops = [data["global_crops"][:, 0], data["global_crops"][:, 1], *data["local_crops"].unbind(1)]
    with torch.no_grad():
        student = [model.student(crop).double().numpy() for crop in crops]
        teacher = [model.teacher(crop).double().numpy() for crop in crops[:2]]

    def softmax(x):
        e = np.exp(x - x.max())
        return e / e.sum()

    terms = []
    for t, t_view in enumerate(teacher):
        for s, s_view in enumerate(student):
            for row in range(3):
                target = softmax((t_view[row] - center) / 0.05)
                if s != t:
                    terms.append(-(target * np.log(softmax(s_view[row] / 0.1))).sum())
    assert model(**data)["loss"].item() == pytest.approx(np.mean(terms), rel=1e-4)
    expected = 0.9 * center + 0.1 * np.mean(teacher, axis=(0, 1))
    np.testing.assert_allclose(model.loss.center.flatten().numpy(), expected, atol=1e-6)


def test_no_gradient_reaches_the_teacher_and_half_precision_leaves_the_loss_in_float32():
    model = DinoModel(encoder(), SMALL).train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch())["loss"]
    loss.backward()
    assert loss.dtype == torch.float32
    assert all(parameter.grad is None for parameter in model.teacher.parameters())
    assert all(p.grad is not None for p in model.student.parameters() if p.requires_grad)
    assert not model.teacher.training and model.student.training


def test_teacher_starts_as_the_student_and_follows_it():
    model = DinoModel(encoder(), SMALL)
    before = {name: tensor.clone() for name, tensor in model.teacher.state_dict().items()}
    for name, tensor in model.student.state_dict().items():
        assert torch.equal(tensor, before[name])
    with torch.no_grad():
        for parameter in model.student.parameters():
            parameter.add_(1.0)
    model.update_teacher(0.75)
    for name, tensor in model.teacher.named_parameters():
        torch.testing.assert_close(tensor, before[name] + 0.25)


def test_cosine_goes_from_start_to_end():
    assert cosine(0, 10, 0.996, 1.0) == pytest.approx(0.996)
    assert cosine(5, 10, 0.996, 1.0) == pytest.approx(0.998)
    assert cosine(10, 10, 0.04, 0.4) == cosine(99, 10, 0.04, 0.4) == pytest.approx(0.4)


# ---- crops ---------------------------------------------------------------------------------------------------------


def test_crops_follow_from_seed_epoch_and_index_alone():
    first = views()[3, 5]
    assert first["global_crops"].shape == (2, 3, 32, 32) and first["local_crops"].shape == (2, 3, 16, 16)
    torch.manual_seed(123)
    np.random.seed(123)
    state = np.random.get_state()[1].copy(), torch.get_rng_state()
    again = views()[3, 5]
    assert (np.random.get_state()[1] == state[0]).all() and torch.equal(torch.get_rng_state(), state[1])
    assert all(torch.equal(first[name], again[name]) for name in first)
    for other in (views()[4, 5], views()[3, 6], views(seed=1)[3, 5]):
        assert not torch.equal(first["global_crops"], other["global_crops"])
    assert not torch.equal(first["global_crops"][0], first["global_crops"][1])


def test_slices_need_three_channels():
    noise = Noise(2)
    noise.images = noise.images[:, :1]
    with pytest.raises(ValueError, match="three channels"):
        DinoViews(noise, SMALL, 32, [0.5] * 3, [0.25] * 3, 0)[0, 0]


def test_sampler_gives_every_index_once_an_epoch_in_another_order():
    sampler = EpochSampler(7, seed=3)
    first = list(sampler)
    assert first == list(sampler) and sorted(index for _, index in first) == list(range(7))
    sampler.epoch = 1
    assert {epoch for epoch, _ in sampler} == {1} and [i for _, i in sampler] != [i for _, i in first]


# ---- measuring -----------------------------------------------------------------------------------------------------


def test_knn_accuracy_is_scikit_learns():
    rng = np.random.default_rng(0)
    bank, queries = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    bank_labels, query_labels = rng.integers(0, 3, 60), rng.integers(0, 3, 40)
    judge = KNeighborsClassifier(7, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07))
    expected = judge.fit(bank, bank_labels).score(queries, query_labels)
    assert knn_accuracy(bank, bank_labels, queries, query_labels, 7, chunk=16) == pytest.approx(expected)


def test_retrieval_accuracy():
    first = np.eye(4)
    assert retrieval_accuracy(first, 3 * first) == 1
    assert retrieval_accuracy(first, first[[1, 0, 2, 3]]) == 0.5


def test_cls_attention_is_the_softmax_of_the_last_layer():
    model = encoder().eval()
    pixels = torch.randn(2, 3, 32, 32)
    weights = cls_attention(model, pixels)
    assert weights.shape == (2, 2, 4, 4) and model.config._attn_implementation == "sdpa"
    layer, hidden = model.layers[-1], []
    layer.register_forward_pre_hook(lambda module, args, kwargs: hidden.append(args[0]), with_kwargs=True)
    with torch.no_grad():
        model(pixels)
        x = layer.layernorm_before(hidden[0])
        query, key = (
            project(x).view(2, 17, 2, 8).transpose(1, 2) for project in (layer.attention.q_proj, layer.attention.k_proj)
        )
        expected = (query[:, :, :1] @ key.mT / 8**0.5).softmax(-1)[:, :, 0, 1:].view(2, 2, 4, 4)
    torch.testing.assert_close(weights, expected)


# ---- runs ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    run = trainer(folder, save_total_limit=None)
    run.train()
    run.save_encoder()
    return folder, run


def test_a_run_goes_on_where_it_was_cut_off(unbroken, tmp_path):
    """Step 4 of 6 is in the middle of the second epoch."""
    folder, run = unbroken
    shutil.copytree(folder / "checkpoint-4", tmp_path / "checkpoint-4")
    (tmp_path / "checkpoint-5").mkdir()  # cut off while it was written
    resumed = trainer(tmp_path)
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path))
    assert losses(resumed)[-2:] == losses(run)[-2:] and len(losses(run)) == 6
    for name, tensor in run.dino.state_dict().items():
        assert torch.equal(tensor, resumed.dino.state_dict()[name]), name


def test_a_signal_saves_a_checkpoint_and_ends_training(unbroken, tmp_path):
    class Interrupt(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    run = trainer(tmp_path, save_strategy="no")
    run.add_callback(Interrupt())
    with pytest.raises(SystemExit) as stopped:
        pretrain_encoder.train_to_end(run)
    assert stopped.value.code == 128 + signal.SIGTERM and run.state.global_step == 3
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    resumed = trainer(tmp_path, save_strategy="no", resume_from_checkpoint="last")
    pretrain_encoder.train_to_end(resumed)
    assert losses(resumed) == losses(unbroken[1])


def test_the_teacher_is_saved_as_a_slice_encoder(unbroken):
    folder, run = unbroken
    pixels = torch.randn(2, 3, 32, 32)
    for name, branch in (("", run.dino.teacher), ("student", run.dino.student)):
        loaded = AutoModel.from_pretrained(folder / name, add_pooling_layer=False).eval()
        with torch.no_grad():
            expected = branch.encoder.eval()(pixels).last_hidden_state
            torch.testing.assert_close(loaded(pixels).last_hidden_state, expected)
        assert SamfImageProcessor.from_pretrained(folder / name).size == 32
    assert not torch.equal(*(b.encoder.embeddings.cls_token for b in (run.dino.teacher, run.dino.student)))


def test_evaluation_gives_knn_accuracy_and_attention_maps(unbroken):
    folder, run = unbroken
    metrics = run.evaluate()
    whole = np.stack([run.embed(part)[0] for part in (run.bank, run.queries)])
    pixels = run.image_processor(
        [
            {"slices": np.stack([run.bank[0].numpy(), run.queries[0].numpy()])}
            | {name: np.zeros(2) for name in ("slice_planes", "slice_positions", "slice_indices", "slice_mm")}
        ]
    )["pixel_values"][0]
    with torch.no_grad():
        expected = run.dino.teacher.encoder.eval()(pixels).last_hidden_state[:, 0].numpy()
    np.testing.assert_allclose(whole, expected, atol=1e-5)
    assert metrics["eval_knn_accuracy"] == 1.0  # bright or dark
    assert (folder / ATTENTION / "step_0000006.png").stat().st_size > 1000


def test_prototypes_stay_for_the_first_epochs_and_weight_decay_rises(tmp_path):
    run = trainer(tmp_path, steps=3, save_strategy="no")
    last = run.dino.student.head.last_layer.weight_v
    start, seen = last.detach().clone(), []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, optimizer=None, **kwargs):
            decays = {group["weight_decay"] for group in optimizer.param_groups}
            seen.append((torch.equal(last, start), max(decays), min(decays)))

    run.add_callback(Watch())
    run.train()
    assert [still for still, _, _ in seen] == [True, True, False]  # half an epoch of three steps
    assert [decay for _, decay, _ in seen] == pytest.approx([cosine(step, 3, 0.04, 0.4) for step in range(3)])
    assert {none for _, _, none in seen} == {0.0}


def test_too_few_slices_for_a_step_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="12 training rows make no step of 16"):
        trainer(tmp_path, per_device_train_batch_size=16)


def test_sizes_must_be_whole_patches(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="local_crop_size=20 isn't a multiple"):
        DinoTrainer(
            encoder(),
            args,
            DinoArguments(local_crop_size=20),
            slices=Noise(4),
            bank=None,
            queries=None,
            image_processor=SamfImageProcessor(size=32),
        )


# ---- slices --------------------------------------------------------------------------------------------------------


def save_organs(folder, planes=("a", "c", "s"), size=28):
    """Write small MedMNIST files: 6 train, 4 val and 2 test images per plane, each filled with its own number."""
    ending = "" if size == 28 else f"_{size}"
    for number, plane in enumerate(planes):
        arrays = {}
        for offset, (split, count) in enumerate((("train", 6), ("val", 4), ("test", 2))):
            value = 100 * number + 20 * offset + np.arange(count)
            arrays[f"{split}_images"] = np.broadcast_to(value[:, None, None], (count, size, size)).astype(np.uint8)
            arrays[f"{split}_labels"] = (value % 11)[:, None].astype(np.uint8)
        np.savez_compressed(folder / f"organ{plane}mnist{ending}.npz", **arrays)


@pytest.mark.parametrize(("splits", "expected"), [(["train"], 18), (["all"], 36), (["train", "test"], 24)])
def test_medmnist_slices(tmp_path, splits, expected):
    save_organs(tmp_path)
    processor = SamfImageProcessor(size=28)
    for _ in range(2):  # unpacked, then found unpacked
        sets = slice_sets([str(tmp_path)], processor, tmp_path / "cache", splits=splits)
    assert (len(sets.train), len(sets.bank), len(sets.queries)) == (expected, 18, 12)
    values = [int(sets.bank[i][0, 0, 0]) for i in range(18)]
    assert values == [100 * plane + i for plane in range(3) for i in range(6)]
    assert list(sets.bank.labels) == [value % 11 for value in values] and sets.bank.label_names[6] == "liver"
    assert sets.queries[5].shape == (3, 28, 28) and (sets.queries[5] == 121).all()
    assert len(list((tmp_path / "cache" / "medmnist").iterdir())) == 3 * (2 + ("test" in splits or "all" in splits))


def test_an_encoder_of_medmnist_keeps_the_window_that_it_has_seen(tmp_path):
    """Otherwise it would get lung windows in its first channel in stages 2 and 3."""
    save_organs(tmp_path)
    args = pretrain_encoder.EncoderArguments(data=[str(tmp_path)], image_size=28)
    pretrain_encoder.build_image_processor(args).save_pretrained(tmp_path / "encoder")
    later = load_image_processor(str(tmp_path / "encoder"))
    abdomen = CTVolume(
        np.linspace(-400, 500, 64**3).reshape(64, 64, 64).astype(np.float32), (1.0, 1.0, 1.0), np.eye(4), "ramp"
    )
    slices = later.extract(abdomen)["slices"]  # (S, 3, H, W)
    assert (slices == slices[:, :1]).all()  # grey
    assert [tuple(window) for window in later.hu_windows] == [(-160, 240)] * 3
    others = pretrain_encoder.EncoderArguments(data=[str(tmp_path / "cts")], image_size=28)
    assert pretrain_encoder.build_image_processor(others).hu_windows == SamfImageProcessor().hu_windows


def test_seed_0_of_the_data_is_a_seed(tmp_path):
    orders = []
    for data_seed in (0, 7, None):
        run = trainer(tmp_path / str(data_seed), data_seed=data_seed, seed=7)
        orders.append(list(run.sampler))
        assert run.train_dataset.seed == (7 if data_seed is None else data_seed)
    assert orders[0] != orders[1] == orders[2]


def test_medmnist_that_is_not_there_says_what_is_looked_for(tmp_path):
    save_organs(tmp_path, size=64)
    with pytest.raises(FileNotFoundError, match="organamnist_224.npz"):
        slice_sets([str(tmp_path)], SamfImageProcessor(size=224), tmp_path / "cache")
    with pytest.raises(ValueError, match="28, 64, 128, 224"):
        slice_sets([str(tmp_path)], SamfImageProcessor(size=32), tmp_path / "cache")
    with pytest.raises(ValueError, match="splits="):
        slice_sets([str(tmp_path)], SamfImageProcessor(size=64), tmp_path / "cache", splits=["valid"])


@pytest.fixture(scope="module")
def scans(tmp_path_factory):
    """Write scans of four patients with CT-RATE's names, the first with two reconstructions, and one file with another name."""
    folder = tmp_path_factory.mktemp("scans")
    names = ["train_1_a_1", "train_1_a_2", "train_2_a_1", "train_3_a_1", "train_4_a_1", "other"]
    phantom = make_phantom(np.random.default_rng(0), voxel_mm=20.0)
    for number, name in enumerate(names):
        (folder / f"sub{number % 2}").mkdir(exist_ok=True)
        write_nifti(phantom, folder / f"sub{number % 2}" / f"{name}.nii.gz")
    return folder


def test_scans_of_a_folder_keep_patients_apart(scans):
    found = find_scans([str(scans)], valid_share=0.4)
    everyone = found["train"] + found["valid"]
    assert sorted(len(scan.volumes) for scan in everyone) == [1, 1, 1, 1, 2]
    assert len(found["valid"]) == 2 and not {s.patient for s in found["train"]} & {s.patient for s in found["valid"]}
    assert hold_out(everyone[::-1], 0.4)[1] == [s for s in everyone[::-1] if s in found["valid"]]
    with pytest.raises(ValueError, match="1 patient"):
        hold_out(everyone[:1], 0.5)


def test_a_patient_in_training_and_validation_is_an_error(tmp_path):
    """CT-RATE's own splits share no patient; a second source may contain its validation patients."""
    write_dataset(tmp_path / "set", train_patients=2, valid_patients=1, settings=PhantomSettings(voxel_mm=20.0))
    (volume,) = (tmp_path / "set/dataset/valid_fixed").rglob("*.nii.gz")
    other = tmp_path / "other"
    other.mkdir()
    shutil.copy(volume, other)
    assert len(find_scans([str(tmp_path / "set")])["valid"]) == 1
    with pytest.raises(ValueError, match="1 patients are in both"):
        find_scans([str(tmp_path / "set"), str(other)])


def test_what_shows_patients_is_not_pushed(tmp_path):
    """Trainer pushes its whole output folder except names that begin with an underscore and checkpoints."""
    for name in (SLICES, FOLDER, ATTENTION):
        assert not list(filter_repo_objects([f"{name}/a/b.png"], ignore_patterns=["_*", f"{PREFIX_CHECKPOINT_DIR}-*"]))
    arguments = TrainingArguments(str(tmp_path), push_to_hub=True, use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="hf upload OWNER/NAME"):
        ResumableTrainer(args=arguments)


def test_a_folder_without_volumes_says_what_is_looked_for(tmp_path):
    (tmp_path / "notes.txt").write_text("nothing here", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="0 volumes under"):
        find_scans([str(tmp_path)])


def test_slices_of_cts_are_the_image_processors_with_plane_and_depth_as_labels(scans, tmp_path):
    processor = SamfImageProcessor(size=16, slices_per_plane=4)
    sets = slice_sets([str(scans)], processor, tmp_path, depth_bins=2)
    assert len(sets.train) + len(sets.queries) == 6 * 12
    extracted = processor.extract(find_scans([str(scans)])["train"][0].volumes[0].path)
    for index in range(12):
        np.testing.assert_array_equal(sets.train[index].numpy(), extracted["slices"][index])
    assert list(sets.train.labels[:12]) == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert sets.train.label_names[2] == "coronal 1/2"
    cached = slice_sets([str(tmp_path)], processor, tmp_path / "other", depth_bins=2)
    assert len(cached.train) + len(cached.queries) == 6 * 12
    few = some_slices(sets.bank, 5)
    assert len(few) == 5 and all(torch.equal(few[i], sets.bank[int(few.indices[i])]) for i in range(5))


def test_an_unreadable_ct_is_an_error_or_is_left_out_and_counted(scans, tmp_path, caplog):
    bad = tmp_path / "bad.nii.gz"
    bad.write_bytes(b"no volume")
    volumes = [VolumeRef(str(bad)), find_scans([str(scans)])["train"][0].volumes[0]]
    cache = SliceCache(tmp_path / "cache", SamfImageProcessor(size=16, slices_per_plane=2))
    with pytest.raises(ValueError, match="bad.nii.gz"):
        fill_slice_cache(cache, volumes)
    (tmp_path / "annexed.nii.gz").symlink_to(tmp_path / "nowhere")
    volumes.insert(1, VolumeRef(str(tmp_path / "annexed.nii.gz")))
    assert fill_slice_cache(cache, volumes, on_error="skip") == volumes[2:]
    assert "2 of 3 volumes couldn't be read" in caplog.text
    for stop in ("raise", "stop", "error"):  # the others are older names
        with pytest.raises(ValueError, match=r"annexed\.nii\.gz"):
            fill_slice_cache(cache, volumes[1:], stop)
    with pytest.raises(ValueError, match="expected 'raise' or 'skip'"):
        fill_slice_cache(cache, volumes, "ignore")


def test_a_cache_of_several_settings_is_an_error(scans, tmp_path):
    path = find_scans([str(scans)])["train"][0].volumes[0].path
    files = []
    for size in (16, 32):
        cache = SliceCache(tmp_path, SamfImageProcessor(size=size, slices_per_plane=2))
        cache.get(path)
        files.append(cache.entry_path(path))
    with pytest.raises(ValueError, match="several settings"):
        VolumeSlices(files, 4)


def test_files_are_written_whole_or_not_at_all(tmp_path):
    (tmp_path / "a").write_text("old", encoding="utf-8")
    with pytest.raises(RuntimeError), atomic_update(tmp_path) as folder:
        (folder / "a").write_text("new", encoding="utf-8")
        raise RuntimeError
    assert (tmp_path / "a").read_text(encoding="utf-8") == "old" and len(list(tmp_path.iterdir())) == 1


def test_schedules_of_the_teachers_temperature():
    model = DinoModel(encoder(), SMALL)
    schedules = DinoSchedules(model, DinoArguments(teacher_temp_start=0.04, teacher_temp=0.07, teacher_temp_warmup=0.5))
    optimizer = torch.optim.AdamW(model.student.parameters(), weight_decay=0.0)
    temperatures = []
    for step in (0, 5, 10, 20):
        state = type("State", (), {"global_step": step, "max_steps": 20})()
        schedules.on_step_begin(type("Args", (), {"weight_decay": 0.0})(), state, None, optimizer=optimizer)
        temperatures.append(model.teacher_temp)
    assert temperatures == pytest.approx([0.04, 0.055, 0.07, 0.07])
