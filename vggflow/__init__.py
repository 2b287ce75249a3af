__version__ = "0.1.0"

from vggflow.common.torchvision_cpu import cure

cure()

def __getattr__(name):
    "What diffusers asks a library for when it loads a pipeline folder: the emoji classes, and the bases it knows them by"
    if name in ("EmojiCodec", "EmojiT5Encoder", "ModelMixin", "PreTrainedModel"):
        from vggflow.worlds import emoji
        return getattr(emoji, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
