"""A saved folder loads where this package isn't: in a fresh process with `samf` blocked from import."""

import json
import subprocess
import sys
import textwrap

import nibabel
import numpy as np
import pytest
import torch
from tiny import FUSION_TYPES, model_for, tiny_processor

SCRIPT = """
    import json, sys

    class Blocked:
        def find_spec(self, name, path=None, target=None):
            if name == "samf" or name.startswith("samf."):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocked())
    import torch
    from transformers import (AutoConfig, AutoImageProcessor, AutoModel, AutoModelForCausalLM,
                              AutoModelForImageTextToText, AutoProcessor)

    folder, scan = sys.argv[1:]
    load = dict(trust_remote_code=True)
    autos = AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoImageProcessor
    classes = [auto.from_pretrained(folder, **load) for auto in autos]
    model, processor = classes[3], classes[4]
    content = [{"type": "volume", "path": scan}, {"type": "text", "text": "Which finding is present?"}]
    options = dict(add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    tokens = model.generate(**inputs, max_new_tokens=6, do_sample=False)
    print(json.dumps({"modules": [type(item).__module__ for item in classes], "tokens": tokens.tolist()}))
"""


@pytest.mark.parametrize("fusion_type", FUSION_TYPES)
def test_a_saved_folder_is_whole(fusion_type, tmp_path):
    processor = tiny_processor(None if fusion_type == "slice_tokens" else 4)
    model = model_for(processor, fusion_type=fusion_type)
    folder, scan = tmp_path / "model.v1", tmp_path / "scan.nii.gz"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    voxels = np.random.default_rng(0).integers(-1000, 400, (12, 14, 16)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), scan)
    content = [{"type": "volume", "path": str(scan)}, {"type": "text", "text": "Which finding is present?"}]
    options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True, "return_tensors": "pt"}
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], **options)
    with torch.no_grad():
        expected = model.generate(**inputs, max_new_tokens=6, do_sample=False)

    environment = {"PATH": "/usr/bin:/bin", "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(scan)],
        capture_output=True,
        encoding="utf-8",
        cwd=tmp_path,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert all(module.startswith("transformers_modules.") for module in result["modules"])
    assert result["tokens"] == expected.tolist()
