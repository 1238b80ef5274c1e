"""duqpp: quantize LLaMA-family models to MXFP4 W4A4 with DuQuant++, and run them anywhere."""

from duqpp.config import QuantizeConfig
from duqpp.errors import BackendUnavailableError, CheckpointError, DuqppError, InputError
from duqpp.evaluation.perplexity import perplexity
from duqpp.format import MXFP4Tensor, ScaleRule
from duqpp.integrations.transformers import DuqppConfig, from_pretrained
from duqpp.job.quantize import QuantizeReport, quantize_model
from duqpp.nn import MXFP4Linear
from duqpp.version import __version__

__all__ = [
    "BackendUnavailableError",
    "CheckpointError",
    "DuqppConfig",
    "DuqppError",
    "InputError",
    "MXFP4Linear",
    "MXFP4Tensor",
    "QuantizeConfig",
    "QuantizeReport",
    "ScaleRule",
    "__version__",
    "from_pretrained",
    "perplexity",
    "quantize_model",
]
