"""Fine-tuning of pretrained encoders, decoders and encoder-decoders on labelled texts."""
