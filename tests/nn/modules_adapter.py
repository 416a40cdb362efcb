"""Modules of linear maps with frozen weights: what torch.nn lacks, tried in test_adapters.py."""

MODULES = []
OURS_ALONE = {"LoRALinear", "NF4Linear"}
