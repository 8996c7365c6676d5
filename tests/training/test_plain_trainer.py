"""The library's own Trainer, peft and TRL on a SAMF model, without this project's Trainer."""

import re
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny import IMAGE_ID, model_for, tiny_batch, tiny_model, tiny_processor
from transformers import Trainer, TrainingArguments

from samf.training.trainer import SamfTrainer

REPOSITORY = Path(__file__).resolve().parents[2]
QUIET = {"report_to": "none", "use_cpu": True, "disable_tqdm": True, "remove_unused_columns": False}
PROMPT = "Which finding is present?"
ANSWERS = ("emphysema", "cardiomegaly", "consolidation")


@pytest.fixture(scope="module")
def processor():
    return tiny_processor()


def volume(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1000, 400, (12, 14, 16)).astype(np.int16)


def messages(answer: str, seed: int = 0) -> list[dict]:
    question = [{"type": "volume", "volume": volume(seed)}, {"type": "text", "text": PROMPT}]
    return [
        {"role": "user", "content": question},
        {"role": "assistant", "content": [{"type": "text", "text": answer}]},
    ]


def in_peft(model):
    return get_peft_model(model, LoraConfig(target_modules=["qkv_proj"], r=2))


def batches(rows: int = 4) -> list[dict[str, torch.Tensor]]:
    """Return single rows that a collator can stack."""
    batch = tiny_batch("ao2d", rows=rows)
    return [{name: value[row] for name, value in batch.items()} for row in range(rows)]


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def trainer_for(model, folder: Path, metrics=None, rows: list | None = None, kind=Trainer, **options) -> Trainer:
    args = TrainingArguments(folder, **QUIET, **options)
    rows = rows or batches()
    return kind(model, args, data_collator=stack, train_dataset=rows, eval_dataset=rows, compute_metrics=metrics)


def test_the_documented_trainer_example_runs_and_keeps_its_best_model(processor, tmp_path, monkeypatch):
    """The block of docs/howto/train.md, as it is printed, on three records."""
    page = (REPOSITORY / "docs" / "howto" / "train.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(from transformers import Trainer.*?)```", page, re.S)
    monkeypatch.chdir(tmp_path)
    rows = [{"messages": messages(answer, seed)} for seed, answer in enumerate(ANSWERS)]
    names = {"model": model_for(processor), "processor": processor, "train": rows, "valid": rows[:2]}
    exec(code.group(1), names)
    trainer = names["trainer"]
    evaluations = [row for row in trainer.state.log_history if "eval_loss" in row]
    best = min(row["eval_loss"] for row in evaluations)
    assert len(evaluations) == 3 and all(0 <= row["eval_accuracy"] <= 1 for row in evaluations)
    assert trainer.state.best_metric == best < evaluations[0]["eval_loss"]
    with torch.no_grad():
        assert trainer.model.eval()(**names["collate"](rows[:2])).loss.item() == pytest.approx(best, abs=1e-5)


@pytest.mark.parametrize("wrap", [lambda model: model, in_peft], ids=["model", "peft"])
@pytest.mark.parametrize("finding_names", [(), ("a", "b")])
def test_predictions_are_the_logits_and_every_batch_has_a_loss(wrap, finding_names, tmp_path):
    model, rows, seen = wrap(tiny_model(finding_names=finding_names)), batches(), []
    trainer = trainer_for(model, tmp_path, lambda prediction: seen.append(prediction) or {"called": 1}, rows)
    result = trainer.evaluate()
    with torch.no_grad():
        expected = model.eval()(**stack(rows))
    assert result["eval_called"] == 1 and result["eval_loss"] == pytest.approx(expected.loss.item(), abs=1e-5)
    np.testing.assert_allclose(seen[0].predictions, expected.logits.numpy(), atol=1e-5)
    np.testing.assert_allclose(trainer.predict(rows).predictions, expected.logits.numpy(), atol=1e-5)


