"""Stage 2: runs of two planes of one scan are positive pairs; the weights load into a SAMF model unchanged."""

import shutil

import numpy as np
import pytest
import torch
from launch import logged, run_script
from tiny import tiny_model
from transformers import AutoModel, TrainingArguments, ViTConfig, ViTModel, set_seed

from samf import SamfImageProcessor, warmup_aggregator
from samf.cache.slice_cache import read_entry
from samf.model.ct_volume import VolumeRef
from samf.phantoms.dataset import make_phantom, write_nifti
from samf.pretraining.contrastive import (
    ContrastTrainer,
    PlaneContrast,
    PlanePairs,
    build_slices_model,
    half,
    select_slices,
)
from samf.pretraining.scans import Scan
from samf.training.aggregator_weights import load_aggregator, save_aggregator
from samf.training.checkpoints import last_checkpoint

pytest.importorskip("lightly", reason="the warm-up needs lightly: pip install 'lightly>=1.6'")

WIDTH = 16


class Embeddings:
    """Five slices per plane; the first number of an embedding is its scan, the second its place; the rest resembles its scan.

    noise: how much a slice differs from its scan.
    """

    def __init__(self, noise: float = 0.1):
        self.noise = noise

    def get(self, volume):
        number = int(volume.path.split("-")[0])
        planes = np.repeat(np.arange(3), 5)
        rng = np.random.default_rng(number)
        embeddings = np.tile(rng.normal(size=WIDTH), (15, 1)) + self.noise * rng.normal(size=(15, WIDTH))
        if self.noise < 1:
            embeddings[:, 0], embeddings[:, 1] = number, np.arange(15)
        return {
            "slice_embeddings": embeddings.astype(np.float32),
            "slice_planes": planes,
            "slice_positions": np.tile((np.arange(5, dtype=np.float32) + 0.5) / 5, 3),
        }


def scans(count: int = 12, volumes: int = 1) -> list[Scan]:
    return [Scan(f"{i}", f"{i}", tuple(VolumeRef(f"{i}-{v}") for v in range(volumes))) for i in range(count)]


@pytest.fixture(scope="module")
def slice_encoder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slice_encoder")
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=32,
        patch_size=16,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    ViTModel(config).save_pretrained(folder)
    SamfImageProcessor(size=32, slices_per_plane=4).save_pretrained(folder)
    return folder


def slices_model(folder, dropout: float = 0.0, **settings):
    torch.manual_seed(1)
    options = {
        "volume_dim": 8,
        "aggregator_num_heads": 2,
        "aggregator_ffn_dim": 24,
        "initializer_range": 0.2,
        **settings,
    }
    model = build_slices_model(str(folder), "float32", aggregator_dropout=dropout, **options)
    model.slice_encoder = None
    return model


def trainer(
    folder, slice_encoder, dropout: float = 0.0, noise: float = 0.1, count: int = 12, **options
) -> ContrastTrainer:
    options = {
        "per_device_train_batch_size": 4,
        "max_steps": 6,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_steps": 2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "remove_unused_columns": False,
        **options,
    }
    set_seed(0)
    return ContrastTrainer(
        slices_model(slice_encoder, dropout),
        TrainingArguments(str(folder), **options),
        train=scans(count),
        valid=scans(count),
        embeddings=Embeddings(noise),
        run=3,
        temperature=0.1,
    )


