"""llama.cpp in a process of its own: its seconds of the prompt and of each further token, as a line of JSON.

    python benchmarks/llama_cpp_process.py MODEL THREADS PROMPT TOKENS

Run as a file, not as a module: a module would import torch, whose memory would count as llama.cpp's.
"""

import json
import resource
import sys
from pathlib import Path
from typing import Any

import xllamacpp


def main() -> None:
    """Answer PROMPT tokens with TOKENS tokens and print the times."""
    model, threads, prompt, tokens = sys.argv[1], *map(int, sys.argv[2:])
    server = xllamacpp.Server(parameters(model, threads, prompt + tokens))
    answer(server, prompt, 2)  # warm-up, as for the other formats
    times = answer(server, prompt, tokens)
    found = {
        "prefill": times[0]["prompt_ms"] / 1000,
        "steps": [
            (later["predicted_ms"] - earlier["predicted_ms"]) / 1000
            for earlier, later in zip(times[:-1], times[1:], strict=True)
        ],
        "peak": peak(),
        "system": xllamacpp.get_system_info(),
    }
    sys.stdout.write(json.dumps(found) + "\n")


def parameters(model: str, threads: int, context: int) -> Any:
    """Return the options of llama.cpp: its defaults, on the CPU and without caches of prompts.

    Args:
        model: path of a GGUF file.
        threads: of the prompt and of each token.
        context: most tokens of a prompt and its answer.
    """
    options = xllamacpp.CommonParams()
    options.model.path = model
    options.cpuparams.n_threads = options.cpuparams_batch.n_threads = threads
    options.n_ctx, options.n_parallel = context, 1
    options.n_gpu_layers, options.no_op_offload, options.fit_params = 0, True, False
    options.cache_prompt, options.cache_ram_mib = False, 0
    # Mapped, the file would count twice: llama.cpp copies 4-bit weights into a layout of its own.
    options.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
    options.verbosity = 2  # warnings
    return options


def answer(server: Any, prompt: int, tokens: int) -> list[dict[str, float]]:
    """Return llama.cpp's own timings after each new token.

    Args:
        server: of llama.cpp.
        prompt: tokens of the prompt.
        tokens: new tokens.

    Raises:
        RuntimeError: it has read or written another number of tokens.
    """
    chunks: list[dict[str, Any]] = []
    request = {
        "prompt": [3 + number % 100 for number in range(prompt)],  # within the smallest vocabulary
        "max_tokens": tokens,
        "ignore_eos": True,
        "cache_prompt": False,
        "temperature": 0.0,
        "stream": True,
        "timings_per_token": True,
    }
    server.handle_completions(request, chunks.append)
    times = [chunk["timings"] for chunk in chunks if "timings" in chunk][:-1]  # the last one repeats the totals
    read, written = {time["prompt_n"] for time in times}, [time["predicted_n"] for time in times]
    if read != {prompt} or written != list(range(1, tokens + 1)):
        raise RuntimeError(
            f"llama.cpp read {sorted(read)} tokens and wrote {written}; {prompt} and {tokens} were asked for. "
            f"Its last message: {chunks[-1] if chunks else None}"
        )
    return times


def peak() -> int:
    """Return the most bytes of memory that this process has held; `ru_maxrss` would include its parent's on Linux."""
    status = Path("/proc/self/status")
    lines = status.read_text(encoding="utf-8").splitlines() if status.is_file() else []
    held = next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)
    return held or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
