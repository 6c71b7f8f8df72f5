"""Shape and hyper-parameters of PanGu."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig


@strict
class PanguConfig(PreTrainedConfig):
    """PanGu-alpha (arXiv 2104.12369) and PanGu-Alpha-Evolution; the defaults are the 2.6B model.

    `num_hidden_layers` counts the ordinary layers **and** the query layer, so it is also the number
    of entries in the key/value cache: the 2.6B model has 31 + 1.

    `hidden_act`: "gelu" (erf) is what both PyTorch ports compute; "gelu_new" (tanh) is what the
    original training computed.

    `intermediate_size`: `None` stands for `4 * hidden_size`.
    """

    model_type = "pangu"
    keys_to_ignore_at_inference = ["cache"]  # noqa: RUF012 (the base class's own spelling)

    vocab_size: int = 40000
    hidden_size: int = 2560
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    intermediate_size: int | None = None
    max_position_embeddings: int = 1024
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-5
    embd_pdrop: float | int = 0.1
    attn_pdrop: float | int = 0.1
    resid_pdrop: float | int = 0.1
    initializer_range: float = 0.02
    use_cache: bool = True
    bos_token_id: int | None = 9
    eos_token_id: int | list[int] | None = 9
    pad_token_id: int | None = 6
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs):
        if self.intermediate_size is None:
            self.intermediate_size = 4 * self.hidden_size
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size {self.hidden_size} is not a multiple of num_attention_heads "
                f"{self.num_attention_heads}"
            )
