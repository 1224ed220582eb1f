"""Images and labels: readers, datasets, transforms and the loader."""
