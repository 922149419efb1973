"""One file per fused operation, each with a plain PyTorch path. Nothing here knows of models."""
