"""Makes the scripts importable."""

import sys
from pathlib import Path

for folder in ("tools", "classification"):
    sys.path.insert(0, str(Path(__file__).parents[2] / folder))
