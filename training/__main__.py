"""`python -m training` is `nibble train`: what `accelerate launch` can start."""

from training.cli import app

app(prog_name="nibble train")
