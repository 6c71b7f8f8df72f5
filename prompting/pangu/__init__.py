"""PanGu; importing this package makes the transformers Auto classes know it."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from prompting.pangu.configuration import PanguConfig
from prompting.pangu.modeling import PanguForCausalLM, PanguModel
from prompting.pangu.tokenization import PanguTokenizer, train_vocabulary

__all__ = ["PanguConfig", "PanguForCausalLM", "PanguModel", "PanguTokenizer", "train_vocabulary"]

AutoConfig.register("pangu", PanguConfig)
AutoModel.register(PanguConfig, PanguModel)
AutoModelForCausalLM.register(PanguConfig, PanguForCausalLM)
AutoTokenizer.register(PanguConfig, tokenizer_class=PanguTokenizer)
