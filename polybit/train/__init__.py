"""Training: objectives, schedules and fake-quantized modules on transformers' Trainer."""
