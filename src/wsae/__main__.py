"""`python -m wsae` is `wsae`."""

import sys

from wsae.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
