"""Locate, download, read, adapt and write weight files; all other code handles weight files through this package."""

from natzoo.checkpoints.adapt import fit_detector, load_weights
from natzoo.checkpoints.download import DownloadError, cache_folder
from natzoo.checkpoints.read import read_checkpoint, read_weights, weights_of
from natzoo.checkpoints.record import record_of
from natzoo.checkpoints.sources import (
    ZooEntry,
    find_entry,
    locate,
    locate_config,
    locate_entry,
    path_in_cache,
    zoo_entries,
)
from natzoo.checkpoints.write import (
    write_atomically,
    write_checkpoint,
    write_folder,
    write_table,
    write_weights,
)

__all__ = [
    "DownloadError",
    "ZooEntry",
    "cache_folder",
    "find_entry",
    "fit_detector",
    "load_weights",
    "locate",
    "locate_config",
    "locate_entry",
    "path_in_cache",
    "read_checkpoint",
    "read_weights",
    "record_of",
    "weights_of",
    "write_atomically",
    "write_checkpoint",
    "write_folder",
    "write_table",
    "write_weights",
    "zoo_entries",
]
