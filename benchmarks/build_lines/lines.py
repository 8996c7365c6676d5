"""The lines by name."""

from samf.benchmarks.build_lines import command_lines, model_lines, volume_lines
from samf.benchmarks.build_lines.plan import Line

LINES: dict[str, Line] = {
    "scoring": command_lines.score,
    "dicom": volume_lines.read_series,
    "formats": volume_lines.read_files,
    "caches": volume_lines.fill_caches,
    "start": command_lines.start,
    "answers": model_lines.answer,
    "step": model_lines.train,
    "dino": model_lines.pretrain,
}
