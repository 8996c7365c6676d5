"""Benchmarks of the model: parameters, and speed of slice encoder, fusion, prefill and decoding.

Shapes: B volumes, S slices, T tokens, d = d_proj.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from samf.benchmarks.measuring import Measurement, ratios
from samf.benchmarks.workloads import TINY_TEXT, Settings, conversation_batch, fill, generate, random_model, slice_stack
from samf.model.image_tokens_samf import place_image_tokens
from samf.model.modeling_samf import SamfForConditionalGeneration, SamfModel
from samf.model.modules_samf import SamfFusion, attend, masked_mean


def count_parameters(settings: Settings) -> list[Measurement]:
    """Count the parameters of each part, in a model without memory.

    Raises:
        RuntimeError: the parts don't add up to the model.
    """
    with torch.device("meta"):
        model = SamfForConditionalGeneration(settings.config())
    parts = {
        "slice encoder": model.model.slice_encoder,
        "positions": model.model.slice_position,
        "aggregator": model.model.aggregator,
        "fusion": model.model.fusion,
        "language model": model.model.language_model,
        "head": model.lm_head,
    }
    counts = {name: sum(weight.numel() for weight in part.parameters()) for name, part in parts.items()}
    total = sum(weight.numel() for weight in model.parameters())
    if sum(counts.values()) != total:
        raise RuntimeError(f"The parts have {sum(counts.values())} parameters, the model {total}: a part is missing.")
    return [Measurement(name, "million", [count / 1e6]) for name, count in {**counts, "whole model": total}.items()]


def vit_flops(vision: Any, slices: int) -> int:
    """Return the floating-point operations of the ViT's matrix products; (m, k) by (k, n) counts 2·m·k·n."""
    dim, patches = vision.hidden_size, (vision.image_size // vision.patch_size) ** 2
    tokens = patches + 1
    embed = 2 * patches * dim * vision.num_channels * vision.patch_size**2
    projections = 2 * tokens * dim * (4 * dim + 2 * vision.intermediate_size)
    attention = 2 * 2 * tokens**2 * dim
    return slices * (embed + vision.num_hidden_layers * (projections + attention))


def matmul_tasks(sizes: Sequence[int], device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """Return one square matrix product per size.

    Args:
        sizes: of the matrices.
        device: where they are.
        dtype: of the matrices.

    Returns:
        Size, as text → task.
    """
    tasks: dict[str, Callable[[], Any]] = {}
    for size in sizes:
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        output = torch.empty_like(left)
        tasks[str(size)] = lambda left=left, right=right, output=output: torch.mm(left, right, out=output)
    return tasks


@torch.inference_mode()
def time_vit(settings: Settings) -> list[Measurement]:
    """Time all slices in one call against one slice at a time and against the fastest square matrix product."""
    # Only the slice encoder is measured; a tiny language model saves memory.
    config = settings.config(text_config=TINY_TEXT, image_token_id=120)
    model = random_model(SamfModel, config, settings.device, settings.dtype)
    slices = settings.sizes.slices
    pixels = slice_stack(settings, 1, slices)
    matmuls = matmul_tasks(settings.sizes.matmuls, settings.device, settings.dtype)
    tasks = {
        "one call": lambda: model.encode_slices(pixels),
        "loop": lambda: [model.encode_slices(pixels[:, index, None]) for index in range(slices)],
        **matmuls,
    }
    times = settings.stopwatch.in_turns(tasks, "vit")
    rates = {size: [2 * int(size) ** 3 / seconds for seconds in times[size]] for size in matmuls}
    fastest = max(rates, key=lambda size: sorted(rates[size])[len(rates[size]) // 2])
    vit = [vit_flops(config.vision_config, slices) / seconds for seconds in times["one call"]]
    over_loop = ratios(times["loop"], times["one call"])
    share = [100 * part for part in ratios(vit, rates[fastest])]
    return [
        Measurement("all slices in one call", "s", times["one call"], note=f"{slices} slices"),
        Measurement("one slice at a time", "s", times["loop"]),
        Measurement("loop / one call", "x", over_loop, settings.limit(8, on=("cuda",)), "limit on a GPU: 8"),
        Measurement("one call", "GFLOP/s", [rate / 1e9 for rate in vit]),
        Measurement("fastest matrix product", "GFLOP/s", [rate / 1e9 for rate in rates[fastest]], note=f"{fastest}²"),
        Measurement("share of that product's speed", "%", share, settings.limit(70)),
    ]


def repeated_fusion(
    fusion: SamfFusion,
    slices: torch.Tensor,
    volume: torch.Tensor,
    text: torch.Tensor,
    slice_mask: torch.Tensor,
    text_mask: torch.Tensor,
    repeats: int,
) -> torch.Tensor:
    """Compute Ao2D like the reference implementation: every part is repeated, and W_fusion multiplies all equal rows.

    Args:
        fusion: the module whose weights are used.
        slices: z_2d, (B, S, slice width).
        volume: z_3d, (B, volume width).
        text: embeddings of the prompt, (B, T, text width).
        slice_mask: (B, S), True = keep.
        text_mask: (B, T), True = keep.
        repeats: rows per volume.

    Returns:
        (B, repeats, text width); all rows of a volume are equal.
    """
    slices, text = fusion.project_slices(slices), fusion.project_text(text)
    volume = fusion.project_volume(volume).unsqueeze(1)  # (B, 1, d)
    volume_slices, _ = attend(volume, slices, slice_mask)
    volume_text, _ = attend(volume, text, text_mask)
    text_slices, _ = attend(text, slices, slice_mask)
    parts = [volume, volume_slices, volume_text, masked_mean(text_slices, text_mask)]
    return fusion.mix(torch.cat([part.repeat(1, repeats, 1) for part in parts], dim=-1))


@torch.inference_mode()
def time_fusion(settings: Settings) -> list[Measurement]:
    """Time the fusion and the placement of its tokens against the form that multiplies equal rows."""
    sizes, config = settings.sizes, settings.config(fusion_type="ao2d")
    batch, tokens = sizes.fusion_batch, config.num_image_tokens
    with torch.device(settings.device):
        fusion = SamfFusion(config).to(settings.dtype).eval()
        fill(fusion)
        slices = torch.randn(batch, sizes.fusion_slices, config.slice_dim, dtype=settings.dtype)
        volume = torch.randn(batch, config.volume_dim, dtype=settings.dtype)
        text = torch.randn(batch, sizes.fusion_text, config.text_config.hidden_size, dtype=settings.dtype)
        slice_mask = torch.ones(batch, sizes.fusion_slices, dtype=torch.bool)
        text_mask = torch.ones(batch, sizes.fusion_text, dtype=torch.bool)
        embeds = torch.cat([torch.zeros(batch, tokens, text.shape[-1], dtype=settings.dtype), text], dim=1)
        image_mask = (torch.arange(embeds.shape[1]) < tokens).expand(batch, -1)
    given = (slices, volume, text, slice_mask, text_mask)

    def once() -> torch.Tensor:
        return place_image_tokens(embeds, image_mask, fusion(*given)[0], slice_mask)

    def repeated() -> torch.Tensor:
        placed = embeds.clone()
        placed[:, :tokens] = repeated_fusion(fusion, *given, tokens)
        return placed

    torch.testing.assert_close(once(), repeated(), rtol=0.02, atol=0.02 if settings.dtype != torch.float32 else 1e-4)
    times = settings.stopwatch.in_turns({"once": once, "repeated": repeated}, "fusion")
    shape = f"B {batch}, S {sizes.fusion_slices}, T {sizes.fusion_text}, d {config.fusion_dim}, {tokens} image tokens"
    return [
        Measurement("fused once, then placed", "ms", [1e3 * seconds for seconds in times["once"]], note=shape),
        Measurement(f"{tokens} equal rows", "ms", [1e3 * seconds for seconds in times["repeated"]]),
        Measurement(
            "equal rows / once", "x", ratios(times["repeated"], times["once"]), settings.limit(8), "same result"
        ),
    ]


def time_decoding(settings: Settings) -> list[Measurement]:
    """Time `generate` from slice embeddings of one volume: tokens per second of the prompt and of the answer."""
    sizes, config = settings.sizes, settings.config()
    settings.require_memory(settings.dtype.itemsize)
    model = random_model(SamfForConditionalGeneration, config, settings.device, settings.dtype)
    batch = conversation_batch(settings, 1, sizes.prompt)
    del batch["slice_mask"]
    pixels = batch.pop("pixel_values")
    with torch.inference_mode():
        batch["slice_embeddings"] = model.get_image_features(pixels).last_hidden_state
    generate(model, batch, 2)  # warm-up: the first call includes allocations and kernel choices
    length = batch["input_ids"].shape[1]
    prefill: list[float] = []
    steps: list[float] = []
    started = time.monotonic()
    while not prefill or (time.monotonic() - started < settings.budget and len(prefill) < 10):
        _, clock = generate(model, batch, sizes.new_tokens)
        prefill.append(clock.prefill)
        steps.extend(clock.steps)
    weights = sum(weight.numel() * weight.element_size() for weight in model.model.language_model.parameters())
    note = f"{config.num_image_tokens} image and {sizes.prompt} prompt tokens, from slice embeddings"
    return [
        Measurement("prefill", "tokens/s", [length / seconds for seconds in prefill], note=note),
        Measurement("decode", "tokens/s", [1 / seconds for seconds in steps], note="one volume, greedy, cache on"),
        Measurement("decode, weights read", "GB/s", [weights / seconds / 1e9 for seconds in steps]),
    ]