@pytest.mark.parametrize("wrap", [lambda model: model, in_peft], ids=["model", "peft"])
def test_label_smoothing_is_that_of_the_next_token(wrap, tmp_path):
    """The loss is, by sums over rows and positions, (1 - e) -log p(next) + e mean over the vocabulary of -log p."""
    model, smoothing = wrap(tiny_model(aggregator_dropout=0.0)), 0.1
    batch = stack(batches(rows=2)) | {"prompt_mask": tiny_batch("ao2d")["labels"] == -100}
    trainer = trainer_for(model, tmp_path, label_smoothing_factor=smoothing)
    with torch.no_grad():
        loss = trainer.compute_loss(model, dict(batch)).item()
        log_probs = model(**batch).logits.double().log_softmax(-1)
    terms = []
    for row in range(2):
        for place in range(1, batch["labels"].shape[1]):
            label = batch["labels"][row, place].item()
            if label != -100:
                here = -log_probs[row, place - 1]
                terms.append((1 - smoothing) * here[label].item() + smoothing * here.mean().item())
    assert loss == pytest.approx(np.mean(terms), rel=1e-5)


def test_a_subclass_and_a_sharded_model_are_smoothed_too():
    """Trainer recognises models whose labels it shifts by class name, which FSDP2 and subclasses change."""

    class Renamed(type(tiny_model())):
        pass

    assert Renamed(tiny_model().config)._get_name() == "SamfForConditionalGeneration"


