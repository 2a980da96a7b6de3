"""Studies: methods × learning rates × seeds with one budget, beside references and controls."""
