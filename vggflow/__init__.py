"""Value gradient guidance for flow matching: a flow model is aligned with a reward.

What users need is here, loaded when it is first used, so that `import vggflow` is quick.
"""

__version__ = "0.1.0"

import importlib

from vggflow.common.torchvision_cpu import cure

cure()

# name -> module; __init__.pyi says the same to type checkers and editors
_PLACES = {
    "FlowModel": "theory.flow",
    "GaussianFlow": "theory.flow",
    "MixtureFlow": "theory.flow",
    "Trajectory": "theory.flow",
    "time_grid": "theory.flow",
    "sample": "theory.flow",
    "ValueGradient": "theory.value",
    "Method": "methods.method",
    "VGGFlow": "methods.value_gradient",
    "VGGFlowPMP": "methods.costate",
    "AdjointMatching": "methods.costate",
    "ReFL": "methods.direct",
    "DRaFT": "methods.direct",
    "FinetuneConfig": "training.config",
    "finetune": "training.loop",
    "History": "training.rows",
    "RunDirectory": "training.run_directory",
    "SD3Flow": "worlds.sd3",
    "lora_settings": "worlds.lora",
    "load_flow": "worlds.world",
    "get_reward": "judging.rewards",
    "latent_reward": "judging.rewards",
    "load_prompts": "judging.prompts",
    "read_images": "judging.image_sets",
    "evaluate": "judging.evaluation",
    "gap_closed": "theory.control",
    "write_report": "commands.report",
}
# What diffusers asks a library for when it loads a pipeline folder
_OF_PIPELINES = ("EmojiCodec", "EmojiT5Encoder", "ModelMixin", "PreTrainedModel")

__all__ = [*_PLACES, "__version__"]


def __getattr__(name):
    "A name of the top level, imported when it is first used"
    place = "worlds.emoji_networks" if name in _OF_PIPELINES else _PLACES.get(name)
    if place is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = getattr(importlib.import_module(f"{__name__}.{place}"), name)
    globals()[name] = found
    return found


def __dir__():
    "Names of the top level"
    return sorted({*globals(), *_PLACES})
