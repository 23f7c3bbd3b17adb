"""Training on a frozen model: gates by distillation, and adapters of attention by fine-tuning."""
