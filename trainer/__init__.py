"""Batches -> weights: loop, model, optim, engines, checkpoint, evaluate, monitor, flops, distributed."""
