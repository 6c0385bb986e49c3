"""The experiments that `train.py` runs: data, models, one training loop for every optimizer, logs and pictures."""
