"""The checks of the methods that are no LoRA, one file for each: config, tensors, cost. No torch.

Each gives a canonical config, with every pattern resolved to module paths: what lowering reads.
"""
