"""One module a backend, each with the interface that dispatch.py describes."""