def losses(run: ContrastTrainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


# ---- pairs ---------------------------------------------------------------------------------------------------------


def test_a_pair_is_two_runs_of_adjacent_slices_from_two_planes_of_one_scan():
    pairs = PlanePairs(scans(3), Embeddings(), run=3, seed=0)
    starts, planes = set(), set()
    for epoch in range(40):
        item = pairs[epoch, 1]
        assert item["slice_embeddings"].shape == (2, 3, WIDTH) and item["slice_mask"].all()
        assert (item["slice_embeddings"][..., 0] == 1).all()  # of scan 1
        places = item["slice_embeddings"][..., 1]
        assert (places.diff(dim=1) == 1).all()
        assert (item["slice_planes"] == item["slice_planes"][:, :1]).all()
        assert item["slice_planes"][0, 0] != item["slice_planes"][1, 0]
        assert (places // 5 == item["slice_planes"]).all()
        starts |= set((places[:, 0] % 5).int().tolist())
        planes.add(tuple(item["slice_planes"][:, 0].tolist()))
    assert starts == {0, 1, 2} and len(planes) == 6


def test_pairs_follow_from_seed_epoch_and_index_and_take_any_reconstruction():
    class Paths(Embeddings):
        def get(self, volume):
            number = int(volume.path.split("-")[1])
            return super().get(volume) | {"slice_embeddings": np.full((15, WIDTH), number, np.float32)}

    pairs = PlanePairs(scans(2, volumes=2), Paths(), run=2, seed=0)
    assert all(torch.equal(pairs[2, 1][name], pairs[2, 1][name]) for name in pairs[2, 1])
    assert {float(pairs[epoch, 0]["slice_embeddings"].max()) for epoch in range(20)} == {0.0, 1.0}
    for epoch in range(20):  # both runs of a pair come from one reconstruction
        assert pairs[epoch, 0]["slice_embeddings"].unique().numel() == 1


def test_a_plane_with_too_few_slices_is_padded():
    item = PlanePairs(scans(1), Embeddings(), run=7, seed=0)[0, 0]
    assert item["slice_mask"].tolist() == [[True] * 5 + [False] * 2] * 2
    assert (item["slice_embeddings"][:, 5:] == 0).all() and item["slice_positions"].dtype == torch.float32


def test_one_plane_makes_no_pair():
    class OnePlane(Embeddings):
        def get(self, volume):
            return super().get(volume) | {"slice_planes": np.zeros(15, np.int64)}

    with pytest.raises(ValueError, match="one plane only"):
        PlanePairs(scans(1), OnePlane(), run=3, seed=0)[0, 0]


@pytest.mark.parametrize("kind", ["interleaved", "contiguous"])
def test_halves_share_no_slice_and_make_the_whole(kind):
    record = Embeddings().get(VolumeRef("0-0"))
    first, second = half(record, 0, kind), half(record, 1, kind)
    assert sorted([*first, *second]) == list(range(15))
    for places in (first, second):
        assert set(record["slice_planes"][places]) == {0, 1, 2}
    if kind == "contiguous":
        assert record["slice_positions"][first].max() < 0.5 <= record["slice_positions"][second].min()
    else:
        assert list(first[:3]) == [0, 2, 4]


# ---- the loss ------------------------------------------------------------------------------------------------------


def test_loss_is_infonce_by_plain_loops(slice_encoder):
    model = slices_model(slice_encoder).eval()
    contrast = PlaneContrast(model, temperature=0.2).eval()
    pairs = PlanePairs(scans(3), Embeddings(), run=3, seed=0)
    items = [pairs[0, row] for row in range(3)]
    batch = {name: torch.stack([item[name] for item in items]) for name in items[0]}
    z = []  # 2·scan + run
    with torch.no_grad():
        for item in items:
            for run in range(2):
                alone = {name: view[run : run + 1] for name, view in item.items()}
                z.append(model.get_image_features(**alone).pooler_output[0, 0].double().numpy())
        loss = contrast(**batch)["loss"].item()
    z = [row / np.linalg.norm(row) for row in z]
    terms = []
    for i in range(6):
        scores = {j: np.exp(z[i] @ z[j] / 0.2) for j in range(6) if j != i}
        terms.append(-np.log(scores[i ^ 1] / sum(scores.values())))
    assert loss == pytest.approx(np.mean(terms), rel=1e-4)


def test_padding_does_not_change_a_volume(slice_encoder):
    model = slices_model(slice_encoder).eval()
    record = Embeddings().get(VolumeRef("3-0"))
    short, padded = (select_slices(record, np.arange(4), length) for length in (4, 9))
    with torch.no_grad():
        first, second = (
            model.get_image_features(**{name: view[None] for name, view in views.items()}).pooler_output
            for views in (short, padded)
        )
    torch.testing.assert_close(first, second)


# ---- runs ----------------------------------------------------------------------------------------------------------


def test_training_raises_retrieval_and_touches_aggregator_and_positions_alone(tmp_path, slice_encoder):
    options = {"max_steps": 40, "save_strategy": "no", "learning_rate": 1e-2, "per_device_train_batch_size": 16}
    run = trainer(tmp_path, slice_encoder, noise=1.5, count=32, **options)
    before = {name: tensor.clone() for name, tensor in run.samf.state_dict().items()}
    untrained = run.evaluate()
    run.train()
    trained = run.evaluate()
    assert np.mean(losses(run)[-5:]) < np.mean(losses(run)[:5])
    assert trained["eval_retrieval_contiguous"] > untrained["eval_retrieval_contiguous"] + 0.1
    changed = {name.split(".")[0] for name, t in run.samf.state_dict().items() if not torch.equal(t, before[name])}
    assert changed == {"aggregator", "slice_position"}


def test_a_run_goes_on_where_it_was_cut_off(tmp_path, slice_encoder):
    """With dropout, so that the random state matters too; step 4 of 6 is in the middle of the second epoch."""
    run = trainer(tmp_path / "unbroken", slice_encoder, dropout=0.1)
    run.train()
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-4", tmp_path / "broken" / "checkpoint-4")
    resumed = trainer(tmp_path / "broken", slice_encoder, dropout=0.1)
    resumed.train(resume_from_checkpoint=last_checkpoint(tmp_path / "broken"))
    assert losses(resumed)[-2:] == losses(run)[-2:]
    for name, tensor in run.samf.state_dict().items():
        assert torch.equal(tensor, resumed.samf.state_dict()[name]), name


@pytest.fixture(scope="module")
def cts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cts")
    for patient in range(10):
        phantom = make_phantom(np.random.default_rng(patient), voxel_mm=20.0)
        write_nifti(phantom, folder / f"train_{patient + 1}_a_1.nii.gz")
    return folder


def script_options(slice_encoder, cts, folder, **options) -> dict:
    """Write ten scans, of which two are held out: two steps of four per epoch."""
    return {
        "slice_encoder": slice_encoder,
        "data": cts,
        "output_dir": folder,
        "slice_cache": folder.parent / "cache",
        "valid_share": 0.2,
        "volume_dim": 8,
        "aggregator_num_heads": 2,
        "aggregator_ffn_dim": 24,
        "aggregator_dropout": 0.0,
        "adjacent_slices": 2,
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "eval_on_start": True,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **options,
    }


@pytest.fixture(scope="module")
def warmed(tmp_path_factory, slice_encoder, cts):
    """Run the script and return its folder."""
    folder = tmp_path_factory.mktemp("warmed") / "run"
    options = script_options(slice_encoder, cts, folder)
    warmup_aggregator.main([f"--{key}={value}" for key, value in options.items()])
    return folder


def test_the_script_ends_in_weights_that_a_model_takes(warmed, slice_encoder):
    model = build_slices_model(
        str(slice_encoder), "float32", volume_dim=8, aggregator_num_heads=2, aggregator_ffn_dim=24
    )
    load_aggregator(model, warmed)
    again = build_slices_model(
        str(slice_encoder), "bfloat16", volume_dim=8, aggregator_num_heads=2, aggregator_ffn_dim=24
    )
    load_aggregator(again, warmed)
    for part in ("aggregator", "slice_position"):
        for name, tensor in getattr(model, part).state_dict().items():
            assert torch.equal(getattr(again, part).state_dict()[name], tensor.bfloat16()), name
    assert len(logged(warmed, "eval_retrieval_interleaved")) == 2  # untrained, and at the end


def test_saved_weights_come_back_in_a_conditional_generation_model(tmp_path):
    first, second = tiny_model(seed=0), tiny_model(seed=1)
    inputs = {
        "slice_embeddings": torch.randn(2, 6, 32),
        "slice_planes": torch.arange(6).expand(2, 6) % 3,
        "slice_positions": torch.rand(2, 6),
    }
    save_aggregator(first, tmp_path)
    with torch.no_grad():
        expected = first.get_image_features(**inputs).pooler_output
        assert not torch.allclose(second.get_image_features(**inputs).pooler_output, expected)
        load_aggregator(second, tmp_path)
        assert torch.equal(second.get_image_features(**inputs).pooler_output, expected)
    load_aggregator(tiny_model(slice_position_scope="all"), tmp_path)


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"volume_dim": 24}, "volume_dim: 16 there, 24 here"),
        ({"aggregator_num_heads": 2}, "aggregator_num_heads: 8 there, 2 here"),
        ({"aggregator_norm": "pre"}, "aggregator_norm"),
        ({"slice_position_scope": "none"}, "slice_positions: True there, False here"),
    ],
)
def test_an_aggregator_made_otherwise_is_an_error(tmp_path, settings, named):
    save_aggregator(tiny_model(), tmp_path)
    with pytest.raises(ValueError, match=named):
        load_aggregator(tiny_model(**settings), tmp_path)


