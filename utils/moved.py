"""Old module names, kept for one release: importing or running one gives a warning and the module of the new name."""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from types import CodeType, ModuleType

# Old name: new name, both relative to the package. `python -m samf.data.phantom` runs `python -m samf.phantoms.dataset`.
MOVED = {
    "chat_template_samf": "model.chat_template_samf",
    "components_samf": "model.components_samf",
    "configuration_samf": "model.configuration_samf",
    "conversation_samf": "model.conversation_samf",
    "conversion_checks": "scripts.conversion_checks",
    "ct_volume": "model.ct_volume",
    "data.cache_ledger": "cache.manifest",
    "data.claims": "cache.locks",
    "data.ct_rate_names": "data.ct_rate.names",
    "data.ct_rate_sources": "data.ct_rate.sources",
    "data.ct_rate_tables": "data.ct_rate.tables",
    "data.embedding_cache": "cache.embedding_cache",
    "data.labelled_slices": "phantoms.labelled_slices",
    "data.phantom": "phantoms.dataset",
    "data.phantom_findings": "phantoms.findings",
    "data.phantom_text": "phantoms.text",
    "data.phantom_volume": "phantoms.volume",
    "data.preprocessing": "cache.fill",
    "data.processes": "utils.distributed",
    "data.questions": "data.ct_rate.questions",
    "data.screening": "cache.screening",
    "data.slice_cache": "cache.slice_cache",
    "data.slice_images": "pretraining.slice_datasets",
    "data.slice_settings": "cache.settings",
    "data.small_tokenizer": "phantoms.tokenizer",
    "data.tally": "data.load_stats",
    "data.text_files": "utils.text_files",
    "data.volume_lists": "data.volume_discovery",
    "data.worker_pool": "cache.worker_pool",
    "data.workers": "utils.parallel",
    "dicom_pixels": "model.ct_dicom_pixels",
    "dicom_volume": "model.ct_dicom",
    "evaluation.answer_folder": "evaluation.answering.answer_folder",
    "evaluation.clinical_metrics": "evaluation.metrics.clinical_metrics",
    "evaluation.finding_cues": "model.text_cues",
    "evaluation.finding_labeller": "model.text_labeller",
    "evaluation.finding_terms": "model.text_terms",
    "evaluation.generation": "evaluation.answering.generation",
    "evaluation.html_report": "evaluation.report.html_report",
    "evaluation.interval_coverage": "evaluation.metrics.interval_coverage",
    "evaluation.labelled_sentences": "evaluation.metrics.labelled_sentences",
    "evaluation.laterality": "model.text_laterality",
    "evaluation.metrics.abbreviations": "model.text_abbreviations",
    "evaluation.metrics.finding_cues": "model.text_cues",
    "evaluation.metrics.finding_labeller": "model.text_labeller",
    "evaluation.metrics.finding_terms": "model.text_terms",
    "evaluation.metrics.laterality": "model.text_laterality",
    "evaluation.metrics.report_text": "model.text_sentences",
    "evaluation.multiple_choice": "evaluation.metrics.multiple_choice",
    "evaluation.option_likelihood": "evaluation.answering.option_likelihood",
    "evaluation.paper_tables": "evaluation.report.paper_tables",
    "evaluation.report_sizes": "evaluation.metrics.report_sizes",
    "evaluation.report_text": "model.text_sentences",
    "evaluation.scoreboard": "evaluation.report.scoreboard",
    "evaluation.side_by_side": "evaluation.report.side_by_side",
    "evaluation.statistics": "evaluation.metrics.bootstrap",
    "evaluation.text_metrics": "evaluation.metrics.text_metrics",
    "evaluation.volume_readers": "evaluation.answering.volume_readers",
    "generation_samf": "model.generation_samf",
    "hub_samf": "model.hub_samf",
    "image_processing_samf": "model.image_processing_samf",
    "model_card": "model.model_card",
    "modeling_samf": "model.modeling_samf",
    "pretraining.aggregator_arguments": "training.aggregator_arguments",
    "pretraining.aggregator_weights": "training.aggregator_weights",
    "pretraining.checkpoints": "training.checkpoints",
    "pretraining.contrast": "pretraining.contrastive",
    "pretraining.divergence": "training.divergence",
    "pretraining.launchers": "training.launchers",
    "pretraining.resumable": "training.trainer_base",
    "pretraining.run_shape": "training.run_shape",
    "processing_samf": "model.processing_samf",
    "recipe": "utils.recipe",
    "training.boards": "training.trackers",
    "training.building": "training.factory",
    "training.parts": "training.param_groups",
    "training.records": "training.datasets",
    "training.samples": "training.sample_generation",
    "training.sight": "training.image_grounding",
    "training.stores": "training.volume_stores",
    "view": "reporting.slice_view",
    "volume_files": "model.ct_common",
    "volume_memory": "model.ct_memory",
    "volume_sources": "model.ct_download",
}


class _MovedModules(importlib.abc.MetaPathFinder, importlib.abc.InspectLoader):
    """A finder of a package's modules by their old names.

    Args:
        package: the package's name.
        moved: {old name: new name}, relative to the package.
    """

    def __init__(self, package: str, moved: dict[str, str]):
        self.names = {f"{package}.{old}": f"{package}.{new}" for old, new in moved.items()}
        self.specs: dict[str, importlib.machinery.ModuleSpec | None] = {}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Return a spec for an old name, None for any other.

        Args:
            fullname: the absolute name of the module to import.
            path: not used; old names need no search.
            target: not used; a reload is an import.
        """
        if fullname not in self.names:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=self.names[fullname])

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Return the module of the new name, so that both names share its state."""
        warnings.warn(f"{spec.name} is now {self.names[spec.name]}; the old name will go.", FutureWarning, stacklevel=2)
        module = importlib.import_module(self.names[spec.name])
        self.specs[spec.name] = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        """Restore the module's own spec, which the import system has replaced; its code has run under the new name."""
        old = module.__spec__.name if module.__spec__ else ""
        module.__spec__ = self.specs.pop(old, module.__spec__)

    def get_source(self, fullname: str) -> None:
        """Return None; the source belongs to the new name."""

    def get_code(self, fullname: str) -> CodeType:
        """Return code that runs the new module as a script, for `python -m`."""
        new = self.names[fullname]
        sys.stderr.write(f"python -m {fullname} is now python -m {new}; the old name will go.\n")
        return compile(
            f"import runpy; runpy.run_module({new!r}, run_name='__main__', alter_sys=True)", fullname, "exec"
        )


def install(package: str) -> None:
    """Make the old names of `package` importable."""
    if not any(isinstance(finder, _MovedModules) for finder in sys.meta_path):
        sys.meta_path.append(_MovedModules(package, MOVED))
