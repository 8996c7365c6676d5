"""A tiny model for the commands."""

import pytest
from tiny import model_for, tiny_processor


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """Folder of the model and its processor, which no test changes."""
    folder, processor = tmp_path_factory.mktemp("model"), tiny_processor()
    model_for(processor, finding_names=["Emphysema"]).save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)
