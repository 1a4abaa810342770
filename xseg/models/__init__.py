"""The model: encoders, projectors, language model, mask decoder.

Importing this package makes ``transformers.AutoConfig`` and ``AutoModel`` open xseg's folders.
"""

from transformers import AutoConfig, AutoModel

from xseg.models.configuration import XSegConfig
from xseg.models.xseg import XSegModel

AutoConfig.register(XSegConfig.model_type, XSegConfig)
AutoModel.register(XSegConfig, XSegModel)
