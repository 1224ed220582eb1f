"""Train, evaluate and use image classifiers.

The three programs are train.py, validate.py and predict.py; launch.py runs them on several GPUs. They share:

- options.py: command-line options and YAML recipes
- data/: readers (folders, tar files, hub datasets), datasets, transforms, and the loader that batches them
- factory.py: model, loss, optimizer and learning-rate schedule from the options
- inference.py: trained models from checkpoints
- evaluation.py: top-1 and top-5 accuracy
- distributed.py, device.py, signals.py: processes, devices and precision, interruption
- checkpoints.py, logger.py: the files of a run
"""
