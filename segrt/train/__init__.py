"""TRAIN: from a dataset folder to a bundle; needs torch (extra `train`)."""
