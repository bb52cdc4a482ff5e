"""What PyTorch does with the operators: gradients, autocast, vmap, FLOPs."""
