"""Training here beside a plain transformers Trainer with PEFT, step by step on the same tokens."""
