"""Train, evaluate and use image classifiers.

The three programs are train.py, validate.py and predict.py; launch.py runs them on several GPUs. They share:

- options.py: command-line options and YAML recipes
- data/: readers (folders, tar files, hub datasets), datasets, transforms, the loader that batches them, what happens to
  batches on the device, and pictures to predict on
- factory.py: model, loss, optimizer and learning-rate schedule from the options
- freezing.py, distillation.py, sharding.py: train parts of a model, learn from a teacher, shard over processes (FSDP2)
- inference.py: trained models from checkpoints
- evaluation.py, confusion.py: top-1 and top-5 accuracy, results per class
- distributed.py, device.py, signals.py: processes, devices and precision, interruption
- checkpoints.py, logger.py: the files of a run
"""
