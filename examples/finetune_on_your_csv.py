"""Fine-tune a SAMF model on reports of your own: a CSV with the columns `volume`, `report` and `patient`.

    python examples/finetune_on_your_csv.py runs/demo/model reports.csv --output runs/finetuned

LoRA on the language model's attention, the fusion and the aggregator in full. `train.py` does the same with caches, several
processes, monitoring and resuming. For research only, not for diagnosis.
"""

# %% Arguments
import argparse
import csv
from pathlib import Path

from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from samf import SamfForConditionalGeneration, SamfProcessor
from samf.data.collator import SamfCollator
from samf.data.prompts import REPORT_QUESTION

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("model", help="folder or Hub id of a SAMF model")
parser.add_argument("csv", type=Path, help="paths in `volume` are relative to the CSV's folder")
parser.add_argument("--output", default="runs/finetuned")
parser.add_argument("--epochs", type=float, default=3)
parser.add_argument("--layers", default=r".*language_model.*\.(qkv_proj|o_proj)", help="adapted layers")
args = parser.parse_args()

# %% One record per row, and the last fifth of the patients for validation: no patient is in both parts.
with open(args.csv, encoding="utf-8", newline="") as file:
    rows = list(csv.DictReader(file))
patients = sorted({row["patient"] for row in rows})
held_out = set(patients[-max(1, len(patients) // 5) :])
parts = {"train": [], "valid": []}
for number, row in enumerate(rows):
    record = {"id": str(number), "task": "report", "question": REPORT_QUESTION, "choices": None}
    record |= {"volume": str(args.csv.parent / row["volume"]), "answer": row["report"]}
    parts["valid" if row["patient"] in held_out else "train"].append(record)

# %% The model with its adapter
processor = SamfProcessor.from_pretrained(args.model)
model = SamfForConditionalGeneration.from_pretrained(args.model)
lora = LoraConfig(r=16, lora_alpha=32, target_modules=args.layers, modules_to_save=["fusion", "aggregator"])
model = get_peft_model(model, lora)
model.print_trainable_parameters()

# %% Train. The collator reads each volume when its record is due; the processor's prompt mask hides answers from the fusion.
training = TrainingArguments(
    args.output, num_train_epochs=args.epochs, learning_rate=2e-4, eval_strategy="epoch", report_to="none",
    per_device_train_batch_size=1, gradient_accumulation_steps=4, remove_unused_columns=False,
)  # fmt: skip
collator = SamfCollator(processor, max_length=1024)
Trainer(model, training, collator, parts["train"], parts["valid"], processing_class=processor).train()

# %% Save the merged model with its processor: a folder that `from_pretrained` loads.
model.merge_and_unload().save_pretrained(args.output)
processor.save_pretrained(args.output)
