"""The frozen 4-bit model: its spec, its loading, its NF4 linear layers and their kernels."""
