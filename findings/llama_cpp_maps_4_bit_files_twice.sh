#!/usr/bin/env bash
# llama.cpp holds the weights of a mapped 4-bit file twice.
#
# Guessed: with its default, a mapped file, llama.cpp needs about the file's size, as the pages of the file are the weights.
# Seen: on a processor with AVX2 it copies Q4_0 into a layout of its own and keeps the pages that it has read, so that the
# process peaks at about twice the file. Without mapping (LLAMA_LOAD_MODE_NONE) the peak is about the file's size. Who
# compares the memory of 4-bit formats by a process's peak must know which of the two was measured.
#
# Versions: xllamacpp 2026.10.11549 (llama.cpp), gguf 0.19.0, Python 3.11, Linux, AMD EPYC with AVX2.
# Seen: file 304 MB; peak added by default (mapped) 618 MB, without mapping 331 MB. The script fails if that changes.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet "xllamacpp==2026.10.11549" "gguf==0.19.0" "numpy<3"
cd "$folder"

cat > write.py <<'PYTHON'
import gguf
import numpy as np

LAYERS, WIDTH, INNER, WORDS = 8, 2048, 8192, 1000
writer = gguf.GGUFWriter("model.gguf", "llama")
writer.add_context_length(512)
writer.add_embedding_length(WIDTH)
writer.add_block_count(LAYERS)
writer.add_feed_forward_length(INNER)
writer.add_head_count(16)
writer.add_head_count_kv(16)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_rope_dimension_count(WIDTH // 16)
writer.add_tokenizer_model("llama")
writer.add_token_list([f"word{number}" for number in range(WORDS)])
writer.add_token_scores([0.0] * WORDS)
writer.add_token_types([1] * WORDS)
generator = np.random.default_rng(0)


def linear(name, channels, inputs):
    weight = (generator.standard_normal((channels, inputs)) * 0.02).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q4_0
    writer.add_tensor(name, gguf.quants.quantize(weight, kind), raw_dtype=kind)


linear("token_embd.weight", WORDS, WIDTH)
for layer in range(LAYERS):
    for norm in ("attn_norm", "ffn_norm"):
        writer.add_tensor(f"blk.{layer}.{norm}.weight", np.ones(WIDTH, np.float32))
    for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
        linear(f"blk.{layer}.{name}.weight", WIDTH, WIDTH)
    linear(f"blk.{layer}.ffn_gate.weight", INNER, WIDTH)
    linear(f"blk.{layer}.ffn_up.weight", INNER, WIDTH)
    linear(f"blk.{layer}.ffn_down.weight", WIDTH, INNER)
writer.add_tensor("output_norm.weight", np.ones(WIDTH, np.float32))
linear("output.weight", WORDS, WIDTH)
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
PYTHON

cat > load.py <<'PYTHON'
import sys

import xllamacpp


def peak():
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) / 1000 for line in status if line.startswith("VmHWM:"))


before = peak()
options = xllamacpp.CommonParams()
options.model.path = "model.gguf"
options.n_ctx, options.n_parallel, options.n_gpu_layers, options.cache_ram_mib = 64, 1, 0, 0
options.cpuparams.n_threads = options.cpuparams_batch.n_threads = 2
options.fit_params, options.verbosity = False, 0
if sys.argv[1] == "copied":
    options.load_mode = xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_NONE
chunks = []
request = {"prompt": [5, 6, 7], "max_tokens": 2, "ignore_eos": True, "stream": True}
xllamacpp.Server(options).handle_completions(request, chunks.append)
print(round(peak() - before))
PYTHON

"$folder/venv/bin/python" write.py
size=$(($(stat -c %s model.gguf) / 1000000))
default=$("$folder/venv/bin/python" load.py default 2>/dev/null | tail -1)
copied=$("$folder/venv/bin/python" load.py copied 2>/dev/null | tail -1)
echo "file $size MB; peak added by default (mapped) $default MB, without mapping $copied MB"
grep -q avx2 /proc/cpuinfo || { echo "this processor has no AVX2: not comparable"; exit 0; }
test $((default * 10)) -gt $((size * 17)) && test $((copied * 10)) -lt $((size * 15))
