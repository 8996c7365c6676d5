"""Slices as the image processor gives them to an encoder."""

import torch

from samf.model.image_processing_samf import SamfImageProcessor


def normalise_pixels(slices: torch.Tensor, processor: SamfImageProcessor) -> torch.Tensor:
    """Return slices (…, C, H, W), 0 to 255, rescaled and normalised by the processor's mean and standard deviation."""
    mean, std = (
        torch.tensor(values, device=slices.device)[:, None, None]
        for values in (processor.image_mean, processor.image_std)
    )
    return (slices.float() * processor.rescale_factor - mean) / std
