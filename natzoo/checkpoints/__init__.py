"""The one road for weight files: read them safely, load them strictly, write them so that no crash loses any."""

from natzoo.checkpoints.download import DownloadError
from natzoo.checkpoints.load import load_weights
from natzoo.checkpoints.read import read_checkpoint, read_weights, weights_of
from natzoo.checkpoints.record import record_of
from natzoo.checkpoints.sources import locate
from natzoo.checkpoints.write import write_atomically, write_checkpoint, write_table, write_weights

__all__ = [
    "DownloadError",
    "load_weights",
    "locate",
    "read_checkpoint",
    "read_weights",
    "record_of",
    "weights_of",
    "write_atomically",
    "write_checkpoint",
    "write_table",
    "write_weights",
]
