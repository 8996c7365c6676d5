"""Counting the tokens that a model would have chosen itself."""

import copy

import numpy as np
import torch
from tiny import model_for, tiny_processor

from samf import CTVolume, SamfReportPipeline
from samf.experiments.quantized_agreement import GivenTokens, count_choices


def test_given_tokens_are_written_and_own_choices_counted():
    scores = torch.randn(6, 1, 10, generator=torch.Generator().manual_seed(0))
    own = scores[:, 0].argmax(dim=1)
    tokens = torch.where(torch.arange(6) % 3 == 0, (own + 1) % 10, own)  # two of six differ
    given = GivenTokens(tokens, start=4)
    for step, row in enumerate(scores):
        forced = given(torch.zeros(1, 4 + step, dtype=torch.long), row)
        assert forced.softmax(dim=1)[0, tokens[step]] == 1
    assert given.same == 4


def test_a_model_agrees_with_itself_and_its_opposite_never_does():
    processor = tiny_processor()
    model = model_for(processor).eval()
    model.generation_config.max_new_tokens = model.generation_config.min_new_tokens = 5
    opposite = copy.deepcopy(model)
    opposite.get_output_embeddings().weight.data.neg_()
    reporter = SamfReportPipeline(model=model, processor=processor, device=torch.device("cpu"))
    hu = np.random.default_rng(0).integers(-1000, 400, (20, 18, 16)).astype(np.int16)
    scan = CTVolume(hu, (4.0, 4.0, 5.0), np.diag([4.0, 4.0, 5.0, 1.0]), "noise")
    same, tokens = count_choices({"itself": copy.deepcopy(model), "opposite": opposite}, reporter, scan)
    assert (same, tokens) == ({"itself": 5, "opposite": 0}, 5)
