"""How a model is trained: engine, checkpoints, metrics and the loop that ties them together."""
