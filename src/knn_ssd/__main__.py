"""`python -m knn_ssd` runs the command `knn-ssd`."""

import sys

from knn_ssd.cli import main

if __name__ == "__main__":
    sys.exit(main())