@pytest.mark.parametrize("own_loss", [False, True])
def test_a_loss_outside_the_model_needs_the_prompt_mask(own_loss, tmp_path):
    """Trainer removes the labels, so the model can't tell where the answer starts: it must neither read it nor guess."""

    def cross_entropy(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())

    model = tiny_model(aggregator_dropout=0.0).train()
    trainer = trainer_for(model, tmp_path, label_smoothing_factor=0.0 if own_loss else 0.1)
    trainer.compute_loss_func = cross_entropy if own_loss else None
    batch = stack(batches(rows=2))
    with pytest.raises(ValueError, match="neither labels nor prompt_mask"):
        trainer.compute_loss(model, dict(batch))
    fused = []
    model.model.fusion.register_forward_hook(lambda module, inputs, output: fused.append(output[0].detach()))
    for _ in range(2):
        trainer.compute_loss(model, batch | {"prompt_mask": batch["labels"] == -100})
        batch["input_ids"] = batch["input_ids"].where(batch["labels"] == -100, 7)  # another answer
    assert torch.equal(*fused)
    with pytest.raises(ValueError, match="drop the findings' loss"):
        more = {"prompt_mask": batch["labels"] == -100, "finding_targets": torch.ones(2, 1)}
        trainer.compute_loss(model, batch | more)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize(
    ("kind", "shares"),
    [(Trainer, [5 / 14, 4 / 14, 3 / 14, 2 / 14]), (SamfTrainer, [1 / 3, 1 / 3, 0, 1 / 3])],
    ids=["by label tokens", "by rows with findings"],
)
def test_a_training_step_is_one_step_however_it_is_split(size, kind, shares, tmp_path):
    """Return gradients of four rows with unknown findings and answers of different lengths, by Trainer's own accumulation."""
    rows = batches()
    for index, (row, targets) in enumerate(zip(rows, [[1, 0], [0, -100], [-100, -100], [1, 1]], strict=True)):
        row["labels"][: 11 + index] = -100
        row["finding_targets"] = torch.tensor(targets)
    model = tiny_model(finding_names=["a", "b"], aggregator_dropout=0.0, finding_loss_weight=3.0)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 4 // size, "max_steps": 1}
    options |= {"optim": "sgd", "learning_rate": 0.1, "lr_scheduler_type": "constant", "max_grad_norm": 1e9}
    trainer_for(model, tmp_path, rows=rows, kind=kind, save_strategy="no", **options).train()
    reference = tiny_model(finding_names=["a", "b"], aggregator_dropout=0.0, finding_loss_weight=3.0).train()
    output = reference(**{name: value for name, value in stack(rows).items() if name != "finding_targets"})
    probabilities, total = output.finding_logits.sigmoid(), 0.0
    for row, known in zip(range(4), [[(0, 1), (1, 0)], [(0, 0)], [], [(0, 1), (1, 1)]], strict=True):
        for column, truth in known:
            p = probabilities[row, column]
            total = total - (p.log() if truth else (1 - p).log()) / 2 * shares[row]
    (output.loss + 3.0 * total).backward()
    for name, parameter in reference.named_parameters():
        moved = (start[name] - model.state_dict()[name]) / 0.1
        torch.testing.assert_close(moved, parameter.grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.fixture
def sft():
    trl = pytest.importorskip("trl", reason="TRL is not a part of the test extra")
    return SimpleNamespace(Trainer=trl.SFTTrainer, Config=trl.SFTConfig)


def sft_rows(folder: Path, in_blocks: bool) -> datasets.Dataset:
    import nibabel

    rows = []
    for seed, answer in enumerate(ANSWERS):
        path = folder / f"{seed}.nii.gz"
        nibabel.save(nibabel.Nifti1Image(volume(seed), np.eye(4)), path)
        block = {"type": "volume", "path": str(path)} if in_blocks else {"type": "image"}
        content = [block, {"type": "text", "text": PROMPT}]
        answer_content = [{"type": "text", "text": answer}]
        row = {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": answer_content}]}
        rows.append(row if in_blocks else {**row, "images": [str(path)]})
    return datasets.Dataset.from_list(rows)


def test_trl_trains_seeing_where_an_images_column_names_the_volumes(sft, processor, tmp_path):
    model = model_for(processor)
    config = sft.Config(tmp_path / "run", **QUIET, max_steps=2, assistant_only_loss=True, max_length=None, bf16=False)
    before = model.model.slice_encoder.embeddings.cls_token.detach().clone()
    fused = []
    model.model.fusion.register_forward_hook(lambda module, inputs, output: fused.append(inputs[4].sum(1).tolist()))
    trainer = sft.Trainer(model, config, train_dataset=sft_rows(tmp_path, False), processing_class=processor)
    trainer.train()
    assert not torch.equal(before, model.model.slice_encoder.embeddings.cls_token)
    prompt = processor.apply_chat_template(
        messages("x")[:1], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text_tokens = (prompt["input_ids"] != processor.image_token_id).sum().item()
    assert fused and all(count == text_tokens for counts in fused for count in counts)


def test_trl_without_the_column_says_how(sft, processor, tmp_path):
    config = sft.Config(tmp_path / "run", **QUIET, max_steps=1, max_length=None, bf16=False)
    with pytest.raises(ValueError, match="images"):
        sft.Trainer(
            model_for(processor), config, train_dataset=sft_rows(tmp_path, True), processing_class=processor
        ).train()


def test_the_processors_own_call_tells_the_prompt_from_the_answer(processor):
    """The mask is that of the same conversation through the chat template; ambiguous texts get no mask."""
    chats = [messages(answer, seed) for seed, answer in enumerate(ANSWERS)]
    texts = processor.apply_chat_template(chats)
    volumes = [volume(seed) for seed in range(3)]
    expected = processor.apply_chat_template(
        chats, tokenize=True, return_dict=True, return_tensors="pt", processor_kwargs={"padding": True}
    )
    batch = processor(volumes=volumes, text=texts, padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["prompt_mask"], expected["prompt_mask"]) and not batch["prompt_mask"].all()
    left = processor(volumes=volumes, text=texts, padding=True, padding_side="left", return_tensors="pt")
    for row in range(3):
        ids = [inputs["input_ids"][row][inputs["prompt_mask"][row]] for inputs in (batch, left)]
        assert torch.equal(*ids)
    prompts = [text.split("<|assistant|>\n")[0] + "<|assistant|>\n" for text in texts]
    for text in (prompts, [f"<image> {PROMPT} {answer}" for answer in ANSWERS], [texts[0], "<image> a", "<image> b"]):
        assert "prompt_mask" not in processor(volumes=volumes, text=text, padding=True, return_tensors="pt")
    earlier = "<|user|>\nHello<|end|>\n<|assistant|>\nSend the CT.<|end|>\n" + texts[0]
    late = processor(volumes=volumes[:1], text=earlier, return_tensors="pt")
    read = processor.tokenizer.decode(late["input_ids"][0][late["prompt_mask"][0]])
    assert "Hello" in read and PROMPT in read and "Send" not in read and "emphysema" not in read


def test_a_prompt_without_its_volume_is_an_error_everywhere(processor):
    model = tiny_model()
    batch = tiny_batch("ao2d")
    text = {name: batch[name] for name in ("input_ids", "attention_mask")}
    calls = {
        "forward": lambda: model(**text),
        "loss": lambda: model(**text, labels=batch["labels"]),
        "SamfModel": lambda: model.model(**text),
        "generate": lambda: model.generate(**text, max_new_tokens=2),
        "misspelt": lambda: model(**text, pixel_value=batch["pixel_values"]),
    }
    for name, call in calls.items():
        with pytest.raises(ValueError, match="no volume came with them") as error:
            call()
        assert ("pixel_value" in str(error.value).split("Pass all")[0]) is (name == "misspelt")
    text["input_ids"] = text["input_ids"].masked_fill(text["input_ids"] == IMAGE_ID, 7)
    model(**text)
