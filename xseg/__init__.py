"""xseg: fine-tuning multimodal LLMs that answer with masks."""

from typing import Any

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Lazy, so that `import xseg` and the command line start without torch.
    if name == "load":
        from xseg.infer.predictor import load

        return load
    raise AttributeError(f"module 'xseg' has no attribute {name!r}")
