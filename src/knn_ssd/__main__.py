"""`python -m knn_ssd` is `knn-ssd`."""

import sys

from knn_ssd.cli import main

if __name__ == "__main__":
    sys.exit(main())