def test_a_folder_without_an_aggregator_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="warmup_aggregator.py"):
        load_aggregator(tiny_model(), tmp_path)


def test_slices_and_their_embeddings_are_kept(warmed, slice_encoder):
    """Each of ten scans has an entry of slices and one of embeddings, which equals the encoder's output."""
    records = [read_entry(file) for file in sorted((warmed.parent / "cache").glob("??/*.safetensors"))]
    slices, embeddings = ([r for r in records if name in r] for name in ("slices", "slice_embeddings"))
    assert (len(slices), len(embeddings)) == (10, 10)
    processor = SamfImageProcessor.from_pretrained(slice_encoder)
    encoder = AutoModel.from_pretrained(slice_encoder).eval()
    with torch.no_grad():
        pixels = processor([dict(record) for record in slices])["pixel_values"].flatten(0, 1)
        expected = encoder(pixels).last_hidden_state[:, 0].unflatten(0, (10, -1)).numpy()
    for record in embeddings:
        assert np.abs(expected - record["slice_embeddings"]).max(axis=(1, 2)).min() < 1e-5


@pytest.mark.slow
def test_two_processes_are_one_at_equal_batch(tmp_path, slice_encoder, cts):
    """Negatives come from both processes: otherwise the loss would be lower with two."""
    options = script_options(slice_encoder, cts, tmp_path / "one", max_steps=20)
    run_script("warmup_aggregator.py", 1, options)
    run_script("warmup_aggregator.py", 2, options | {"output_dir": tmp_path / "two", "per_device_train_batch_size": 2})
    one, two = logged(tmp_path / "one"), logged(tmp_path / "two")
    assert len(one) == 20
    np.testing.assert_allclose(one, two, atol=1e-4)
    assert logged(tmp_path / "one", "eval_retrieval_contiguous") == logged(
        tmp_path / "two", "eval_retrieval_contiguous"
    )
