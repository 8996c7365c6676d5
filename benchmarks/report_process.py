"""A report of one scan in a process of its own: seconds until each step has ended, as a line of JSON.

    python benchmarks/report_process.py LAUNCHED MODEL SCAN TOKENS

Run as a file, not as a module: a module would import the package before the first step is timed. LAUNCHED is the time
(`time.time()`) at which the process was started, so that the interpreter's start counts.
"""

import json
import sys
import time


def main() -> None:
    """Write a report and print when each step had ended."""
    launched, model, scan, tokens = float(sys.argv[1]), *sys.argv[2:4], int(sys.argv[4])
    ended = {}

    def mark(step: str) -> None:
        ended[step] = time.time() - launched

    mark("interpreter")
    import torch

    mark("import torch")
    import transformers

    transformers.utils.logging.disable_progress_bar()
    mark("import transformers")
    import samf
    from samf.model.pipeline_samf import SamfReportPipeline

    mark("import samf")
    loaded = samf.SamfForConditionalGeneration.from_pretrained(model)
    processor = samf.SamfProcessor.from_pretrained(model)
    reporter = SamfReportPipeline(model=loaded, processor=processor, device=torch.device("cpu"))
    mark("load the model")
    volume = processor.image_processor.read(scan)
    mark("read the scan")
    encoded = reporter.encode(volume)
    mark("slices and encoder")
    pieces = reporter.stream(encoded, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    next(pieces, None)
    mark("first word")
    for _ in pieces:
        pass
    mark("end")
    sys.stdout.write(json.dumps(ended) + "\n")


if __name__ == "__main__":
    main()
