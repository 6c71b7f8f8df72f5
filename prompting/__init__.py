"""Language models asked with a prompt: PanGu, templates, label scoring, soft prompts."""
