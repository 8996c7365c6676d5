"""Do weights of 4 and 8 bits choose the same tokens as float32? Measured on reports of held-out phantoms.

    python -m samf.experiments.quantized_agreement --patients 12

The float32 model writes each phantom's report greedily. Each quantised model then writes the same report, token by token,
and agrees with a token where that is its own most probable one, so that one other choice doesn't change all that follow.
Slice embeddings are float32's for all. The products are those that this processor uses, and are printed with the counts.
"""

import argparse
import copy
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, LogitsProcessorList
from transformers.utils import logging

from samf import CTVolume, SamfForConditionalGeneration, SamfProcessor, SamfQuantizationConfig, SamfReportPipeline
from samf.evaluation.markdown import markdown_table
from samf.model.quantization_samf import describe_quantization, quantize
from samf.model.report_samf import REPORT_QUESTION
from samf.phantoms.plan import PhantomSettings, plan_patient, reconstruction_seed
from samf.phantoms.volume import render_phantom
from samf.utils.packaged import DEMO_MODEL

_WEIGHTS = {
    "float32, read again": None,
    "int8": SamfQuantizationConfig(bits=8),
    "int4": SamfQuantizationConfig(bits=4),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m samf.experiments.quantized_agreement",
        description=(__doc__ or "").partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", default=str(DEMO_MODEL), help="folder or Hub id")
    parser.add_argument("--patients", type=int, default=12, help="phantoms")
    parser.add_argument(
        "--seed", type=int, default=1000, help="of the phantoms; the demo model has seen those of seed 0"
    )
    parser.add_argument("--voxel_mm", type=float, default=5.0, help="mean voxel edge of the phantoms")
    return parser.parse_args(argv)


def phantoms(args: argparse.Namespace) -> Iterator[CTVolume]:
    """Yield the first scan of each phantom."""
    settings = PhantomSettings(seed=args.seed, voxel_mm=args.voxel_mm)
    for patient in tqdm(range(1, args.patients + 1), desc="phantoms"):
        scan = plan_patient(settings, "valid", patient)[0]
        phantom = render_phantom(
            scan.findings, **scan.seeds, recon=reconstruction_seed(scan, 0), voxel_mm=settings.voxel_mm
        )
        yield CTVolume(phantom.hu, phantom.spacing, phantom.affine, "phantom")


class GivenTokens(LogitsProcessor):
    """Lets `generate` write given tokens, and counts those that the model would have chosen itself.

    Args:
        tokens: (T,).
        start: length of the prompt.
    """

    def __init__(self, tokens: torch.Tensor, start: int):
        self.tokens, self.start, self.same = tokens, start, 0

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Return scores (1, vocabulary) of the next given token alone."""
        token = int(self.tokens[input_ids.shape[1] - self.start])
        self.same += int(scores.argmax()) == token
        forced = torch.full_like(scores, -torch.inf)
        forced[:, token] = 0
        return cast(torch.FloatTensor, forced)


@torch.inference_mode()
def count_choices(
    models: Mapping[str, SamfForConditionalGeneration], reporter: SamfReportPipeline, scan: CTVolume
) -> tuple[dict[str, int], int]:
    """Return how many tokens of the float32 model's report are each model's own choice, and how many there are.

    Args:
        models: by name.
        reporter: the float32 model's pipeline.
        scan: the scan.
    """
    inputs = reporter.prompts([(reporter.encode(scan), REPORT_QUESTION)])
    start = inputs["input_ids"].shape[1]
    report = reporter.model.generate(**inputs, do_sample=False)[0, start:]
    same = {}
    for name, model in models.items():
        given = GivenTokens(report, start)
        processors = LogitsProcessorList([given])
        model.generate(**inputs, max_new_tokens=len(report), do_sample=False, logits_processor=processors)
        same[name] = given.same
    return same, len(report)


def main(argv: Sequence[str] | None = None) -> None:
    """Print one row per type of the weights."""
    args = parse_args(argv)
    logging.set_verbosity_error()
    whole = SamfForConditionalGeneration.from_pretrained(args.model, dtype=torch.float32).eval()
    processor = SamfProcessor.from_pretrained(args.model)
    reporter = SamfReportPipeline(model=whole, processor=processor, device=torch.device("cpu"))
    models = {
        name: whole if config is None else quantize(copy.deepcopy(whole), config) for name, config in _WEIGHTS.items()
    }
    same, tokens = Counter[str](), 0
    for scan in phantoms(args):
        own, length = count_choices(models, reporter, scan)
        same.update(own)
        tokens += length
    rows = [
        [name, f"{same[name]:,} of {tokens:,}", describe_quantization(model) or ""] for name, model in models.items()
    ]
    sys.stdout.write(markdown_table(["weights", "the same token", "products"], rows) + "\n")


if __name__ == "__main__":
    main()
